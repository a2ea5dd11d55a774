"""Launches prepared once for tensors of one shape and strides; that takes longer than a small layer.

Triton compiles a kernel anew where an optional tensor is None. So what is given is a part of the caches' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction

from dinat_triton.geometry import Geometry
from dinat_triton.kernels.backward import (
    closed_backward_kernel,
    fold_bias_kernel,
    key_backward_kernel,
    query_backward_kernel,
    sum_programs_kernel,
)
from dinat_triton.kernels.configs import Preset, padded
from dinat_triton.kernels.forward import forward_kernel
from dinat_triton.kernels.kept import Kept
from dinat_triton.kernels.primitives import table_kernel
from dinat_triton.kernels.schedule import (
    FUSION,
    Problem,
    Schedule,
    has_closed_backward,
    problem_of,
    schedule_of,
)
from dinat_triton.map_batch import MapBatch
from dinat_triton.passes import Pass

# What Triton knows addresses to be a multiple of in bytes, and strides and channels in numbers, for wide loads.
ALIGNMENT = 16

# The largest number that addresses of tokens within a batch item can have in 32 bits.
MOST_NARROW = 2**31 - 1

# Forwards, and backwards, that are kept: about ten image sizes of a backbone. Their bytes on the device.
MOST_LAUNCHES, MOST_BYTES = 128, 32 << 20

# A tensor's shape and strides.
Place = tuple[torch.Size, tuple[int, ...]]
Argument = Tensor | int | tuple | None


class Operand(NamedTuple):
    """A tensor of tokens as the kernels address it.

    Attributes:
        shape: `[batch, *map, heads, dim]`.
        strides: From batch item, token and head to the next.
    """

    shape: torch.Size
    strides: tuple[int, int, int]


class Launch:
    """A kernel's launch, all but the tensors and numbers that change from call to call.

    Args:
        kernel: Takes tensors, then `arguments`, then numbers, then compile-time constants.
        grid: Programs along each axis.
        arguments: Index arrays, strides and sizes, in the kernel's order.
        options: The compile-time constants, and Triton's own options.
        shape: Of the float32 numbers that it works out for another launch, if that is what it is for.
        table: The launch that works out the bias table which this one reads.
    """

    def __init__(
        self, kernel: JITFunction, grid: tuple[int, ...], arguments: tuple[Argument, ...], options: dict[str, Any],
        shape: tuple[int, ...] = (), table: Launch | None = None,
    ):  # fmt: skip
        self.kernel, self.grid, self.arguments, self.options = kernel, grid, arguments, options
        self.shape, self.table = shape, table
        self._constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None, numbers: tuple[float, ...] = ()) -> None:
        """Launches the kernel.

        Triton looks for the variant to launch by every argument, which takes longer than all that is done here. Between
        the calls of one launch only alignment makes a difference, so calls with aligned tensors keep theirs.
        """
        addresses = 0
        for x in tensors:
            if x is not None:
                addresses |= x.data_ptr()
        aligned = addresses % ALIGNMENT == 0
        if self._run is not None and aligned:
            self._run(*tensors, *self.arguments, *numbers, *self._constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.arguments, *numbers, **self.options)
        if compiled is not None and aligned:
            self._run = compiled[(*self.grid, 1, 1)[:3]]


class Forward(NamedTuple):
    """The launch of a forward.

    Attributes:
        uneven: Which of query, key and value it takes contiguous copies of: no three strides lead to their tokens.
    """

    launch: Launch
    uneven: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Backward:
    """The launches of a backward: one over closed tiles, or some over tiles of queries and one over tiles of keys.

    Attributes:
        uneven: As in a forward, of query, key, value and the output's gradient.
        partials: Shape of the bias gradients that programs write: batch splits, runs * heads, pairs.
        folds: What adds them up: over the programs of a tile class, and then over the pairs of a bias entry.
    """

    uneven: tuple[int, ...]
    partials: tuple[int, ...]
    folds: tuple[Launch, Launch] | None
    closed: tuple[Launch, ...] = ()
    queries: tuple[Launch, ...] = ()
    keys: tuple[Launch, ...] = ()


def _prepare_forward(
    geometry: Geometry | MapBatch, places: tuple[Place, ...], dtype: torch.dtype, device: torch.device, tf32: bool,
    rpb_dtype: torch.dtype | None, dropout: bool, masked: bool, preset: Preset | None = None,
) -> Forward:  # fmt: skip
    """The forward's launch. `places` are those of query, key and value."""
    operands, uneven = _operands(places)
    problem = _problem(geometry, operands, dtype, device, rpb_dtype is not None, tf32, preset)
    schedule = schedule_of(problem, Pass.FORWARD)
    table = _table(problem, schedule) if rpb_dtype is not None and not schedule.one_chunk else None
    return Forward(_launch(forward_kernel, problem, schedule, operands, table, ONE_CHUNK=schedule.one_chunk), uneven)


def _prepare_backward(
    geometry: Geometry | MapBatch, places: tuple[Place, ...], dtype: torch.dtype, device: torch.device, tf32: bool,
    rpb_dtype: torch.dtype | None, has_grad_lse: bool, dropout: bool, masked: bool,
    wanted: tuple[bool, ...], preset: Preset | None = None,
) -> Backward:  # fmt: skip
    """The backward's launches.

    `places` are those of query, key and value, of the output's gradient, and of theirs. `wanted` are the gradients of
    query, key, value and bias.
    """
    operands, uneven = _operands(places)
    problem = _problem(geometry, operands, dtype, device, rpb_dtype is not None, tf32, preset)
    has_bias, wants_bias = rpb_dtype is not None, wanted[3]
    if has_closed_backward(problem):
        schedule = schedule_of(problem, Pass.CLOSED_BACKWARD)
        of_kernel = (*operands[:3], *operands[4:], operands[3])
        launches: dict[str, tuple[Launch, ...]] = {
            "closed": (_launch(closed_backward_kernel, problem, schedule, of_kernel),)
        }
    else:
        schedule = schedule_of(problem, Pass.QUERY_BACKWARD)
        launches = {"queries": tuple(_query_launches(problem, schedule, operands, has_bias, wants_bias))}
        if wanted[1] or wanted[2]:
            keys = schedule_of(problem, Pass.KEY_BACKWARD)
            launches["keys"] = (_key_launch(problem, keys, operands, has_bias),)
    programs, splits = schedule.grid
    folds = _folds(problem, schedule) if wants_bias else None
    return Backward(uneven, (splits, programs, schedule.layout.pairs), folds, **launches)


def _bytes_of(*launches: Launch) -> int:
    """Bytes of the index arrays that launches read, each once."""
    tables = [launch.table for launch in launches if launch.table is not None]
    arguments = [x for launch in (*launches, *tables) for x in launch.arguments]
    arrays = [x for of in arguments for x in (of if isinstance(of, tuple) else (of,)) if isinstance(x, Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in arrays}.values())


def _bytes_of_backward(backward: Backward) -> int:
    return _bytes_of(*backward.closed, *backward.queries, *backward.keys, *(backward.folds or ()))


prepare_forward = Kept(_prepare_forward, lambda forward: _bytes_of(forward.launch), MOST_LAUNCHES, MOST_BYTES)
prepare_backward = Kept(_prepare_backward, _bytes_of_backward, MOST_LAUNCHES, MOST_BYTES)


def _query_launches(
    problem: Problem, schedule: Schedule, operands: tuple[Operand, ...], has_bias: bool, wants_bias: bool
) -> Iterator[Launch]:
    """One for dq and the bias gradient, or one for each where the columns of a tile take several chunks."""
    q, k, v, grad_out, grad_q, _, _ = operands
    for grad_query, grad_bias in _query_passes(schedule, wants_bias):
        all_chunks = grad_query and not schedule.one_chunk
        table = _table(problem, schedule) if all_chunks and has_bias else None
        form = {"ALL_CHUNKS": all_chunks, "GRAD_QUERY": grad_query, "GRAD_BIAS": grad_bias}
        column_splits = 1 if grad_query else schedule.layout.max_chunks
        yield _launch(
            query_backward_kernel, problem, schedule, (q, k, v, grad_q, grad_out), table, column_splits, **form
        )


def _key_launch(problem: Problem, schedule: Schedule, operands: tuple[Operand, ...], has_bias: bool) -> Launch:
    q, k, v, grad_out, _, grad_k, grad_v = operands
    table = _table(problem, schedule) if has_bias else None
    return _launch(key_backward_kernel, problem, schedule, (q, k, v, grad_k, grad_v, grad_out), table)


def _query_passes(schedule: Schedule, wants_bias: bool) -> list[tuple[bool, bool]]:
    """Whether each launch of `query_backward_kernel` computes dq, and the bias gradient."""
    if not wants_bias or schedule.one_chunk:
        return [(True, wants_bias)]
    return [(True, False), (False, True)]


def _table(problem: Problem, schedule: Schedule) -> Launch:
    """Works out the bias of every pair of the plan, `[heads, pairs]`."""
    layout, rows, chunk = schedule.layout, schedule.options["ROWS"], schedule.options["CHUNK"]
    classes, pairs = len(layout.rows), len(layout.rows) * layout.pairs
    block = min(1024, rows * chunk)
    grid = (rows * chunk // block, classes * layout.max_chunks, problem.heads)
    options = {"ROWS": rows, "CHUNK": chunk, "BLOCK": block, "LONG_AXIS": layout.has_long_axis} | FUSION
    arrays = (layout.rows, layout.columns, *layout.codes)
    arguments: tuple[Argument, ...] = (*arrays, problem.geometry.num_offsets, layout.max_chunks)
    return Launch(table_kernel, grid, arguments, options, shape=(problem.heads, pairs))


def _folds(problem: Problem, schedule: Schedule) -> tuple[Launch, Launch]:
    """Add up bias gradients, of programs to those of each tile class's pairs, and of pairs to those of bias entries."""
    layout, heads = schedule.layout, problem.heads
    (programs, splits), classes, pairs = schedule.grid, len(layout.rows), layout.pairs
    offsets = problem.geometry.num_offsets
    first: tuple[Argument, ...] = (layout.first_run, programs, splits, heads, pairs)
    span = layout.columns.shape[2]
    then: tuple[Argument, ...] = (layout.rows, layout.columns, *layout.codes, *layout.entries, classes, offsets, span)
    options = {"BLOCK": 256, "STEP": 16} | FUSION
    grid = (pairs // 256, classes, heads)
    over_programs = Launch(sum_programs_kernel, grid, first, options, shape=(heads, classes, pairs))
    block = min(1024, padded(classes * layout.row_slots))
    options = {"ROWS": layout.row_slots, "BLOCK": block, "LONG_AXIS": layout.has_long_axis} | FUSION
    return over_programs, Launch(fold_bias_kernel, (offsets, heads), then, options)


def _launch(
    kernel: JITFunction,
    problem: Problem,
    schedule: Schedule,
    operands: tuple[Operand, ...],
    table: Launch | None = None,
    column_splits: int = 1,
    **form: bool,
) -> Launch:
    """The launch of one of the kernels that attend, on these tensors of tokens, in one of its forms."""
    layout = schedule.layout
    known: dict[str, Argument] = {
        "layout": (layout.runs, layout.bases, layout.rows, layout.columns),
        "codes": layout.codes or None,
        "strides": tuple(operand.strides for operand in operands),
        "batch": problem.batch,
        "batch_step": schedule.batch_step,
        "tokens": problem.geometry.num_tokens,
        "heads": problem.heads,
        "group": problem.heads // problem.kv_heads,
        "bias_head": problem.geometry.num_offsets if table is None else table.shape[1],
        "max_chunks": layout.max_chunks,
    }
    arguments = tuple(known[name] for name in kernel.arg_names if name in known)
    return Launch(kernel, (*schedule.grid, column_splits), arguments, form | schedule.options, table=table)


def _problem(
    geometry: Geometry | MapBatch, operands: tuple[Operand, ...], dtype: torch.dtype, device: torch.device,
    biased: bool, tf32: bool, preset: Preset | None,
) -> Problem:  # fmt: skip
    """The problem of these tensors, the first of which are query, key and value."""
    query, key, value = (operand.shape for operand in operands[:3])
    apart = max(*(operand.strides[1] for operand in operands), query[-2] * value[-1])
    wide = geometry.num_tokens * apart > MOST_NARROW
    sizes = (query[0], query[-2], key[-2], query[-1], value[-1])
    return problem_of(geometry, *sizes, dtype, device, biased, tf32, wide, preset)


def _operands(places: tuple[Place, ...]) -> tuple[tuple[Operand, ...], tuple[int, ...]]:
    """The tensors in these places, and which of them have to be replaced by contiguous copies.

    Three strides must lead to all tokens, and allow wide loads.
    """
    operands, uneven = [], []
    for i, (shape, stride) in enumerate(places):
        strides = find_strides(shape, stride)
        if strides is None or any(x % ALIGNMENT for x in strides):
            uneven.append(i)
            strides = prod(shape[1:]), prod(shape[-2:]), shape[-1]
        operands.append(Operand(shape, strides))
    return tuple(operands), tuple(uneven)


def find_strides(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """From batch item, token and head to the next, 0 where there is one; None if no three lead to all channels."""
    if stride[-1] != 1 and shape[-1] != 1:
        return None
    try:
        tokens = torch.empty_strided(shape, stride, device="meta").view(shape[0], -1, *shape[-2:])
    except RuntimeError:
        return None
    batch, token, head = (0 if n == 1 else stride for n, stride in zip(tokens.shape[:3], tokens.stride(), strict=False))
    return batch, token, head
