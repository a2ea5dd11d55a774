"""One attention layer with its tensors on a device: checked and timed under one choice after the other."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dinat_triton  # noqa: F401  (registers the ops)
from dinat_triton.functional import window_of
from dinat_triton.layers import Layer
from dinat_triton.tuner.search import Rejection

# Bytes that the reference's gathered keys and values may take; the truth of a larger layer is the tiled backend's.
ROOM = {"cpu": 1 << 29, "cuda": 1 << 32}
FLOAT32_ERROR = 1e-5
# Seconds for each time that is taken.
SECONDS = 0.03


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN: what nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of each tensor's error over its own; NaN stays NaN."""
    return {
        name: (torch.linalg.vector_norm(found[name].double() - x) / torch.linalg.vector_norm(x)).item()
        for name, x in truth.items()
    }


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:200]


class LayerRun:
    """A training step's attention on a packed qkv, as in the models.

    Args:
        layer: The layer.
        dtype: Dtype of all tensors, the bias among them.
        device: Where.
        backend: The module of the backend, `tiled` or `kernels.attention`.
        given: The arguments by which the backend takes a choice.
    """

    def __init__(
        self,
        layer: Layer,
        dtype: torch.dtype,
        device: torch.device,
        backend: ModuleType,
        given: Callable[[Any], dict[str, Any]],
    ):
        self.layer, self.dtype, self.device, self.backend, self.given = layer, dtype, device, backend, given
        self.fixed = (layer.geometry, layer.dim**-0.5, 0.0)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.qkv = normal(layer.batch, *layer.shape, 3, layer.heads, layer.dim)
        self.rpb = normal(layer.heads, *layer.geometry.bias_shape) if layer.has_bias else None
        self.grad_out = normal(layer.batch, *layer.shape, layer.heads, layer.dim)
        self.wrong: dict[Hashable, str | None] = {}

    def score(self, choice: Hashable, backward: bool) -> float | Rejection:
        """Seconds of a forward or of a backward; a choice with a wrong result is rejected."""
        try:
            if choice not in self.wrong:
                self.wrong[choice] = self.check(choice)
            reason = self.wrong[choice]
            return self.seconds(choice, backward) if reason is None else Rejection(reason)
        except Exception as error:  # whatever a compiler or a driver may say of one choice, the others can be tried
            return Rejection(f"cannot run: {first_line(error)}")

    def forward(self, choice: Hashable) -> tuple[Tensor, Tensor]:
        """Output, and what the backward needs to know besides."""
        return self.backend.forward([self.qkv], self.rpb, None, *self.fixed, False, **self.given(choice))

    def backward(self, choice: Hashable, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gradients of the packed qkv and of the bias."""
        grad = torch.empty_like(self.qkv)
        inputs = ([self.qkv], self.rpb, None, *saved, self.grad_out, None, *self.fixed)
        return grad, self.backend.backward(*inputs, [grad], **self.given(choice))

    def seconds(self, choice: Hashable, backward: bool) -> float:
        """The median of warm calls; on a GPU with a cold L2."""
        call = partial(self.backward, choice, self.forward(choice)) if backward else partial(self.forward, choice)
        if self.device.type == "cuda":
            from triton.testing import do_bench

            return 1e-3 * do_bench(call, warmup=1, rep=200 * SECONDS, return_mode="median")
        call()
        times: list[float] = []
        begin = time.perf_counter()
        while not times or time.perf_counter() < begin + SECONDS:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return median(times)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Output and gradients in float64, by the reference where its copies of the keys are not too large."""
        qkv = self.qkv.double().requires_grad_()
        rpb = None if self.rpb is None else self.rpb.double().requires_grad_()
        geometry = self.layer.geometry
        keys = 2 * 8 * self.qkv[..., 0, :, :].numel() * geometry.num_pairs // geometry.num_tokens
        room = ROOM[self.device.type]
        if self.device.type == "cuda":  # forward and backward hold about four times the gathered keys and values
            room = min(room, torch.cuda.mem_get_info(self.device)[0] // 4)
        backend = "reference" if keys <= room else "tiled"
        window = window_of(geometry.rank, geometry.kernel_size, geometry.stride, geometry.dilation, False)
        out, _ = torch.ops.dinat_triton.na([qkv], window, rpb, None, 0.0, False, backend)
        leaves = [x for x in (qkv, rpb) if x is not None]
        return _named(out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.double()))

    def check(self, choice: Hashable) -> str | None:
        """Errors of the output and the gradients, or None if all are small; unwritten elements count as wrong."""
        with poisoned():
            saved = self.forward(choice)
            found = _named(saved[0], *self.backward(choice, saved))
        allowed = FLOAT32_ERROR if self.dtype == torch.float32 else 2 * torch.finfo(self.dtype).eps
        wrong = {name: error for name, error in errors(found, self.truth).items() if not error <= allowed}
        if not wrong:
            return None
        return f"wrong {', '.join(f'{k} (error {v:.1e})' for k, v in wrong.items())}; {allowed:.1e} is allowed"


def _named(out: Tensor, grad: Tensor, grad_rpb: Tensor | None = None) -> dict[str, Tensor]:
    grads = dict(zip(("dq", "dk", "dv"), grad.unbind(-3), strict=True))
    return {"out": out, **grads} | ({} if grad_rpb is None else {"drpb": grad_rpb})
