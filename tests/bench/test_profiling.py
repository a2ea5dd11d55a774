"""Which part of a step takes how long: attribution forward and backward, and shares that add up."""

import pytest
import timm
import torch
from torch import nn

from dinat_triton.bench import profiling
from dinat_triton.bench.models import INFERENCE, TRAINING, step_of
from dinat_triton.bench.profiling import ACTIVATION, ATTENTION, CONVOLUTION, LINEAR, NORM, OTHER, OVERHEAD


def model_of(slow: int = 1) -> nn.Module:
    """A small transformer, whose attention may run several times over."""
    model = timm.create_model("test_vit", depth=1, img_size=64)
    kind = type(model.blocks[0].attn)

    class SlowAttention(kind):
        def forward(self, *x, **options):
            return [kind.forward(self, *x, **options) for _ in range(slow)][-1]

    model.blocks[0].attn.__class__ = SlowAttention
    return model


def profiled(model: nn.Module, pass_: str) -> dict[str, float]:
    """The share of each part."""
    step = step_of(model.train(pass_ == TRAINING), torch.randn(2, 3, 64, 64), pass_, autocast=False)
    record = profiling.record_of(
        {}, ("toy", pass_, "float32"), *profiling.samples(model, step, on_gpu=False, repeats=5)
    )
    assert record.timing
    assert sum(record.also["parts_ms"].values()) == pytest.approx(record.timing.median, rel=1e-2)
    return profiling.shares(record)


@pytest.mark.parametrize("pass_", [INFERENCE, TRAINING])
def test_every_part_has_a_share_and_a_slow_attention_a_larger_one(pass_: str) -> None:
    found = profiled(model_of(), pass_)
    expected = {ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION, OTHER}
    expected |= {profiling.OPTIMIZER} if pass_ == TRAINING else set()
    assert {part for part in profiling.PARTS if found[part] > 0} - {OVERHEAD} == expected
    slow = profiled(model_of(slow=100), pass_)
    assert slow[ATTENTION] + slow[LINEAR] > 1.5 * (found[ATTENTION] + found[LINEAR])
