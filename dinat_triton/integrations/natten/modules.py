"""NATTEN's modules, with the attributes that their users read. These are of no line (see `arguments`)."""

from __future__ import annotations

import warnings
from typing import Any

from dinat_triton import modules
from dinat_triton.integrations.natten.arguments import MODULE, check_window, named


class Module(modules.NeighborhoodAttentionND):
    """NATTEN's constructor in front of ours. A map smaller than the window is padded, as NATTEN did until 0.15."""

    line: str | None = None

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        name = type(self).__name__
        given = dict(zip(("embed_dim", "num_heads", "kernel_size"), positional, strict=False))
        given |= named(name, positional[3:], keywords, MODULE, self.line)
        self._decide_bias(name, given)
        if "dim" in given:  # as it was called before 0.20
            given["embed_dim"] = given.pop("dim")
        window = [given.pop(argument, None) for argument in ("kernel_size", "stride", "dilation", "is_causal")]
        kernel_size, stride, dilation, is_causal = check_window(self.rank, *window, self.line)  # type: ignore[call-arg]
        super().__init__(kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, **given)
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.window_size = tuple(self.span)
        self.attn_drop_rate = self.attn_drop.p

    def _decide_bias(self, name: str, given: dict[str, Any]) -> None:
        """Calls what was `bias` until 0.15 by its later name, and says where it matters that nobody knows the line."""
        if self.line in ("0.14", None) and "bias" in given:
            given["rel_pos_bias"] = given.pop("bias")
        elif self.line == "0.14":
            given["rel_pos_bias"] = True
        elif self.line is None and given.keys() & {"dim", "attn_drop"} and "rel_pos_bias" not in given:
            warnings.warn(
                f"{name} has no relative positional bias here, as in NATTEN 0.17; until 0.15 it had one by default: "
                f"pass rel_pos_bias, or use dinat_triton.integrations.natten_0_14 or install(version='0.14.6')",
                stacklevel=4,
            )


class NeighborhoodAttention1D(Module, modules.NeighborhoodAttention1D):
    """`natten.NeighborhoodAttention1D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""


class NeighborhoodAttention2D(Module, modules.NeighborhoodAttention2D):
    """`natten.NeighborhoodAttention2D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""


class NeighborhoodAttention3D(Module, modules.NeighborhoodAttention3D):
    """`natten.NeighborhoodAttention3D`, with `rel_pos_bias` and `attn_drop` as 0.17 had them."""
