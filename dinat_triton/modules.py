"""Neighborhood attention as modules: a packed qkv projection, the attention, an output projection."""

import torch
from torch import Tensor, nn

from dinat_triton import functional
from dinat_triton.checks import check_key_mask
from dinat_triton.functional import Bools, Borders, Ints, window_of
from dinat_triton.geometry import SHIFT, borders_of, geometry_of, split_window
from dinat_triton.map_batch import check_sizes, crop_map, has_sizes, join_maps, pad_map, split_maps
from dinat_triton.padding import crop_like, pad_to_span

# FX takes these as leaves, as it does what follows.
torch.fx.wrap("pad_to_span")
torch.fx.wrap("crop_like")


@torch.fx.wrap
def split_heads(qkv: Tensor, sizes: list[int]) -> Tensor:
    """Packed channels as `[..., 3, heads, dim]`; refuses too few, which are not those of fewer heads."""
    if qkv.shape[-1] != sizes[0] * sizes[1] * sizes[2]:
        raise ValueError(
            f"qkv must have 3 * {sizes[1]} heads * {sizes[2]} channels, got {qkv.shape[-1]}; "
            f"dinat_triton.parallel.HeadwiseParallel splits them over processes, ColwiseParallel cannot"
        )
    return qkv.unflatten(-1, sizes)


@torch.fx.wrap
def pad_mask(key_mask: Tensor | None, x: Tensor, span: list[int]) -> Tensor | None:
    """A key mask padded with its map; the zeros that are added to a map may be seen, with a mask as without."""
    if key_mask is None:
        return None
    if not torch.jit.is_scripting():
        check_key_mask(key_mask, x.shape[:-1], x.device)
    return pad_to_span((~key_mask).unsqueeze(-1).float(), span, 1).squeeze(-1) == 0


@torch.fx.wrap
def attend_packed(
    qkv: Tensor,
    window: list[int],
    rpb: Tensor | None,
    scale: float | None,
    dropout_p: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attends on a packed `[batch, *shape, 3, heads, dim]`."""
    if torch.jit.is_scripting():
        return torch.ops.dinat_triton.na([qkv], window, rpb, scale, dropout_p, False, None, None, key_mask)[0]
    else:
        if rpb is not None and hasattr(rpb, "to_local"):  # a DTensor: its local heads are those of qkv
            rpb = rpb.to_local()
        return functional.call_na([qkv], window, rpb, scale, dropout_p, False, None, None, key_mask)[0]


class NeighborhoodAttentionND(nn.Module):
    """Multi-head neighborhood attention on `[batch, *shape, embed_dim]`.

    A map smaller than `kernel_size * dilation` is padded with zeros at its end before the projection, attended to as a
    whole, and cropped again; published DiNAT models do the same. Axes that clip or wrap are never padded: a clipped
    window may be larger than the map, and a circle has no end to pad at.

    Args:
        embed_dim: Channels in and out.
        num_heads: Heads; must divide `embed_dim`.
        kernel_size: Keys in a window along each axis.
        stride: Queries that share one window.
        dilation: Distance between neighboring keys of a window.
        is_causal: Whether a query sees only keys at or before its own position on that axis.
        border: "shift", "clip" or "wrap", as `dinat_triton.na2d` explains.
        rel_pos_bias: Whether to learn a relative positional bias, `rpb`.
        qkv_bias: Whether the packed projection has a bias.
        qk_scale: Of the dot products; `(embed_dim // num_heads) ** -0.5` by default.
        attn_drop: Dropout of the attention probabilities, in training.
        proj_drop: Dropout of the output, in training.
    """

    rank: int
    rpb: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Ints = 7,
        *,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        border: Borders = SHIFT,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        if not 0.0 <= attn_drop < 1.0:
            raise ValueError(f"attn_drop must be at least 0 and below 1, got {attn_drop}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv_sizes = [3, num_heads, self.head_dim]
        self.window = window_of(self.rank, kernel_size, stride, dilation, is_causal, border)
        kernels, _, dilations, _, borders = split_window(self.window)
        spans = tuple(k * d for k, d in zip(kernels, dilations, strict=True))
        geometry_of(spans, tuple(self.window))  # says now what is wrong with the window
        self.span = [n if b == SHIFT else 1 for n, b in zip(spans, borders_of(borders), strict=True)]  # to pad to

        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        bias_shape = (num_heads, *(2 * k - 1 for k in kernels))
        rpb = nn.Parameter(torch.empty(bias_shape, device=device, dtype=dtype)) if rel_pos_bias else None
        self.register_parameter("rpb", rpb)
        self.attn_drop = nn.Dropout(attn_drop)  # applied by the attention, which asks for its probability
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        if rpb is not None:
            nn.init.trunc_normal_(rpb, std=0.02)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, sizes: list[list[int]] | None = None) -> Tensor:
        """Attends on `[batch, *shape, embed_dim]`, or on maps of different sizes.

        Args:
            x: The maps.
            key_mask: `[batch, *shape]`, True where the key may be seen.
            sizes: One shape per map. Each lies in the top left corner of its batch item, or, if x is
                `[tokens of all maps, embed_dim]`, after the one before; it gets what it would get alone.
        """
        if torch.jit.is_scripting():
            assert sizes is None, "sizes must be None in TorchScript"
        elif has_sizes(sizes):
            if key_mask is not None:
                raise ValueError("key_mask must be None for maps of different sizes, whose padding is never seen")
            return self.attend_maps(x, sizes)
        padded = pad_to_span(x, self.span, self.embed_dim)
        qkv = split_heads(self.qkv(padded), self.qkv_sizes)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        out = attend_packed(qkv, self.window, self.rpb, self.scale, dropout_p, pad_mask(key_mask, x, self.span))
        return self.proj_drop(self.proj(crop_like(out.flatten(-2), x)))

    def attend_maps(self, x: Tensor, sizes: list[list[int]]) -> Tensor:
        """Attends on maps of different sizes. Only their own tokens are projected."""
        if x.ndim not in (2, self.rank + 2) or x.shape[-1] != self.embed_dim:
            form = f"[batch, {self.rank} map axes, {self.embed_dim} channels]"
            raise ValueError(f"x must be {form} or [tokens of all maps, channels], got shape {tuple(x.shape)}")
        own = check_sizes(x.shape[:-1], sizes, self.rank)
        spans = [tuple(map(max, size, self.span)) for size in own]
        packed = x.ndim == 2
        maps = [pad_map(m, span) for m, span in zip(split_maps(x, own, packed), spans, strict=True)]
        qkv = split_heads(self.qkv(join_maps(maps, self.rank)), self.qkv_sizes)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        flat = [n for span in spans for n in span]
        out = functional.call_na([qkv], self.window, self.rpb, self.scale, dropout_p, False, None, flat)[0]
        maps = [crop_map(m, size) for m, size in zip(split_maps(out.flatten(-2), spans, True), own, strict=True)]
        out = self.proj_drop(self.proj(join_maps(maps, self.rank)))
        return out if packed else join_maps(split_maps(out, own, True), self.rank, x.shape[1:-1])

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "dilation", "is_causal")
        *numbers, borders = split_window(self.window)
        window = ", ".join(f"{name}={value}" for name, value in zip(names, numbers, strict=True))
        return f"num_heads={self.num_heads}, {window}, border={borders_of(borders)}"


class NeighborhoodAttention1D(NeighborhoodAttentionND):
    rank = 1
    __doc__ = NeighborhoodAttentionND.__doc__


class NeighborhoodAttention2D(NeighborhoodAttentionND):
    rank = 2
    __doc__ = NeighborhoodAttentionND.__doc__


class NeighborhoodAttention3D(NeighborhoodAttentionND):
    rank = 3
    __doc__ = NeighborhoodAttentionND.__doc__
