"""Maps that are sharded over several processes, on torch's DTensor."""

from dinat_triton.distributed.costs import Cost, cost

__all__ = ["Cost", "cost"]
