"""NATTEN's names on this package, for code whose import line may change; `install` is for code whose may not.

| NATTEN                                                        | here                                                |
|---------------------------------------------------------------|-----------------------------------------------------|
| `na1d`, `na2d`, `na3d` (0.17 to 0.21)                         | the same, with `rpb` as 0.17 had it                 |
| `NeighborhoodAttention1D`, `2D`, `3D` (0.17 to 0.21)          | the same state dict; small maps are padded          |
| `attention`, `merge_attentions`                               | the same, with exact gradients                      |
| `na1d_qk`, `na1d_av`, ... `na3d_av`, `natten*dqkrpb`, ...     | the same; they hold the scores and nothing else     |
| switches and probes of `natten.context`                       | kept as told, without effect                        |
| `functional`, `context`, `flops`, `types`, `utils`, ...       | modules of this one                                 |
| arguments that choose NATTEN's kernels and their tiles        | accepted without effect                             |
| `backend`                                                     | one of ours chooses, one of NATTEN's has no effect  |

In 0.17 the argument after `kernel_size` is the dilation, since 0.20 it is the stride. Where a call does not tell which
is meant, it is refused rather than guessed; `natten_0_14`, `natten_0_17` and `natten_0_20` beside this have the names
of one version each.
"""

from typing import Any

from dinat_triton.integrations.natten import context
from dinat_triton.integrations.natten.functional import (
    attention,
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
    neighborhood_attention_generic,
)
from dinat_triton.integrations.natten.installation import install, uninstall
from dinat_triton.integrations.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "install",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    """Switches and probes, which NATTEN has at its top."""
    return getattr(context, name)
