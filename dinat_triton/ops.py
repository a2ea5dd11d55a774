"""The public op, `dinat_triton::na`: checks its input and picks a backend. Knows torch only.

It is transparent to autograd: the reference runs in the open, so that it can be differentiated any way torch can. The
other backends sit behind `dinat_triton::fused`, opaque to the compiler. Arguments are those of `fused.py`, but for the
key mask, which stands alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinat_triton import dropout, reference, tile_form
from dinat_triton.checks import check_dropout, check_key_mask, check_rpb, check_scale, check_tensors
from dinat_triton.dispatch import resolve
from dinat_triton.fused import LIBRARY, by_map, fused_attention, is_autocast_on, map_batch_in, maps_in
from dinat_triton.geometry import Geometry, borders_of, check_fits, geometry_of, rank_of, split_window
from dinat_triton.packing import hide_keys, split_mask, unpack

LIBRARY.define(
    "na(Tensor[] qkv, int[] window, Tensor? rpb=None, float? scale=None, float dropout_p=0.0, bool return_lse=False, "
    "str? backend=None, int[]? sizes=None, Tensor? key_mask=None) -> (Tensor, Tensor)"
)


def _check_window(qkv: list[Tensor], window: list[int], sizes: list[int] | None) -> Geometry:
    """The geometry of a call.

    Of maps of different sizes, and in a graph for maps of all sizes, one of these, because all have the same bias.
    """
    if sizes is not None:
        return map_batch_in(qkv, window, sizes).geometries[0]
    shape = qkv[0].shape[1 : 1 + rank_of(window)]
    if torch.SymInt not in map(type, shape):
        return geometry_of(shape, tuple(window))
    kernel_size, _, dilation, _, border = split_window(window)
    check_fits(shape, kernel_size, dilation, borders_of(border))
    return geometry_of(tuple(k * d for k, d in zip(kernel_size, dilation, strict=True)), tuple(window))


def na(
    qkv: list[Tensor],
    window: list[int],
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    sizes: list[int] | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if is_autocast_on(device := qkv[0].device.type):
        low = torch.get_autocast_dtype(device)
        qkv = [x if x.dtype == torch.float64 else x.to(low) for x in qkv]
        with torch.autocast(device, enabled=False):  # it must not round what is computed from these
            return na(qkv, window, rpb, scale, dropout_p, return_lse, backend, sizes, key_mask)
    query, key, value = unpack(qkv)
    check_tensors(query, key, value)
    check_scale(scale)
    check_dropout(dropout_p)
    try:
        geometry = _check_window(qkv, window, sizes)
    except ValueError as error:
        if sizes is not None:
            raise
        read = "[batch, *map, heads, dim]"
        raise ValueError(f"{error}. Tensors are {read}, and query has shape {tuple(query.shape)}") from None
    if rpb is not None:
        check_rpb(rpb, query, geometry)
    if key_mask is not None:
        check_key_mask(key_mask, query.shape[:-2], query.device)
    if type(query) is not Tensor and torch.onnx.is_in_onnx_export():
        return opened(qkv, window, rpb, scale, dropout_p, sizes=sizes, key_mask=key_mask)
    backend = resolve(backend, query, key, value, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = dropout.new_seed(query.device) if dropout_p > 0 else None
    qkv = _with_mask(qkv, key_mask, backend)
    if backend == "reference":

        def of_one(qkv, geometry, seed):
            query, key, value = unpack(qkv)
            key_mask = split_mask(qkv)[1]
            return reference.attention(query, key, value, rpb, seed, geometry, scale, dropout_p, key_mask)

        return by_map(of_one, qkv, seed, maps_in(qkv, window, sizes))
    # Triton's backward reads the log-sum-exp; writing it costs next to nothing. The tiled backward recomputes it.
    need_lse = return_lse or backend == "triton"
    return fused_attention(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)


def opened(
    qkv: list[Tensor],
    window: list[int],
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    sizes: list[int] | None = None,
    key_mask: Tensor | None = None,
    may_hide: bool = True,
) -> tuple[Tensor, Tensor]:
    """The op `na` as a graph of plain torch operations, for exporters: nothing of this package is left in it."""
    if dropout_p > 0:
        raise ValueError(f"dropout_p must be 0 in a model that is exported, got {dropout_p}: call its eval() first")
    if torch.__version__ < "2.14":  # it would lose the tensors that are made here
        raise RuntimeError(f"an export needs torch 2.14 or later, got {torch.__version__}")
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale

    def of_one(qkv, geometry, seed):
        return tile_form.attention(qkv, rpb, geometry, scale, may_hide)

    return by_map(of_one, _with_mask(qkv, key_mask), None, maps_in(qkv, window, sizes))


def _with_mask(qkv: list[Tensor], key_mask: Tensor | None, backend: str | None = None) -> list[Tensor]:
    """The tensors with the mask behind them. Triton's kernels skip hidden keys and values; others read zeros there."""
    if key_mask is None:
        return qkv
    return [*(qkv if backend == "triton" else hide_keys(qkv, key_mask)), key_mask]


LIBRARY.impl("na", na, "CompositeImplicitAutograd")
