"""Maps of where the tokens of a model attend: inputs of its attention layers, and the probabilities of one query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinat_triton.geometry import Geometry, geometry_of, split_window
from dinat_triton.modules import NeighborhoodAttentionND
from dinat_triton.padding import pad_to_span


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention layer of a model and what entered it, `[batch, *shape, channels]`."""

    name: str
    module: NeighborhoodAttentionND
    x: Tensor

    @property
    def geometry(self) -> Geometry:
        """Geometry of the padded map that the layer attends on."""
        shape = tuple(max(n, s) for n, s in zip(self.x.shape[1:-1], self.module.span, strict=True))
        return geometry_of(shape, tuple(self.module.window))

    @property
    def title(self) -> str:
        """The stage and block in the layer's name, and its window."""
        kernels, _, dilations, *_ = split_window(self.module.window)
        numbers = [part for part in self.name.split(".") if part.isdigit()]
        where = ("stage {}, block {}" if len(numbers) == 2 else "layer {}").format(*(int(n) + 1 for n in numbers))
        return f"{where if numbers else self.name}: kernel {kernels[0]}, dilation {dilations[0]}"

    @torch.no_grad()
    def attention(self, query: Sequence[int]) -> Tensor:
        """Probabilities of the query at a position, `[batch, heads, *shape]`. What falls on padding is cropped away."""
        geometry, module = self.geometry, self.module
        q, k, _ = (
            module.qkv(pad_to_span(self.x, module.span, module.embed_dim)).unflatten(-1, module.qkv_sizes).unbind(-3)
        )
        keys = geometry.keys_of(query)
        token = geometry.token_at(query)
        q, k = q.flatten(1, -3)[:, token], k.flatten(1, -3)[:, torch.as_tensor(keys)]
        logits = module.scale * torch.einsum("bhd,bmhd->bhm", q, k)
        if module.rpb is not None:
            tokens, offsets = geometry.neighbors()
            logits = logits + module.rpb.flatten(1)[:, torch.as_tensor(offsets[token][tokens[token] >= 0])]
        scores = logits.new_zeros(*logits.shape[:2], geometry.num_tokens)
        scores[..., torch.as_tensor(keys)] = logits.softmax(-1)
        return scores.unflatten(-1, geometry.shape)[(..., *(slice(n) for n in self.x.shape[1:-1]))]


@torch.no_grad()
def attention_layers(model: nn.Module, images: Tensor) -> list[AttentionLayer]:
    """Runs a model once and returns its neighborhood attention layers in the order they ran."""
    layers: list[AttentionLayer] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: layers.append(AttentionLayer(name, module, args[0]))
        )
        for name, module in model.named_modules()
        if isinstance(module, NeighborhoodAttentionND)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no NeighborhoodAttention layers")
    return layers


def token_at(fraction: Sequence[float], shape: Sequence[int]) -> tuple[int, ...]:
    """The token of a map under a point of the picture, given as a fraction of each side."""
    if not all(0 <= f < 1 for f in fraction):
        raise ValueError(f"a point must be fractions of the picture's sides, at least 0 and below 1, got {fraction}")
    return tuple(int(f * n) for f, n in zip(fraction, shape, strict=True))


def sample_image(size: int = 224) -> Tensor:
    """A picture to look at when there is none: sky, sun, hill and fence, `[3, size, size]` between 0 and 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")

    def colour(red: float, green: float, blue: float) -> Tensor:
        return torch.tensor([red, green, blue]).view(3, 1, 1)

    image = colour(0.45, 0.65, 0.9) + 0.35 * y
    image = torch.where((x - 0.72) ** 2 + (y - 0.25) ** 2 < 0.12**2, colour(1.0, 0.9, 0.45), image)
    hill = y > 0.62 - 0.18 * torch.sin(3.5 * x + 0.4)
    image = torch.where(hill, colour(0.25, 0.5, 0.22) + 0.2 * (1 - y), image)
    fence = hill & ((x * 14 % 1 < 0.25) & (y > 0.68) & (y < 0.86) | ((y - 0.74).abs() < 0.012))
    return torch.where(fence, colour(0.93, 0.9, 0.84), image).clamp(0, 1)
