"""Tensor parallelism: the heads of an attention module spread over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dinat_triton.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

MODULES = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


class HeadwiseParallel(ParallelStyle):
    """A style for `parallelize_module`: every process of the mesh computes its share of an attention module's heads.

    Input and output are whole in every process, as with `ColwiseParallel` followed by `RowwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MODULES):
            raise TypeError(f"HeadwiseParallel splits NeighborhoodAttention modules, got {type(module).__name__}")
        if torch.__version__ < "2.14":  # its Linear cannot take weights whose parts are sharded each
            raise RuntimeError(f"HeadwiseParallel needs torch 2.14 or later, got {torch.__version__}")
        parts, heads, dim = module.qkv_sizes
        if heads % device_mesh.size() != 0:
            raise ValueError(f"the mesh's {device_mesh.size()} processes must divide the module's {heads} heads")
        module.qkv_sizes = [parts, heads // device_mesh.size(), dim]
        for style, layer in ((_PackedColwise(parts), module.qkv), (RowwiseParallel(), module.proj)):
            style.src_data_rank = self.src_data_rank
            style._apply(layer, device_mesh)
        if module.rpb is not None:
            module.rpb = _sharded(module.rpb, device_mesh, Shard(0), self.src_data_rank)
        return module


class _PackedColwise(ColwiseParallel):
    """`ColwiseParallel` that gives every process its share of each of the parts that a layer's channels pack."""

    def __init__(self, parts: int):
        super().__init__(output_layouts=_StridedShard(-1, split_factor=parts))
        self.parts = parts

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        placement = _StridedShard(0, split_factor=self.parts)
        for key, parameter in module.named_parameters():
            module.register_parameter(key, _sharded(parameter, device_mesh, placement, self.src_data_rank))


def _sharded(parameter: Tensor, mesh: DeviceMesh, placement: Placement, source: int | None) -> nn.Parameter:
    sharded = distribute_tensor(parameter, mesh, [placement], src_data_rank=source)
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)
