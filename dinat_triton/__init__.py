"""Dilated neighborhood attention with its relative positional bias, without a CUDA build."""

import warnings
from importlib import import_module
from types import ModuleType

from dinat_triton import flops  # noqa: F401  (registers what the ops count as)
from dinat_triton.dispatch import use_backend
from dinat_triton.functional import na1d, na2d, na3d
from dinat_triton.geometry import Geometry
from dinat_triton.merging import merge
from dinat_triton.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from dinat_triton.plan import Plan
from dinat_triton.version import __version__

try:
    from dinat_triton.models import dinat, dinat_s, isotropic  # noqa: F401  (registers the models in timm)
except ImportError as error:
    # Attention itself needs torch alone, and machines for measuring kernels often have no timm, or an old one.
    warnings.warn(f"the models are not registered: they need timm >= 1.0.31 ({error})", stacklevel=2)


def __getattr__(name: str) -> ModuleType:
    """Sharded maps; torch.distributed is imported only when they are asked for."""
    if name == "distributed":
        return import_module("dinat_triton.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Geometry",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Plan",
    "__version__",
    "merge",
    "na1d",
    "na2d",
    "na3d",
    "use_backend",
]
