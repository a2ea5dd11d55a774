"""The readable and the tiled backend against brute force in float64, and that against NATTEN."""

import random

import pytest
import torch

from tests.oracles import brute, natten, sampling
from tests.oracles.cases import check, make_case

CHUNKS = 6
SAMPLES = sampling.samples(90, seed=7, max_tokens=48, borders=sampling.BORDERS)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_backends_match_brute_force(chunk: int) -> None:
    rng = random.Random(chunk)
    for sample in SAMPLES[chunk::CHUNKS]:
        case = make_case(sample, rng, scale=rng.choice([None, 0.7]))
        check(case, torch.float64, 1e-12, "reference", "tiled", truth="brute")


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_key_masks_match_brute_force(count: int) -> None:
    rng = random.Random(count)
    for sample in sampling.samples(count, seed=count, max_tokens=48, borders=sampling.BORDERS):
        case = make_case(sample, rng, scale=rng.choice([None, 0.7]), masked=True)
        check(case, torch.float64, 1e-12, "reference", "tiled", truth="brute")


@pytest.mark.skipif(natten.available() is not None, reason=str(natten.available()))
@pytest.mark.parametrize("chunk", range(2))
def test_brute_force_matches_natten(chunk: int) -> None:
    for sample in sampling.samples(30, seed=chunk, max_tokens=96, min_kernel=natten.MIN_KERNEL):
        query, key, value = (torch.randn(1, *sample.shape, heads, natten.HEAD_DIM) for heads in (2, 1, 1))
        expected = brute.attention(query, key, value, **sample.kwargs())
        for found, exact in zip(natten.attention(query, key, value, sample), expected, strict=True):
            torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5, msg=str(sample))
