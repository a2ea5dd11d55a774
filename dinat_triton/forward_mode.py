"""Forward-mode derivatives of `tiled`: one more pass over the same tiles, with tangents beside the tensors."""

from __future__ import annotations

from torch import Tensor

from dinat_triton.geometry import Geometry
from dinat_triton.tiled import Call, Rows


def jvp(
    qkv: list[Tensor],
    rpb: Tensor | None,
    seed: Tensor | None,
    qkv_tangents: list[Tensor],
    rpb_tangent: Tensor | None,
    geometry: Geometry,
    scale: float,
    dropout_p: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of what `tiled.forward` returns, from those of its tensors."""
    call = Call(qkv, rpb, seed, geometry, scale, dropout_p)
    along = Call(qkv_tangents, rpb_tangent, seed, geometry, scale, dropout_p)
    outs, lses = Rows(call, call.v.shape[-1], call.v.dtype), Rows(call, 1, call.dtype)
    for tiles in call.cut.classes():
        table, tangent = call.table(tiles), along.table(tiles)
        # What no row sees, and what the bias hides, stays so.
        tangent = tangent.masked_fill(tangent.isneginf(), 0)
        for group in tiles.groups():
            (q, k, v), (dq, dk, dv) = ([x.to(call.dtype) for x in each.tiles(group)] for each in (call, along))
            p = call.softmax(call.logits(q, k, call.mask(table, group)), -1)
            dlogits = call.logits(dq, k, along.fold(tangent)) + (q @ dk.mT) * scale
            dlse = (p * dlogits).sum(-1, keepdim=True)
            dp = p * (dlogits - dlse)
            outs.add((call.drop(dp, group) @ v + call.drop(p, group) @ dv).to(qkv[0].dtype), group)
            lses.add(dlse, group)
    return outs.as_map(), lses.as_map().squeeze(-1) if need_lse else dlse.new_empty(0)
