"""The fused backends behind registered ops: `fused`, its gradient and its derivative in forward mode.

The ops take query, key and value as a list: of the three, or of one tensor that packs them before its heads axis. A
packed input gets a packed gradient, with no copy in between. A key mask is the last of the list. `window` is
kernel_size, stride, dilation, is_causal and the border's place in BORDERS, each of all axes, one after the other;
`sizes`, of a batch of maps of different sizes, the axes of all maps. `wanted` tells which gradients to compute, of
query, key and value as they come and then of the bias: by default all. The others are empty.
"""

from __future__ import annotations

from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dinat_triton import forward_mode, reference, tiled, tiled_maps
from dinat_triton.geometry import Geometry, geometry_of, rank_of
from dinat_triton.map_batch import MapBatch, map_batch_of
from dinat_triton.packing import split_mask, unpack

LIBRARY = torch.library.Library("dinat_triton", "DEF")
LIBRARY.define(
    "fused(Tensor[] qkv, Tensor? rpb, Tensor? seed, int[] window, float scale, float dropout_p, bool need_lse, "
    "str backend, int[]? sizes=None) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "fused_backward(Tensor[] qkv, Tensor? rpb, Tensor? seed, Tensor? out, Tensor? lse, Tensor grad_out, "
    "Tensor? grad_lse, int[] window, float scale, float dropout_p, str backend, int[]? sizes=None, "
    "bool[]? wanted=None) -> (Tensor[], Tensor)"
)
LIBRARY.define(
    "fused_jvp(Tensor[] qkv, Tensor? rpb, Tensor? seed, Tensor[] qkv_tangents, Tensor? rpb_tangent, int[] window, "
    "float scale, float dropout_p, bool need_lse, str backend, int[]? sizes=None) -> (Tensor, Tensor)"
)

# Types of arguments that torch's dispatcher hands on as they are.
PLAIN_TENSORS = {Tensor, nn.Parameter}
PLAIN = PLAIN_TENSORS | {list, tuple, int, float, bool, str, type(None)}

FUSED, FUSED_BACKWARD = torch.ops.dinat_triton.fused.default, torch.ops.dinat_triton.fused_backward.default
FUSED_JVP = torch.ops.dinat_triton.fused_jvp.default


def maps_in(qkv: list[Tensor], window: list[int], sizes: list[int] | None) -> Geometry | MapBatch:
    """The geometry of a call, or its maps of different sizes."""
    if sizes is not None:
        return map_batch_in(qkv, window, sizes)
    return geometry_of(tuple(map(int, qkv[0].shape[1 : 1 + rank_of(window)])), tuple(window))


def map_batch_in(qkv: list[Tensor], window: list[int], sizes: list[int]) -> MapBatch:
    """The maps of a call whose sizes are given."""
    lead = qkv[0].shape[: -2 if len(qkv) >= 3 else -3]
    return map_batch_of(tuple(map(int, lead)), tuple(window), tuple(map(int, sizes)))


def is_autocast_on(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def by_map(of_one, qkv, seed, problem: Geometry | MapBatch) -> tuple[Tensor, Tensor]:
    """Applies a function of one geometry to each map."""
    if isinstance(problem, MapBatch):
        return problem.each(of_one, qkv, seed)
    return of_one(qkv, problem, seed)


def _fused(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes=None):
    if _holds_nothing(qkv[0]):
        return _fused_fake(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)
    problem = maps_in(qkv, window, sizes)
    return _module(backend, sizes is not None).forward(qkv, rpb, seed, problem, scale, dropout_p, need_lse)


def _fused_fake(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes=None):
    query, _, value = unpack(qkv)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1] if need_lse else (0,), dtype=reference.accumulator(query.dtype))
    return out, lse


def _fused_backward(
    qkv, rpb, seed, out, lse, grad_out, grad_lse, window, scale, dropout_p, backend, sizes=None, wanted=None
):
    if is_autocast_on(device := grad_out.device.type):  # the backward's, whatever was on in the forward
        with torch.autocast(device, enabled=False):
            options = (window, scale, dropout_p, backend, sizes, wanted)
            return _fused_backward(qkv, rpb, seed, out, lse, grad_out, grad_lse, *options)
    *grads, grad_rpb = _empty_grads(qkv, rpb, wanted)
    if sizes is not None:
        grads = [x.zero_() for x in grads]  # padding between maps is not written
    if _holds_nothing(qkv[0]):
        return grads, grad_rpb.zero_()
    problem, wants = maps_in(qkv, window, sizes), wanted or [True] * (len(grads) + 1)
    into = [grad if wants_grad else None for grad, wants_grad in zip(grads, wants, strict=False)]
    found = _module(backend, sizes is not None).backward(
        qkv, rpb, seed, out, lse, grad_out, grad_lse, problem, scale, dropout_p, into, wants[-1]
    )
    return grads, grad_rpb if found is None else found


def _fused_backward_fake(
    qkv, rpb, seed, out, lse, grad_out, grad_lse, window, scale, dropout_p, backend, sizes=None, wanted=None
):
    *grads, grad_rpb = _empty_grads(qkv, rpb, wanted)
    return grads, grad_rpb


def _empty_grads(qkv: list[Tensor], rpb: Tensor | None, wanted: list[bool] | None) -> list[Tensor]:
    """Room for the gradients of what travels, and of the bias; none for those that nobody wants."""
    tensors = [*split_mask(qkv)[0], rpb]
    return [
        qkv[0].new_empty(0) if x is None or not wants else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, wants in zip(tensors, wanted or [True] * len(tensors), strict=True)
    ]


def _fused_jvp(qkv, rpb, seed, qkv_tangents, rpb_tangent, window, scale, dropout_p, need_lse, backend, sizes=None):
    if backend != "tiled":
        raise RuntimeError(
            f"backend {backend!r} has no forward-mode derivatives; backend='tiled' and backend='reference' have"
        )
    if _holds_nothing(qkv[0]):
        return _fused_fake(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)

    count = len(qkv)

    def of_one(both, geometry, seed):
        qkv, tangents = both[:count], both[count:]
        return forward_mode.jvp(qkv, rpb, seed, tangents, rpb_tangent, geometry, scale, dropout_p, need_lse)

    return by_map(of_one, [*qkv, *qkv_tangents], seed, maps_in(qkv, window, sizes))


def _fused_jvp_fake(qkv, rpb, seed, qkv_tangents, rpb_tangent, window, scale, dropout_p, need_lse, backend, sizes=None):
    return _fused_fake(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)


def _holds_nothing(x: Tensor) -> bool:
    return x.is_meta or x.numel() == 0


@cache
def _module(backend: str, has_sizes: bool) -> ModuleType:
    if backend == "tiled":
        return tiled_maps if has_sizes else tiled
    from dinat_triton.kernels import attention

    return attention


def _save(ctx, inputs, output):
    """Keeps for the backward what it reads."""
    rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv = inputs
    # Only Triton's backward reads the outputs; others leave them to whoever wants to change them in place.
    saved = (*qkv, rpb, seed, *(output if backend == "triton" else (None, None)))
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.need_lse, ctx.options = need_lse, (window, scale, dropout_p, backend, sizes)
    ctx.set_materialize_grads(False)  # no zeros for a log-sum-exp that nobody uses


class Fused(torch.autograd.Function):
    """`fused` with its gradient.

    Not by `torch.library.register_autograd`, nor with a `setup_context`: each would add 30 us to every call.
    """

    @staticmethod
    def forward(ctx, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv):
        inputs = (rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv)
        outputs = _run(FUSED, _fused, qkv, *inputs[:8])
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *qkv, rpb, seed, out, lse = ctx.saved_tensors
        if grad_out is None:
            query, _, value = unpack(qkv)
            grad_out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        grad_lse = grad_lse if ctx.need_lse else None
        count = len(split_mask(qkv)[0])
        wanted = [*ctx.needs_input_grad[8 : 8 + count], ctx.needs_input_grad[0]]
        arguments = (qkv, rpb, seed, out, lse, grad_out, grad_lse, *ctx.options, wanted)
        # Where these gradients are recorded in turn, autograd has to learn that they have none.
        call = _fused_backward_autograd if torch.is_grad_enabled() else partial(_run, FUSED_BACKWARD, _fused_backward)
        grads, grad_rpb = call(*arguments)
        *grads, grad_rpb = [x if wants else None for x, wants in zip([*grads, grad_rpb], wanted, strict=True)]
        no_mask = [None] * (len(qkv) - count)
        return grad_rpb, None, None, None, None, None, None, None, *grads, *no_mask

    @staticmethod
    def jvp(ctx, rpb_tangent, _seed, _window, _scale, _dropout_p, _need_lse, _backend, _sizes, *qkv_tangents):
        *qkv, rpb, seed, _, _ = ctx.saved_tensors
        pairs = zip(split_mask(qkv)[0], qkv_tangents, strict=False)
        tangents = [torch.zeros_like(x) if t is None else t for x, t in pairs]
        *options, backend, sizes = ctx.options
        options = (*options, ctx.need_lse, backend, sizes)
        return _last_derivative(FUSED_JVP, qkv, rpb, seed, tangents, rpb_tangent, *options)


class FusedInTransforms(torch.autograd.Function):
    """`Fused` inside the transforms of torch.func, which ask for a context apart."""

    generate_vmap_rule = True
    setup_context, backward, jvp = staticmethod(_save), Fused.backward, Fused.jvp

    @staticmethod
    def forward(rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv):
        return _run(FUSED, _fused, qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)


def fused_attention(qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes=None):
    if torch._C._are_functorch_transforms_active():
        return FusedInTransforms.apply(rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv)
    recorded = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (*qkv, rpb)])
    if recorded or forward_ad._current_level >= 0:
        return Fused.apply(rpb, seed, window, scale, dropout_p, need_lse, backend, sizes, *qkv)
    return _run(FUSED, _fused, qkv, rpb, seed, window, scale, dropout_p, need_lse, backend, sizes)


def _run(op, kernel, qkv, *args):
    """Runs an op below autograd: its kernel without torch's dispatcher between, if nothing there would see the call."""
    return _below_autograd(op if _is_watched(qkv, args) else kernel, qkv, *args)


def _is_watched(qkv, args) -> bool:
    """Whether a compiler, mode, transform or profiler is on, or an argument is of a kind that torch treats apart."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or not PLAIN.issuperset(map(type, (*qkv, *args)))
        or any([type(x) in PLAIN_TENSORS and x.is_neg() for x in (*qkv, *args)])
    )


def _below_autograd(op, *args):
    """Calls an op without the detour over its autograd."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*args)


def _vmap(op, info, in_dims, *args):
    """An op of each part of a batch, one after the other."""
    parts = [
        op(*tree_map(lambda x, dim, i=i: x if dim is None else x.select(dim, i), args, in_dims))
        for i in range(info.batch_size)
    ]
    outputs = tree_map(lambda *x: torch.stack(x), *parts)
    return outputs, tree_map(lambda _: 0, outputs)


class LastDerivative(torch.autograd.Function):
    """An op whose results have no derivatives, and say so. Its arguments come flat."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, spec, *flat):
        return tuple(tree_leaves(_below_autograd(op, *tree_unflatten(list(flat), spec))))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = next(x for x in inputs if isinstance(x, str))

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"backend {ctx.backend!r} has no second derivatives; backend='reference' has")

    jvp = backward


def _last_derivative(op, *args):
    flat, spec = tree_flatten(args)
    return LastDerivative.apply(op, spec, *flat)


def _fused_backward_autograd(*args):
    *grads, grad_rpb = _last_derivative(FUSED_BACKWARD, *args)
    return grads, grad_rpb


LIBRARY.impl("fused", _fused, "CompositeExplicitAutograd")
LIBRARY.impl("fused", fused_attention, "Autograd")
LIBRARY.impl("fused_backward", _fused_backward, "CompositeExplicitAutograd")
LIBRARY.impl("fused_backward", _fused_backward_autograd, "Autograd")
LIBRARY.impl("fused_jvp", _fused_jvp, "CompositeExplicitAutograd")
LIBRARY.impl("fused_jvp", partial(_last_derivative, FUSED_JVP), "Autograd")
torch.library.register_fake("dinat_triton::fused", _fused_fake, lib=LIBRARY)
torch.library.register_fake("dinat_triton::fused_backward", _fused_backward_fake, lib=LIBRARY)
torch.library.register_fake("dinat_triton::fused_jvp", _fused_jvp_fake, lib=LIBRARY)
for _op in (FUSED, FUSED_BACKWARD, FUSED_JVP):
    torch.library.register_vmap(_op, partial(_vmap, _op), lib=LIBRARY)
