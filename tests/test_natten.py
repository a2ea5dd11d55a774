"""Backends against NATTEN: random windows, strides, dilations, causal masks and ragged shapes in 1-D, 2-D and 3-D."""

import pytest
import torch

from tests.oracles import natten, sampling
from tests.oracles.cases import NA

CHUNKS = 12
SAMPLES = sampling.samples(420, seed=2024, max_tokens=192, min_kernel=natten.MIN_KERNEL)

pytestmark = pytest.mark.skipif(natten.available() is not None, reason=str(natten.available()))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_backends_match_natten(chunk: int) -> None:
    for number, sample in enumerate(SAMPLES[chunk::CHUNKS]):
        heads = (2, 1, 1) if number % 3 == 0 else (2, 2, 2)
        query, key, value = (torch.randn(1 + number % 2, *sample.shape, n, natten.HEAD_DIM) for n in heads)
        expected = natten.attention(query, key, value, sample)
        for backend in ("reference", "tiled"):
            got = NA[sample.rank](query, key, value, **sample.natten_kwargs(), return_lse=True, backend=backend)
            message = f"{backend}, {sample}: {{}}".format
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5, msg=message)
