"""Microseconds of Python per call: every level is measured, and nothing is launched."""

from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from dinat_triton import cli, na2d
from dinat_triton.bench import overhead
from dinat_triton.bench.harness import Results
from dinat_triton.bench.overhead import BACKBONE, HOST, IMAGE, LAUNCHED, NA2D, NEW, RECORDED, SEEN
from dinat_triton.commands.options import find_layers
from dinat_triton.kernels import attention
from dinat_triton.work import BACKWARD, FORWARD

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")


def run(path: Path, *arguments: str) -> Results:
    assert cli.main(["bench", "overhead", *arguments, "--out", str(path)]) == 0
    return Results.load(path)


def test_nothing_is_launched_and_nothing_stays_changed() -> None:
    qkv = torch.randn(3, 1, 14, 14, 2, 16)
    with overhead.nothing_launched():
        assert na2d(*qkv, 7, dilation=2, backend="triton").shape == qkv.shape[1:]
    with pytest.raises(RuntimeError, match="cannot run this call"):
        na2d(*qkv, 7, dilation=2, backend="triton")


def test_every_level_of_code_is_measured(tmp_path: Path) -> None:
    results = run(tmp_path / "o.json", "--layers", "224:14x14-d2", "--seconds", "0.02")
    found = {(r.pass_, r.implementation) for r in results.records if r.timing and r.implementation != LAUNCHED}
    assert found == {*product((FORWARD, RECORDED, BACKWARD), (NA2D, HOST))}


def test_new_sizes_cost_more_than_known_ones(tmp_path: Path) -> None:
    new, seen = run(tmp_path / "o.json", "--new-sizes", "2").records
    assert (new.implementation, seen.implementation) == (NEW, SEEN)
    assert new.timing
    assert seen.timing
    assert new.timing.calls == seen.timing.calls == 2
    assert new.timing.median > 3 * seen.timing.median


def test_a_step_is_the_forward_and_backward_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("forward", "backward"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, name=name, real=real, **k: ran.append(name) or real(*a, **k))
    with overhead.nothing_launched():
        overhead.step_of(IMAGE)()
    assert ran == ["forward", "backward"] * len(find_layers([BACKBONE]))
