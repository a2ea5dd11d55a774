"""One attention layer with its tensors on a device: run alone, forward or backward, timed, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

import dinat_triton  # noqa: F401  (registers the ops)
from dinat_triton.bench import harness
from dinat_triton.layers import Layer

# Bytes that the reference's gathered keys and values may take; the truth of a larger layer is the tiled backend's.
ROOM = {"cpu": 1 << 29, "cuda": 1 << 32}
FLOAT32_ERROR = 1e-5


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
    """Of each tensor, the norm of its error over its own; NaN stays NaN."""
    return {
        name: (torch.linalg.vector_norm(found[name].double() - x) / torch.linalg.vector_norm(x)).item()
        for name, x in truth.items()
    }


class LayerRun:
    """A training step's attention on a packed qkv, as in the models.

    Args:
        layer: The layer.
        batch: Images.
        dtype: Of all tensors, the bias among them.
        device: Where.
        backend: The implementation, `triton` or `tiled`.
    """

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype, device: torch.device, backend: str):
        self.layer, self.batch, self.dtype, self.device, self.backend = layer, batch, dtype, device, backend
        rank = len(layer.shape)
        self.window = [*layer.kernel_size, *[1] * rank, *layer.dilation, *[0] * rank]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.qkv = normal(batch, *layer.shape, 3, layer.heads, layer.dim)
        self.rpb = normal(layer.heads, *layer.geometry.bias_shape)
        self.grad_out = normal(batch, *layer.shape, layer.heads, layer.dim)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and the log-sum-exp where the backward wants it."""
        need_lse, scale = self.backend == "triton", self.layer.dim**-0.5
        return torch.ops.dinat_triton.fused([self.qkv], self.rpb, None, self.window, scale, 0.0, need_lse, self.backend)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of the packed qkv and of the bias."""
        (grad,), grad_rpb = torch.ops.dinat_triton.fused_backward(
            [self.qkv], self.rpb, None, *self._saved, self.grad_out, None,
            self.window, self.layer.dim**-0.5, 0.0, self.backend,
        )  # fmt: skip
        return grad, grad_rpb

    @cached_property
    def _saved(self) -> tuple[Tensor, Tensor]:
        return self.forward()

    def seconds(self, backward: bool, budget: float = 0.03) -> float:
        """Of one warm call, in the median."""
        call = self.backward if backward else self.forward
        return 1e-3 * harness.measure_on(self.device, {"": call}, budget)[""].median

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Output and gradients in float64, by the reference where its copies of the keys are not too large."""
        qkv, rpb = (x.double().requires_grad_() for x in (self.qkv, self.rpb))
        keys = 2 * 8 * self.qkv[..., 0, :, :].numel() * self.layer.geometry.num_pairs // self.layer.geometry.num_tokens
        room = ROOM[self.device.type]
        if self.device.type == "cuda":  # forward and backward hold about four times the gathered keys and values
            room = min(room, torch.cuda.mem_get_info(self.device)[0] // 4)
        backend = "reference" if keys <= room else "tiled"
        out, _ = torch.ops.dinat_triton.na([qkv], self.window, rpb, None, 0.0, False, backend)
        return self._named(out.detach(), *torch.autograd.grad(out, (qkv, rpb), self.grad_out.double()))

    def _named(self, out: Tensor, grad: Tensor, grad_rpb: Tensor) -> dict[str, Tensor]:
        grads = dict(zip(("dq", "dk", "dv"), grad.unbind(-3), strict=True))
        return {"out": out, **grads, "drpb": grad_rpb}

    def check(self) -> str | None:
        """What is wrong with the output and the gradients, or None; what nobody wrote counts as wrong."""
        self.__dict__.pop("_saved", None)
        with poisoned():
            found = self._named(self._saved[0], *self.backward())
        self.__dict__.pop("_saved", None)
        allowed = FLOAT32_ERROR if self.dtype == torch.float32 else 2 * torch.finfo(self.dtype).eps
        wrong = {name: error for name, error in errors(found, self.truth).items() if not error <= allowed}
        if not wrong:
            return None
        return f"wrong {', '.join(f'{k} (error {v:.1e})' for k, v in wrong.items())}; {allowed:.1e} is allowed"
