"""Which part of a step takes how long: attribution forward and backward, shares that add up, the table and figure."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dinat_triton  # noqa: F401  (registers the models)
from dinat_triton.bench import figures, harness, profiling
from dinat_triton.bench.harness import Timing
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
    Profile,
    Tally,
)


class ToyAttention(nn.Module):
    """Attends `slow` times over."""

    def __init__(self, dim: int, slow: int):
        super().__init__()
        self.qkv, self.slow = nn.Linear(dim, 3 * dim), slow

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        for _ in range(self.slow):
            q = nn.functional.scaled_dot_product_attention(q, k, v)
        return q


class Toy(nn.Module):
    """One of everything."""

    def __init__(self, slow: int = 1, dim: int = 32):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim))
        self.norm, self.attn = nn.LayerNorm(dim), ToyAttention(dim, slow)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


def profiled(slow: int, pass_: str) -> Profile:
    model = Toy(slow).train(pass_ == TRAINING)
    step = step_of(model, torch.randn(2, 3, 48, 48), pass_, autocast=False)
    found = profiling.samples(model, step, on_gpu=False, repeats=2, tick=lambda: None)
    return Profile.measured("toy", pass_, 2, "float32", *found)


@pytest.mark.parametrize("pass_", [INFERENCE, TRAINING])
def test_shares_add_up_to_the_steps_time(pass_: str) -> None:
    found = profiled(1, pass_)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.seconds == pytest.approx(found.timing.median / 1e3)
    expected = {ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION, OTHER} | ({OPTIMIZER} if pass_ == TRAINING else set())
    assert {part for part in PARTS if found.parts[part] > 0} - {OVERHEAD} == expected
    assert min(found.parts.values()) >= 0


@pytest.mark.parametrize("pass_", [INFERENCE, TRAINING])
def test_a_slow_attention_has_the_largest_share(pass_: str) -> None:
    shares = profiled(30, pass_).shares
    assert max(shares, key=lambda part: shares[part]) == ATTENTION
    assert shares[ATTENTION] > profiled(1, pass_).shares[ATTENTION]


def test_python_is_overhead() -> None:
    class Sleepy(Toy):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return super().forward(x)

    model = Sleepy().eval()
    step = step_of(model, torch.randn(1, 3, 32, 32), INFERENCE, autocast=False)
    found = profiling.samples(model, step, on_gpu=False, repeats=2, tick=lambda: None)
    parts = Profile.measured("toy", INFERENCE, 1, "float32", *found).parts
    assert max(parts, key=lambda part: parts[part]) == OVERHEAD
    assert parts[OVERHEAD] > 0.045


def test_every_gradient_belongs_where_its_operation_does() -> None:
    model = Toy(slow=3)
    step = step_of(model, torch.randn(2, 3, 48, 48), TRAINING, autocast=False)
    step()
    with profiling.scoped(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    owners: dict[tuple[int, int], str] = {}
    found: dict[str, list[str]] = {}
    roots = [event for event in profiler.events() if event.cpu_parent is None]
    for root in sorted(roots, key=lambda event: event.time_range.start):
        for event, part in profiling.attributed(root, OTHER, owners):
            if event.name.startswith("autograd::engine::evaluate_function"):
                found.setdefault(event.name.rpartition(" ")[2], []).append(part)
    attention = [name for name in found if name.startswith("ScaledDotProduct")]
    assert [found[name] for name in attention] == [[ATTENTION] * 3]
    assert set(found["AddmmBackward0"]) == {LINEAR}
    assert found["GeluBackward0"] == [ACTIVATION]
    assert found["NativeLayerNormBackward0"] == [NORM]
    # Of the patch embedding, whose norm counts with it.
    assert found["ConvolutionBackward0"] == found["NativeBatchNormBackward0"] == [CONVOLUTION]
    assert OTHER in found["AddBackward0"]


def test_hooks_go_when_the_profile_is_done() -> None:
    model = Toy()
    with profiling.scoped(model):
        assert any(module._forward_hooks for module in model.modules())
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name", ["dinat_mini", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_tiny"]
)
def test_modules_of_real_models_are_known(name: str) -> None:
    model = timm.create_model(name, device="meta")
    found: dict[str, list[nn.Module]] = {}
    for module, part in profiling.parts_of(model):
        found.setdefault(part, []).append(module)
    blocks = 12 if "swin" in name else 18
    assert len(found.get(ATTENTION, [])) == (0 if "convnext" in name else blocks)
    assert len(found[LINEAR]) >= 2 * blocks
    assert len(found[NORM]) >= blocks
    assert len(found[ACTIVATION]) >= blocks
    inside = {id(child) for module in found[CONVOLUTION] for child in module.modules() if child is not module}
    assert not inside & {id(module) for part in found.values() for module in part}
    leaves = {id(module) for part in found.values() for module in part} | inside
    assert all(id(m) in leaves for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm)))


def test_views_are_no_kernels() -> None:
    views = ("view", "flatten", "as_strided", "t", "split")
    assert all(profiling.is_view(f"aten::{name}") for name in views)
    assert not any(profiling.is_view(f"aten::{name}") for name in ("mm", "add_", "copy_", "gelu", "empty", "no_such"))


def event(name: str, *children: Any, kernels: dict[str, float] | None = None, sequence: int = -1) -> Any:
    """What the profiler tells of an operation on a GPU, as far as it is read."""
    made = SimpleNamespace(
        name=name, cpu_children=list(children), cpu_parent=None, device_type=DeviceType.CPU, thread=1, fwd_thread=1,
        sequence_nr=sequence, time_range=SimpleNamespace(start=0.0), self_cpu_time_total=1.0,
        kernels=[SimpleNamespace(name=k, duration=us) for k, us in (kernels or {}).items()],
    )  # fmt: skip
    for child in children:
        child.cpu_parent = made
    return made


def test_on_a_gpu_kernels_count_and_idle_time_is_overhead() -> None:
    attend = event("dinat_triton::fused", event("cuLaunchKernelEx", kernels={"forward_kernel": 300.0}), sequence=7)
    # The device has a copy of the scope itself, which is no kernel.
    scope = event("part: attention", attend, kernels={"part: attention": 900.0})
    backward = event("autograd::engine::evaluate_function: X", event("aten::mm", kernels={"k": 500.0}), sequence=7)
    events = [scope, event("aten::add", kernels={"add": 100.0}), backward, attend, *attend.cpu_children]
    tally = Tally.of(events, on_gpu=True)
    assert tally.parts[ATTENTION] == pytest.approx(800e-6)
    assert tally.parts[OTHER] == pytest.approx(100e-6)
    assert tally.operations == 3
    found = Profile.measured("m", TRAINING, 1, "bfloat16", [2e-3], [tally])
    assert found.parts[OVERHEAD] == pytest.approx(1100e-6)


def test_a_number_belongs_to_the_last_operation_that_saw_it() -> None:
    scopes = [event(f"part: {part}", event("aten::mm", sequence=7)) for part in (NORM, LINEAR)]
    backward = event("autograd::engine::evaluate_function: X", event("aten::mm"), sequence=7)
    assert Tally.of([*scopes, backward], on_gpu=False).parts[LINEAR] == pytest.approx(2e-6)


def test_kernels_that_took_longer_than_the_step_are_scaled() -> None:
    tally = Tally(dict.fromkeys(PARTS, 0.0) | {ATTENTION: 3.0, LINEAR: 1.0}, 2)
    found = Profile.measured("m", INFERENCE, 1, "float32", [2.0, 2.0, 2.0], [tally])
    assert (found.parts[ATTENTION], found.parts[LINEAR]) == (1.5, 0.5)
    assert sum(found.shares.values()) == pytest.approx(1)


# The table, the figure, the command


def stored(model: str, **ms: float) -> Profile:
    total = sum(ms.values())
    parts = dict.fromkeys(PARTS, 0.0) | {part: each / 1e3 for part, each in ms.items()}
    return Profile(model, INFERENCE, 1, "float32", parts, 7, Timing(total, total, total, 5))


def test_the_figure_shows_what_was_written(tmp_path: Path) -> None:
    profiles = [stored("a", attention=30, linear=50, overhead=20), stored("b", norm=10, attention=40)]
    harness.save(tmp_path / "profile.json", harness.environment(), [found.record() for found in profiles])
    found = [Profile.of(record) for record in harness.load_records(tmp_path / "profile.json")]
    assert found == profiles
    (ax,) = figures.plot_profiles(found, "a machine").axes
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in ax.patches]
    drawn = {(round(row), round(left, 6), round(width, 6)) for row, left, width in bars if width}
    assert drawn == {(0, 0, 30), (0, 30, 50), (0, 80, 20), (1, 0, 40), (1, 40, 10)}
    assert {text.get_text() for text in ax.texts} == {"30%", "50%", "20%", "80%"} | {"20%"}
    assert "ACTIVATION" not in profiling.report(found, "a machine")
    assert "30.0%" in profiling.report(found, "a machine")


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    import argparse

    parser = argparse.ArgumentParser()
    profiling.configure(parser)
    code = profiling.run(parser.parse_args([*map(str, arguments)]))
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("model", "pass_"), [("dinat_mini", INFERENCE), ("test_vit", TRAINING)])
def test_the_command_profiles_real_models(
    model: str, pass_: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, found = tmp_path / "profile.png", tmp_path / "profile.json"
    options = ["--model", model, "--device", "cpu", "--repeats", 1, "--out", out, "--json", found]
    code, text, _ = run(capsys, *options, *(["--train"] if pass_ == TRAINING else []))
    assert code == 0
    assert f"{pass_}, batch 1, float32" in text
    (record,) = json.loads(found.read_text())["records"]
    parts = record["also"]["parts_ms"]
    assert sum(parts.values()) == pytest.approx(record["ms"]["median"], rel=1e-2)
    assert all(parts[part] > 0 for part in (ATTENTION, LINEAR, NORM, CONVOLUTION, ACTIVATION, OTHER))
    assert (parts[OPTIMIZER] > 0) == (pass_ == TRAINING)
    height, width = matplotlib.image.imread(out).shape[:2]
    assert 1200 < width < 1500
    assert 200 < height < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dinat_mimi"], "unknown model 'dinat_mimi': did you mean dinat_mini"),
        (["--model", "qqqqqqqqqqqq"], "timm.list_models"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--out", "profile.gif"], "must end in .png, .svg or .pdf, got 'profile.gif'"),
        (["--json", "no/such/profile.json"], "there is no folder 'no/such'"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=message):
        run(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="sees no GPU"):
        run(capsys, "--device", "cuda")
