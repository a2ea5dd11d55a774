"""Which part of a step takes how long: attribution forward and backward, and shares that add up."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dinat_triton  # noqa: F401  (registers the models)
from dinat_triton.bench import profiling
from dinat_triton.bench.models import INFERENCE, TRAINING, step_of
from dinat_triton.bench.profiling import (
    ACTIVATION,
    ATTENTION,
    CONVOLUTION,
    LINEAR,
    NORM,
    OPTIMIZER,
    OTHER,
    OVERHEAD,
    PARTS,
    record_of,
    shares,
)


def model_of(slow: int = 1) -> nn.Module:
    """A small transformer, whose attention may run several times over."""
    model = timm.create_model("test_vit", depth=1, img_size=64)
    attend = model.blocks[0].attn.forward
    model.blocks[0].attn.forward = lambda *x, **options: [attend(*x, **options) for _ in range(slow)][-1]
    return model


def profiled(model: nn.Module, pass_: str) -> dict[str, float]:
    """The share of each part."""
    step = step_of(model.train(pass_ == TRAINING), torch.randn(2, 3, 64, 64), pass_, autocast=False)
    record = record_of({}, ("toy", pass_, "float32"), *profiling.samples(model, step, on_gpu=False, repeats=2))
    assert record.timing
    assert sum(record.also["parts_ms"].values()) == pytest.approx(record.timing.median, rel=1e-2)
    return shares(record)


@pytest.mark.parametrize("pass_", [INFERENCE, TRAINING])
def test_every_part_has_a_share_and_a_slow_attention_a_larger_one(pass_: str) -> None:
    found = profiled(model_of(), pass_)
    expected = {ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION, OTHER} | ({OPTIMIZER} if pass_ == TRAINING else set())
    assert {part for part in PARTS if found[part] > 0} - {OVERHEAD} == expected
    slow = profiled(model_of(slow=100), pass_)
    assert slow[ATTENTION] + slow[LINEAR] > 1.5 * (found[ATTENTION] + found[LINEAR])


def test_every_gradient_belongs_where_its_operation_does() -> None:
    model = model_of()
    step = step_of(model, torch.randn(2, 3, 64, 64), TRAINING, autocast=False)
    step()
    with profiling.scoped(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    owners: dict[tuple[int, int], str] = {}
    found: dict[str, set[str]] = {}
    roots = [event for event in profiler.events() if event.cpu_parent is None]
    for root in sorted(roots, key=lambda event: event.time_range.start):
        for event, part in profiling.attributed(root, OTHER, owners):
            if event.name.startswith("autograd::engine::evaluate_function"):
                found.setdefault(event.name.rpartition(" ")[2], set()).add(part)
    expected = {"Addmm": LINEAR, "Gelu": ACTIVATION, "NativeLayerNorm": NORM, "Convolution": CONVOLUTION}
    assert {name: found[f"{name}Backward0"] for name in expected} == {name: {part} for name, part in expected.items()}
    assert [found[name] for name in found if name.startswith("ScaledDotProduct")] == [{ATTENTION}]
    assert OTHER in found["AddBackward0"]


@pytest.mark.parametrize("name", ["dinat_mini", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_modules_of_real_models_are_known(name: str) -> None:
    model = timm.create_model(name, device="meta")
    found = dict(profiling.parts_of(model))
    blocks = {"dinat_mini": 18, "convnext_tiny": 18}.get(name, 12)
    counts = Counter(found.values())
    assert counts[ATTENTION] == (0 if name == "convnext_tiny" else blocks)
    assert min(counts[LINEAR] / 2, counts[NORM], counts[ACTIVATION]) >= blocks
    inside = {child for module, part in found.items() if part == CONVOLUTION for child in module.modules()}
    known = (nn.Conv2d, nn.Linear, nn.LayerNorm)
    assert all(module in inside | found.keys() for module in model.modules() if isinstance(module, known))
