"""torch.func on the fused backends, and torch.jit.trace."""

import random
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import dinat_triton as dt
from tests.oracles.cases import NA, Case, make_case
from tests.oracles.sampling import BORDERS, Sample, samples

Attend = Callable[..., Tensor]


def of_each_sample(attend: Attend, q: Tensor, rpb: Tensor) -> Tensor:
    return vmap(grad(lambda rpb, q: attend(q[None], rpb).sin().sum()), (None, 0))(rpb, q)


def of_a_batch(attend: Attend, q: Tensor, rpb: Tensor) -> Tensor:
    return grad(lambda rpb: vmap(attend, (1, None))(q[:, None], rpb).sin().sum())(rpb)


def in_autograd(attend: Attend, q: Tensor, rpb: Tensor) -> Tensor:
    q, rpb = torch.stack([q, 2 * q]).requires_grad_(), torch.stack([rpb, 2 * rpb], -1).requires_grad_()
    return torch.autograd.grad(vmap(attend, (0, -1))(q, rpb).sin().sum(), (q, rpb))


def jacobian(attend: Attend, q: Tensor, rpb: Tensor) -> Tensor:
    return jacrev(lambda rpb: attend(q, rpb)[0, 0, 1])(rpb)


def of_a_batch_of_directions(attend: Attend, q: Tensor, rpb: Tensor) -> tuple[Tensor, ...]:
    return vmap(lambda q, t: jvp(lambda q: attend(q[None], rpb), (q,), (t,)))(q, q.cos())


def forward_jacobian(attend: Attend, q: Tensor, rpb: Tensor) -> Tensor:
    return jacfwd(lambda rpb: attend(q, rpb)[0, 0, 1])(rpb)


DERIVATIVES = [of_each_sample, of_a_batch, in_autograd, jacobian, of_a_batch_of_directions, forward_jacobian]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("output", [0, 1])  # the attention, or its log-sum-exp
def test_transforms_agree_with_the_reference(derivative: Callable, output: int) -> None:
    q, rpb = torch.randn(2, 6, 6, 2, 4), torch.randn(2, 5, 5)

    def found(backend: str) -> Tensor:
        return derivative(lambda q, rpb: dt.na2d(q, q, q, 3, rpb=rpb, return_lse=True, backend=backend)[output], q, rpb)

    torch.testing.assert_close(found("tiled"), found("reference"))


@pytest.mark.parametrize(
    "second",
    [
        lambda f, x: grad(lambda x: grad(f)(x).sum())(x),
        lambda f, x: hessian(f)(x),
        lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1])(x),
        lambda f, x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,)),
    ],
)
def test_what_only_the_reference_can_do_is_said(second: Callable) -> None:
    with pytest.raises(RuntimeError, match="backend 'tiled' has no second derivatives; backend='reference' has"):
        second(lambda x: dt.na2d(x, x, x, 3, backend="tiled").sin().sum(), torch.randn(1, 4, 4, 1, 2))


@pytest.mark.parametrize("sample", samples(12, seed=5, max_tokens=200, borders=BORDERS), ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_forward_mode_agrees_with_the_reference(sample: Sample, dropout_p: float) -> None:
    case = make_case(sample, random.Random(0), dropout_p=dropout_p)
    found, expected = (tangents(case, backend) for backend in ("tiled", "reference"))
    torch.testing.assert_close(found, expected)


def tangents(case: Case, backend: str) -> tuple[Tensor, ...]:
    """Of output and log-sum-exp, along a random direction."""
    torch.manual_seed(1)
    with forward_ad.dual_level():
        leaves = [forward_ad.make_dual(x, torch.randn_like(x)) for x in case.leaves]
        options = case.sample.kwargs() | {"scale": case.scale, "rpb": leaves[3] if len(leaves) == 4 else None}
        options |= {"dropout_p": case.dropout_p, "return_lse": True, "backend": backend}
        return tuple(forward_ad.unpack_dual(x).tangent for x in NA[case.sample.rank](*leaves[:3], **options))


def test_an_ensemble_of_layers_is_one_vmap() -> None:
    layers = [dt.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True) for _ in range(3)]
    x = torch.randn(2, 5, 6, 16)
    parameters, _ = torch.func.stack_module_state(layers)
    out = vmap(lambda p: functional_call(layers[0], p, (x,)))(parameters)
    torch.testing.assert_close(out, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("recording", [False, True])
def test_traces_serve_other_maps_and_train(recording: bool) -> None:
    layer = dt.NeighborhoodAttention2D(16, 2, 3, dilation=2, rel_pos_bias=True)
    model = timm.create_model("dinat_mini", depths=(1, 1), embed_dim=32, dilations=1).eval()
    images = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 64, 64)
    for module, x, other in ((model, *images), (layer, torch.randn(1, 8, 8, 16), torch.randn(2, 12, 9, 16))):
        with torch.set_grad_enabled(recording):
            traced = torch.jit.trace(module, x)
        torch.testing.assert_close(traced(other), module(other))
    traced(other).sum().backward()
    assert layer.rpb.grad.any()
