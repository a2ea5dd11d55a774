"""Maps of different sizes in one launch of the Triton kernels under the interpreter, against each map alone."""

import random

import pytest
import torch
import triton

from tests.oracles import sampling
from tests.oracles.map_batches import make_map_case

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="set TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

SAMPLES = sampling.samples(10, seed=54, max_tokens=40, min_kernel=2, borders=sampling.BORDERS)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_map_is_attended_to_as_if_it_were_alone(sample: sampling.Sample, poisoned: None) -> None:
    case = make_map_case(sample, random.Random(str(sample)), 2)
    exact = case.alone("reference", torch.float64)
    case.check(case.run("triton", packed=random.Random(str(sample)).random() < 0.5), exact, 1e-5)


@pytest.mark.parametrize("sample", SAMPLES[:3], ids=str)
def test_bits_are_those_of_each_map_alone(sample: sampling.Sample) -> None:
    case = make_map_case(sample, random.Random(1), 2)
    case.check(case.run("triton", packed=False), case.alone("triton"))
