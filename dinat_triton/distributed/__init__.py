"""Maps that are sharded over several processes, on torch's DTensor."""

from importlib import import_module
from typing import Any

from dinat_triton.distributed.costs import CommunicationCost, cost

__all__ = ["CommunicationCost", "cost", "shard_map"]


def __getattr__(name: str) -> Any:
    """`shard_map`, which needs timm; the attention does not."""
    if name == "shard_map":
        return import_module("dinat_triton.distributed.models").shard_map
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
