"""Backends against the brute force, in fp64: bias, logsumexp, every gradient, shared key heads, another value dim."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dinat_triton as dt
from tests.oracles import brute, natten, sampling

BACKENDS = ("reference", "tiled")
CHUNKS = 6
SAMPLES = sampling.samples(90, seed=7, max_tokens=48)
NA = {1: dt.na1d, 2: dt.na2d, 3: dt.na3d}


@dataclass
class Case:
    """fp64 leaves with gradients, and what the gradients of output and logsumexp are."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None
    scale: float | None
    grad_out: Tensor
    grad_lse: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.value, self.rpb) if t is not None]


def make_case(sample: sampling.Sample, seed: int) -> Case:
    """Sizes that differ from each other, so that a mixed-up axis cannot go unseen."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    heads_kv = rng.choice([1, 2])
    heads = heads_kv * rng.choice([1, 2, 3])
    dim, value_dim = rng.choice([(4, 4), (5, 3), (3, 6)])
    lead = (rng.choice([1, 2]), *sample.shape)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)

    return Case(
        query=normal(*lead, heads, dim),
        key=normal(*lead, heads_kv, dim),
        value=normal(*lead, heads_kv, value_dim),
        rpb=normal(heads, *(2 * k - 1 for k in sample.kernel_size)) if rng.random() < 0.8 else None,
        scale=rng.choice([None, 0.7]),
        grad_out=normal(*lead, heads, value_dim, grad=False),
        grad_lse=normal(*lead, heads, grad=False),
    )


def differentiate(case: Case, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad([out, lse], case.leaves, [case.grad_out, case.grad_lse])
    names = ("grad of query", "grad of key", "grad of value", "grad of rpb")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=False))}


def expect(case: Case, sample: sampling.Sample) -> dict[str, Tensor]:
    return differentiate(
        case,
        *brute.attention(case.query, case.key, case.value, **sample.kwargs(), rpb=case.rpb, scale=case.scale),
    )


def compute(case: Case, sample: sampling.Sample, backend: str) -> dict[str, Tensor]:
    out, lse = NA[sample.rank](
        case.query,
        case.key,
        case.value,
        **sample.kwargs(),
        rpb=case.rpb,
        scale=case.scale,
        return_lse=True,
        backend=backend,
    )
    return differentiate(case, out, lse)


def assert_same(got: Tensor, expected: Tensor, what: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda message: f"{what}: {message}")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_backends_match_brute_force(chunk: int) -> None:
    for seed in range(chunk, len(SAMPLES), CHUNKS):
        sample = SAMPLES[seed]
        case = make_case(sample, seed)
        expected = expect(case, sample)
        for backend in BACKENDS:
            got = compute(case, sample, backend)
            for name in expected:
                assert_same(got[name], expected[name], f"{name} of {backend} on {sample}", rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", range(2))
def test_brute_force_matches_natten(chunk: int) -> None:
    if reason := natten.available():
        pytest.skip(reason)
    for seed, sample in enumerate(sampling.samples(30, seed=chunk, max_tokens=96, min_kernel=natten.MIN_KERNEL)):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(1, *sample.shape, h, natten.HEAD_DIM, generator=generator) for h in (2, 1, 1))
        with torch.no_grad():
            expected = brute.attention(query, key, value, **sample.kwargs())
        for got, exact in zip(natten.attention(query, key, value, sample), expected, strict=True):
            assert_same(got, exact.float(), str(sample), rtol=1e-5, atol=1e-5)
