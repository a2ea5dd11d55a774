"""`natten.flops`: operations of neighborhood attention, from shapes, and in models by fvcore (`pip install fvcore`).

As NATTEN does, windows are counted whole where causality cuts them short, and biases and softmax are not counted.
fvcore counts a multiplication and an addition as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from dinat_triton.geometry import broadcast_ints, rank_of

Ints = Sequence[int]

__all__ = [
    *("add_natten_handle", "fna_flop_count", "get_flops", "na_av_flop_count", "na_qk_flop_count"),
    *("av_1d_flop", "av_2d_flop", "av_3d_flop", "qk_1d_rpb_flop", "qk_2d_rpb_flop", "qk_3d_rpb_flop"),
]


def fna_flop_count(
    q_shape: Ints,
    k_shape: Ints,
    v_shape: Ints,
    kernel_size: int | Ints,
    dilation: Any = 1,
    is_causal: Any = False,
    is_heads_last: bool = True,
    return_macs: bool = False,
) -> int:
    """Operations of a fused call."""
    pairs = _pairs(q_shape, kernel_size)
    return pairs * (k_shape[-1] + v_shape[-1]) * (1 if return_macs else 2)


def na_qk_flop_count(
    q_shape: Ints,
    k_shape: Ints,
    kernel_size: int | Ints,
    dilation: Any = 1,
    is_causal: Any = False,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Operations of a call that gives scores."""
    return _pairs(q_shape, kernel_size) * k_shape[-1] * (1 if return_macs else 2)


def na_av_flop_count(
    a_shape: Ints,
    v_shape: Ints,
    kernel_size: int | Ints,
    dilation: Any = 1,
    is_causal: Any = False,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Operations of a call that weights values."""
    return _pairs(v_shape, kernel_size) * v_shape[-1] * (1 if return_macs else 2)


def _pairs(shape: Ints, kernel_size: int | Ints) -> int:
    """Pairs of a query and a key in all batch items and heads; where the heads axis lies does not matter."""
    return prod(shape[:-1]) * prod(broadcast_ints("kernel_size", kernel_size, len(shape) - 3))


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teaches fvcore's counter our operations, fused and unfused."""
    return flop_ctr.set_op_handle(
        **{
            "dinat_triton::na": _na_op,
            "dinat_triton::pairs": _pairs_op,
            "prim::PythonOp.Pairs": _pairs_function,
        }
    )


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Operations of a model on an input, as fvcore counts them."""
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    return (counter.unsupported_ops_warnings(False) if disable_warnings else counter).total()


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def qk_flop(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def av_flop(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(inputs[0])) * _shape(outputs[0])[-1]


qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = qk_flop
av_1d_flop = av_2d_flop = av_3d_flop = av_flop


def _pairs_op(inputs: list[Any], outputs: list[Any]) -> int:
    name, *tensors = inputs
    return (qk_flop if name.toIValue() == "dot" else av_flop)(tensors, outputs)


def _pairs_function(inputs: list[Any], outputs: list[Any]) -> int:
    return (qk_flop if "dot" in outputs[0].node().scalar_args() else av_flop)(inputs, outputs)


def _na_op(inputs: list[Any], outputs: list[Any]) -> int:
    """The op has a list of query, key and value, or of what packs them, and the window."""
    tensors, window = list(inputs[0].node().inputs()), [value.toIValue() for value in inputs[1].node().inputs()]
    out = _shape(outputs[0])
    rank = rank_of(window)
    is_packed = len(_shape(tensors[-1])) == rank + 4
    dim = _shape(tensors[-1] if is_packed else tensors[-2])[-1]
    return prod(out[:-1]) * prod(window[:rank]) * (dim + out[-1])
