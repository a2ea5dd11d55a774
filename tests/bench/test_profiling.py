"""Which part of a step takes how long: attribution forward and backward, and shares that add up."""

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import timm
import torch
from torch import nn
from torch.autograd import DeviceType
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
    Tally,
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


def test_views_are_no_kernels() -> None:
    assert all(profiling.is_view(f"aten::{name}") for name in ("view", "flatten", "as_strided", "t", "split"))
    assert not any(profiling.is_view(f"aten::{name}") for name in ("mm", "add_", "copy_", "gelu", "empty", "no_such"))


def event(name: str, *children: Any, sequence: int = -1, **kernels: float) -> Any:
    """What the profiler tells of an operation on a GPU, as far as it is read; kernels by their microseconds."""
    made = MagicMock(cpu_children=list(children), cpu_parent=None, device_type=DeviceType.CPU, sequence_nr=sequence)
    made.name, made.thread, made.fwd_thread, made.time_range.start = name, 1, 1, 0.0
    made.kernels = [SimpleNamespace(name=name.replace("_", ": "), duration=us) for name, us in kernels.items()]
    for child in children:
        child.cpu_parent = made
    return made


def test_on_a_gpu_kernels_count_and_idle_time_is_overhead() -> None:
    attend = event("dinat_triton::fused", event("cuLaunchKernelEx", forward=300.0), sequence=7)
    # The device has a copy of the scope itself, which is no kernel.
    scope = event("part: attention", attend, part_attention=900.0)
    backward = event("autograd::engine::evaluate_function: X", event("aten::mm", k=500.0), sequence=7)
    events = [scope, event("aten::add", add=100.0), backward, attend, *attend.cpu_children]
    tally = Tally.of(events, on_gpu=True)
    assert tally.parts[ATTENTION] == pytest.approx(800e-6)
    assert tally.parts[OTHER] == pytest.approx(100e-6)
    assert tally.operations == 3
    record = record_of({}, ("m", TRAINING, "bfloat16"), [2e-3], [tally])
    assert record.also["parts_ms"][OVERHEAD] == pytest.approx(1.1)


def test_kernels_that_took_longer_than_the_step_are_scaled() -> None:
    tally = Tally(dict.fromkeys(PARTS, 0.0) | {ATTENTION: 3.0, LINEAR: 1.0}, 2)
    record = record_of({}, ("m", INFERENCE, "float32"), [2.0, 2.0, 2.0], [tally])
    assert (record.also["parts_ms"][ATTENTION], record.also["parts_ms"][LINEAR]) == (1500, 500)
