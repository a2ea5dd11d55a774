"""The ops under all that torch does to ops: checks, compilation, export, TorchScript, FX, meta tensors, autocast."""

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

import dinat_triton as dt
from dinat_triton import tiled
from dinat_triton.functional import window_of

WINDOW = window_of(2, 3, 1, 2, (True, False), ("wrap", "clip"))
BACKENDS = ("reference", "tiled")


def inputs(packed: bool = False, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    if packed:
        qkv = [torch.randn(2, 6, 7, 3, 4, 8, dtype=dtype, requires_grad=True)]
    else:
        qkv = [torch.randn(2, 6, 7, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    return qkv, torch.randn(4, 5, 5, dtype=dtype, requires_grad=True)


def gradients(f: Callable, leaves: list[Tensor]) -> list[Tensor]:
    out, lse = f()
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("packed", "backend"), [(False, "tiled"), (True, "tiled"), (True, "reference")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_of_the_public_op(packed: bool, backend: str, dropout_p: float) -> None:
    qkv, rpb = inputs(packed)
    # With dropout two runs draw two masks, which the comparing checks would take for a mistake.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks = checks if dropout_p else (*checks, "test_aot_dispatch_dynamic")
    opcheck(torch.ops.dinat_triton.na, (qkv, WINDOW, rpb, None, dropout_p, True, backend), test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("need_lse", [False, True])
def test_opcheck_of_the_fused_op_and_its_backward(packed: bool, biased: bool, need_lse: bool) -> None:
    qkv, rpb = inputs(packed)
    rpb = rpb if biased else None
    args = (qkv, rpb, torch.tensor([7]), WINDOW, 0.3, 0.2, need_lse, "tiled")
    opcheck(torch.ops.dinat_triton.fused, args)
    if need_lse:
        with torch.no_grad():
            out, lse = torch.ops.dinat_triton.fused(*args)
        qkv, rpb = [x.detach() for x in qkv], None if rpb is None else rpb.detach()
        args = (qkv, rpb, torch.tensor([7]), out, lse, out.sin(), lse.cos(), WINDOW, 0.3, 0.2, "tiled")
        opcheck(torch.ops.dinat_triton.fused_backward, args)


def test_an_unused_output_costs_no_gradient_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backward = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda *args: seen.append(args[6]) or backward(*args))
    (query, key, value), rpb = inputs()
    leaves = [query, key, value, rpb]

    def attend(backend: str) -> tuple[Tensor, Tensor]:
        return dt.na2d(query, key, value, 3, dilation=2, rpb=rpb, return_lse=True, backend=backend)

    torch.autograd.grad(attend("tiled")[0].sum(), leaves)
    assert seen == [None]
    found, exact = (torch.autograd.grad(attend(name)[1].sin().sum(), leaves, allow_unused=True) for name in BACKENDS)
    same([x for x in found if x is not None], [x for x in exact if x is not None and x.any()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [3, 5])  # some tiles of the map, and one that is all of it
def test_outputs_can_be_changed_in_place(backend: str, kernel: int) -> None:
    x = torch.randn(1, 5, 5, 2, 4, requires_grad=True)
    out, lse = dt.na2d(x, x, x, kernel, return_lse=True, backend=backend)
    expected = torch.autograd.grad((2 * out).sum() + (2 * lse).sum(), x, retain_graph=True)
    out *= 2
    lse *= 2
    assert torch.equal(torch.autograd.grad(out.sum() + lse.sum(), x)[0], expected[0])


def test_triton_refuses_forward_mode() -> None:
    x, window = torch.randn(1, 5, 5, 3, 2, 4), [3, 3, 1, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="backend 'triton' has no forward-mode derivatives; backend='tiled' and"):
        torch.ops.dinat_triton.fused_jvp([x], None, None, [x], None, window, 0.5, 0.0, False, "triton")


@pytest.mark.parametrize(("backend", "dynamic"), [("tiled", False), ("tiled", True), ("reference", False)])
def test_compiles_into_one_graph(backend: str, dynamic: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dt.na2d(
            query * 2, key, value, 3, dilation=2, border=("wrap", "clip"), rpb=rpb, return_lse=True, backend=backend
        )
        return out + 1, lse

    qkv, rpb = inputs()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager" if dynamic else "inductor")
    leaves = [*qkv, rpb]
    same(gradients(lambda: compiled(*leaves), leaves), gradients(lambda: attend(*leaves), leaves))


def test_dropout_compiles_and_draws_anew() -> None:
    qkv, _ = inputs()
    compiled = torch.compile(lambda *x: dt.na2d(*x, 3, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(*qkv), compiled(*qkv))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_export_script_and_trace(rank: int) -> None:
    module = getattr(dt, f"NeighborhoodAttention{rank}D")(
        8, 2, 3, dilation=2, rel_pos_bias=True, border=("wrap", "clip", "shift")[:rank]
    ).eval()
    x = torch.randn(2, *(8, 7, 5)[:rank], 8)  # the last axis of the 3-D map is shorter than 3 * 2: padded
    expected = module(x)
    traced = torch.fx.symbolic_trace(module)
    scripted, scripted_trace = torch.jit.script(module), torch.jit.script(traced)
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    for form in (torch.export.export(module, (x,)).module(), traced, scripted, scripted_trace, torch.jit.load(saved)):
        torch.testing.assert_close(form(x), expected)
    scripted(x).sum().backward()
    assert module.rpb.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_pass(backend: str) -> None:
    query, key = torch.empty(2, 90, 80, 4, 8, device="meta"), torch.empty(2, 90, 80, 2, 8, device="meta")
    value, rpb = torch.empty(2, 90, 80, 2, 6, device="meta"), torch.empty(4, 13, 13, device="meta")
    out, lse = dt.na2d(query, key, value, 7, dilation=4, rpb=rpb, return_lse=True, backend=backend)
    assert (out.shape, out.device.type) == ((2, 90, 80, 4, 6), "meta")
    assert (lse.shape, lse.dtype) == ((2, 90, 80, 4), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_compiled_and_leaves_float64_alone(backend: str) -> None:
    (query, key, value), rpb = inputs()

    def attend() -> Tensor:
        return dt.na2d(query, key, value, 3, rpb=rpb, backend=backend)

    with torch.autocast("cpu", torch.bfloat16):
        out, expected = torch.compile(attend, backend="aot_eager")(), attend()
        assert dt.na2d(*(x.double() for x in (query, key, value)), 3, backend=backend).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    leaves = [query, key, value, rpb]
    for found, exact in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (out, expected)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 7])  # some tiles of the map, and one that is all of it
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_autocast_casts_the_inputs_and_nothing_else(
    backend: str, dtype: torch.dtype, kernel: int, dropout_p: float
) -> None:
    leaves = [6 * torch.randn(2, 7, 7, 2, 8) for _ in range(3)]  # logits beyond 60
    leaves = [x.requires_grad_() for x in (*leaves, torch.randn(2, 2 * kernel - 1, 2 * kernel - 1))]

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return dt.na2d(*qkv, kernel, rpb=leaves[3], dropout_p=dropout_p, return_lse=True, backend=backend)

    expected = gradients(lambda: attend(*(x.to(dtype) for x in leaves[:3])), leaves)
    with torch.autocast("cpu", dtype):
        within = gradients(lambda: attend(*leaves[:3]), leaves)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            nested = gradients(lambda: attend(*(x.to(dtype) for x in leaves[:3])), leaves)
        out, lse = attend(*leaves[:3])
    after = gradients(lambda: (out, lse), leaves)
    for found in (within, nested, after):
        assert [x.dtype for x in found] == [dtype, *[torch.float32] * 5]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_default_device_does_not_reach_the_plans() -> None:
    x = torch.randn(1, 13, 11, 1, 4)
    with torch.device("meta"):
        out = dt.na2d(x, x, x, 3, dilation=3)
    torch.testing.assert_close(out, dt.na2d(x, x, x, 3, dilation=3, backend="reference"))


def test_packed_inputs_get_one_packed_gradient() -> None:
    (qkv,), rpb = inputs(packed=True)
    attend = torch.ops.dinat_triton.na
    packed = gradients(lambda: attend([qkv], WINDOW, rpb, None, 0.0, True), [qkv, rpb])
    apart = gradients(lambda: attend(list(qkv.unbind(3)), WINDOW, rpb, None, 0.0, True), [qkv, rpb])
    same(packed, apart)
    assert packed[2].is_contiguous()


def test_backends_see_no_tensor_that_stands_for_its_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, originals = [], {name: getattr(tiled, name) for name in ("forward", "backward")}

    def run(name: str, *arguments: object) -> object:
        seen.append(any(x.is_neg() for x in tree_leaves(arguments) if isinstance(x, Tensor)))
        return originals[name](*arguments)

    for name in originals:
        monkeypatch.setattr(tiled, name, partial(run, name))

    def negative(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex64).conj().imag

    qkv, rpb = inputs()
    for query, bias in ((qkv[0], negative(4, 5, 5)), (negative(2, 6, 7, 4, 8), rpb), (qkv[0], rpb)):
        out, _ = torch.ops.dinat_triton.na([query, *qkv[1:]], WINDOW, bias, backend="tiled")
        out.backward(negative(*out.shape))
    assert seen == [False] * 6
