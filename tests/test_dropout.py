"""The Philox generator against Triton's, bit by bit, and against the published test vectors."""

import subprocess
import sys

import torch

from dinat_triton.dropout import keep_mask, new_seed, philox, threshold

COMPARE = """
import torch, triton, triton.language as tl
from dinat_triton.dropout import philox

@triton.jit
def draw(seed, out, N: tl.constexpr):
    i = tl.arange(0, N)
    bits, _, _, _ = tl.philox(tl.load(seed), i, i * 7 + 1, i * 0 + 5, i * 0)
    tl.store(out + i, bits.to(tl.uint32, bitcast=True).to(tl.int64))

seed, out, i = torch.tensor([(123 << 32) + 456]), torch.empty(64, dtype=torch.int64), torch.arange(64)
draw[(1,)](seed, out, 64)
assert torch.equal(out, philox(seed, i, i * 7 + 1, torch.tensor(5))), out
print("equal")
"""


def test_known_answers() -> None:
    """From the test vectors that come with Random123: philox4x32-10."""
    assert philox(*[torch.tensor(0)] * 4).item() == 0x6627E8D5


def test_triton_draws_the_same_bits() -> None:
    environment = {"TRITON_INTERPRET": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr


def test_a_mask_depends_on_the_pair_and_the_seed_alone() -> None:
    seed = new_seed(torch.device("cpu"))
    query, key = torch.arange(50)[:, None], torch.arange(40)[None]
    mask = keep_mask(seed, 0.25, key, query, torch.tensor(3))
    assert torch.equal(mask.flip(0), keep_mask(seed, 0.25, key, query.flip(0), torch.tensor(3)))
    assert not torch.equal(mask, keep_mask(seed + 1, 0.25, key, query, torch.tensor(3)))
    assert not torch.equal(mask, keep_mask(seed, 0.25, key, query, torch.tensor(4)))
    assert 0.7 < mask.double().mean() < 0.8


def test_thresholds() -> None:
    assert threshold(0.0) == 0
    assert threshold(0.5) == 1 << 31
    assert threshold(1 - 1e-12) == 0xFFFFFFFF
