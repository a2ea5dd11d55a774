"""How query, key and value travel: as three tensors, or as one that packs them before its heads axis."""

from torch import Tensor


def unpack(qkv: list[Tensor]) -> list[Tensor]:
    """Query, key and value, each `[batch, *shape, heads, dim]`."""
    return qkv if len(qkv) == 3 else list(qkv[0].unbind(-3))
