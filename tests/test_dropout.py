"""The Philox generator against the published test vectors; the tests of the kernels hold it against Triton's."""

import torch

from dinat_triton.dropout import keep_mask, new_seed, philox, threshold


def test_known_answers() -> None:
    """From the test vectors that come with Random123: philox4x32-10."""
    assert philox(*[torch.tensor(0)] * 4).item() == 0x6627E8D5
    assert [threshold(p) for p in (0.0, 0.5, 1 - 1e-12)] == [0, 1 << 31, 0xFFFFFFFF]


def test_a_mask_depends_on_the_pair_and_the_seed_alone() -> None:
    seed = new_seed(torch.device("cpu"))
    query, key = torch.arange(50)[:, None], torch.arange(40)[None]
    mask = keep_mask(seed, 0.25, key, query, torch.tensor(3))
    assert torch.equal(mask.flip(0), keep_mask(seed, 0.25, key, query.flip(0), torch.tensor(3)))
    assert not torch.equal(mask, keep_mask(seed + 1, 0.25, key, query, torch.tensor(3)))
    assert not torch.equal(mask, keep_mask(seed, 0.25, key, query, torch.tensor(4)))
    assert 0.7 < mask.double().mean() < 0.8
