"""What launches keep from call to call, with Triton's compiler and a GPU's driver that only takes note."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dinat_triton.geometry import Geometry
from dinat_triton.kernels import launch, prepare

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

# One pass over closed tiles, and several passes that read the bias from tables.
CLOSED, OPEN = Geometry((6, 6), (3,), (2,)), Geometry((1, 160), (1, 129))
FOLDS = ["sum_programs", "fold_bias"]
KERNELS = {
    CLOSED: ["forward", "closed_backward", *FOLDS],
    OPEN: ["table", "forward", "table", "query_backward", "query_backward", "table", "key_backward", *FOLDS],
}


class Driver:
    """Passes for the driver of an sm_90 whose memory is the CPU's, and keeps what kernels are launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        loaded = (None, None, 32, 0, 1024)
        properties = {"max_shared_mem": 227 << 10}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *binary: loaded,
            unload_module=lambda *module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any):
        def run(x: int, y: int, z: int, stream: int, function: None, packed: tuple, *hooks_and_arguments: Any) -> None:
            self.launched.append((metadata.name, (x, y, z), metadata.hash, hooks_and_arguments[3:]))

        return run

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The CPU's problems are compiled, not interpreted."""
    problem_of = prepare.problem_of
    monkeypatch.setattr(prepare, "problem_of", lru_cache(lambda *sizes: replace(problem_of(*sizes), precision="ieee")))
    previous = driver._active
    fake = Driver()
    driver.set_active(fake)
    prepare.forget()
    kernels = [k for k in vars(prepare).values() if isinstance(k, JITFunction)]
    try:
        yield fake
    finally:
        driver.set_active(previous)
        prepare.forget()
        for kernel in kernels:
            kernel.device_caches.clear()


def step(geometry: Geometry, dropout_p: float = 0.0, shift: int = 0) -> None:
    """A training step's launches, on queries that begin `shift` numbers behind an aligned address."""
    shape = (2, *geometry.shape, 2, 16)
    query = torch.zeros(torch.Size(shape).numel() + shift, dtype=torch.bfloat16)[shift:].view(shape)
    key, value, grad_out = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3))
    rpb = torch.zeros(2, *geometry.bias_shape, dtype=torch.bfloat16)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    qkv = [query, key, value]
    out, lse = launch.forward(qkv, rpb, seed, geometry, 0.25, dropout_p, True)
    grads = [torch.empty_like(x) for x in qkv]
    launch.backward(qkv, rpb, seed, out, lse, grad_out, None, geometry, 0.25, dropout_p, grads)


def plain(arguments: tuple) -> list:
    return [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in arguments]


def searched(run: Any) -> int:
    """How often Triton looked for a variant."""
    original = JITFunction.run
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=original) as looked:
        run()
    return looked.call_count


@pytest.mark.parametrize("geometry", KERNELS)
def test_a_launch_gives_its_kernel_what_triton_would(gpu: Driver, geometry: Geometry) -> None:
    assert searched(lambda: step(geometry)) == len(KERNELS[geometry])
    assert [name.removesuffix("_kernel") for name, *_ in gpu.launched] == KERNELS[geometry]
    by_triton, gpu.launched = gpu.launched, []
    assert searched(lambda: step(geometry)) == 0
    for theirs, ours in zip(by_triton, gpu.launched, strict=True):
        assert theirs[:3] == ours[:3]
        assert plain(theirs[3]) == plain(ours[3])


def test_a_launch_searches_again_for_what_triton_tells_apart(gpu: Driver) -> None:
    step(CLOSED)
    variants = {x[2] for x in gpu.launched}
    gpu.launched = []
    # The forward and the backward read the shifted query, the sums of the bias gradient do not.
    assert searched(lambda: step(CLOSED, shift=1)) == 2
    assert len({x[2] for x in gpu.launched} - variants) == 2
    assert searched(lambda: step(CLOSED)) == 0
    step(CLOSED, dropout_p=0.5)
    for dropout_p in (0.1, 2**-32, 2**-28):  # of which Triton could take some for constants or aligned
        assert searched(lambda p=dropout_p: step(CLOSED, dropout_p=p)) == 0


def test_tokens_that_lie_unevenly_are_copied() -> None:
    shape = torch.Size((2, 4, 6, 3, 8))
    assert prepare.strides_of((shape, (576, 144, 24, 8, 1))) == (576, 24, 8)
    assert prepare.strides_of((shape, (3456, 432, 72, 8, 1))) == (3456, 72, 8)  # a part of packed tokens
    for stride in ((1152, 288, 24, 8, 1), (576, 144, 24, 1, 3)):
        with pytest.raises(ValueError, match=r"tokens must lie evenly in memory, got shape \(2, 4, 6, 3, 8\)"):
            prepare.strides_of((shape, stride))
    assert launch._even(torch.zeros(2, 8, 6, 3, 8)[:, ::2]).is_contiguous()
    assert launch._even(x := torch.zeros(2, 4, 6, 3, 3, 8)[..., 1, :, :]) is x
