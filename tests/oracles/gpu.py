"""A GPU of NVIDIA's that is not there: Triton compiles for it, and the result runs on the CPU's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import JITFunction, driver

from dinat_triton.kernels import prepare, schedule, support
from dinat_triton.offline.targets import Target
from tests.oracles import ptx
from tests.oracles.ptx.language import Instruction

# What does not fit is refused, as by Triton's own launcher.
INTEGERS = {"i32": "i4", "u32": "u4", "i64": "i8", "u64": "u8"}
# What was compiled, until the process ends.
CACHE = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Launched:
    """What Triton's launcher was given; `variant` names what was compiled."""

    kernel: str
    variant: str
    code: list[Instruction]
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


def flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Those in tuples one by one, as Triton passes them on."""
    for x in arguments:
        yield from flat(x) if isinstance(x, tuple) else (x,)


class GPU:
    """Passes for Triton's driver of it, and keeps what was launched."""

    def __init__(self, target: Target):
        self.target = target
        self.launched: list[Launched] = []
        self.get_current_device = self.get_current_stream = lambda *device: 0
        self.get_current_target = lambda: target.triton
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": target.shared},
            load_binary=lambda name, binary, *_: (None, ptx.parse(binary.decode()), 0, 0, 1024),
            unload_module=lambda *module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any):
        def run(
            x: int, y: int, z: int, stream: int, kernel: ptx.Kernel, packed: Any, launched: Any, enter: Any, leave: Any,
            *arguments: Any,
        ) -> None:  # fmt: skip
            kinds = flat(source.signature.values())
            pairs = [x for x in zip(flat(arguments), kinds, strict=True) if x[1] != "constexpr"]
            passed = [np.array(x, INTEGERS[kind]) if kind in INTEGERS else x for x, kind in pairs]
            self.launched.append(Launched(metadata.name, metadata.hash, kernel.code, (x, y, z), arguments))
            ptx.launch(kernel, (x, y, z), metadata.shared, passed)

        return run


def forget_launches() -> None:
    """Has launches prepared anew."""
    for cache in (prepare.prepare_forward, prepare.prepare_backward):
        cache.cache_clear()


@contextmanager
def pretended(target: Target) -> Iterator[GPU]:
    """The Triton backend takes the CPU's tensors for this GPU's."""
    gpu, previous = GPU(target), driver._active
    with (
        # The driver takes PTX for its binary.
        mock.patch.object(CUDABackend, "make_cubin", lambda self, source, *_: source.encode()),
        mock.patch.object(schedule, "architecture_of", return_value=target.architecture),
        mock.patch.object(support, "why_not", return_value=None),
        triton.knobs.cache.scope(),
    ):
        triton.knobs.cache.dir = CACHE.name
        driver.set_active(gpu)
        forget_launches()
        try:
            yield gpu
        finally:
            driver.set_active(previous)
            forget_launches()
            for kernel in vars(prepare).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
