"""Backends against NATTEN: random windows, strides, dilations, causal masks and ragged shapes in 1-D, 2-D and 3-D."""

import math

import pytest
import torch
from torch import Tensor

import dinat_triton as dt
from tests.oracles import natten, sampling

CHUNKS = 12
SAMPLES = sampling.samples(420, seed=2024, max_tokens=192, min_kernel=natten.MIN_KERNEL)
TOLERANCE = 1e-5
NA = {1: dt.na1d, 2: dt.na2d, 3: dt.na3d}

pytestmark = pytest.mark.skipif(natten.available() is not None, reason=str(natten.available()))


def inputs(sample: sampling.Sample, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 query, key and value; every third sample shares one key head between two query heads."""
    generator = torch.Generator().manual_seed(seed)
    lead = (1 + seed % 2, *sample.shape)

    def normal(heads: int) -> Tensor:
        return torch.randn(*lead, heads, natten.HEAD_DIM, generator=generator)

    heads_kv = 1 if seed % 3 == 0 else 2
    return normal(2), normal(heads_kv), normal(heads_kv)


def worst(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Largest difference in output or logsumexp; infinite where the shapes or any NaN differ."""
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return error if error == error else math.inf


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_backends_match_natten(chunk: int) -> None:
    mismatches = []
    for seed in range(chunk, len(SAMPLES), CHUNKS):
        sample = SAMPLES[seed]
        query, key, value = inputs(sample, seed)
        expected = natten.attention(query, key, value, sample)
        for backend in ("reference", "tiled"):
            got = NA[sample.rank](query, key, value, **sample.natten_kwargs(), return_lse=True, backend=backend)
            error = worst(got, expected)
            if error > TOLERANCE:
                mismatches.append(f"{backend} is off by {error:.2e} on {sample}")
    assert not mismatches, "\n".join(mismatches)


def test_samples_cover_what_matters() -> None:
    count = len(SAMPLES)
    assert count >= 300
    assert len(set(SAMPLES)) == count
    assert all(sum(s.rank == rank for s in SAMPLES) >= count // 4 for rank in NA)
    assert all(
        sum(covered) >= count // 4
        for covered in (
            [s.ragged for s in SAMPLES],
            [any(s.is_causal) for s in SAMPLES],
            [not any(s.is_causal) for s in SAMPLES],
            [any(d > 1 for d in s.dilation) for s in SAMPLES],
            [any(x > 1 for x in s.stride) for s in SAMPLES],
            [any(k % 2 == 0 for k in s.kernel_size) for s in SAMPLES],
            [any(k * d == x for x, k, d in zip(s.shape, s.kernel_size, s.dilation, strict=True)) for s in SAMPLES],
        )
    )
