"""The work of layers against hand counts, times out of files, and the figure drawn of both."""

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import triton
from matplotlib.figure import Figure

from dinat_triton import cli
from dinat_triton.bench import ceilings, figures, harness, outputs, roofline, selection
from dinat_triton.bench.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Record, Timing
from dinat_triton.bench.roofline import NEEDED, Point, Results
from dinat_triton.offline.estimate import TRAFFIC
from dinat_triton.offline.targets import find_target
from dinat_triton.plan import Plan
from dinat_triton.tiled import choose_tile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CPU_RESULTS = harness.FOLDER / "results" / "intel-xeon-processor" / "cpu.json"
ROUND = {
    "source": "measured",
    "device": "a round machine",
    "copy_bytes_per_s": 1e10,
    "product_flops_per_s": {"float32": 1e11, "bfloat16": 1e12},
    "exps_per_s": 1e9,
}
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")


def points(pass_: str = FORWARD, dtype: str = "float32", batch: int | None = None, *names: str) -> list[Point]:
    return roofline.points_of(selection.find_layers(names or ["dinat_mini@224"]), pass_, dtype, batch, CPU)


def with_times(point: Point, **ms: float) -> Point:
    return replace(point, timings={name: Timing(each, each, each, 9) for name, each in ms.items()})


def results_file(path: Path, found: list[Point], *, environment: dict[str, Any] | None = None, **more: Any) -> Path:
    records = [record for point in found for record in point.records()]
    harness.save(path, harness.environment() | (environment or {}), records, **more)
    return path


# Work


def test_useful_work_is_counted_by_hand() -> None:
    dense = next(point for point in points(batch=3) if point.title == "56x56 d8")
    queries, scores = 3 * 2 * 56 * 56, 3 * 2 * 56 * 56 * 49
    assert dense.work.useful_scores == 49
    assert dense.work.useful_flops == 2 * 2 * scores * 32
    assert dense.work.useful_bytes == 4 * queries * 32 * 4
    # Every residue class is one window, so nothing more is evaluated.
    assert (dense.work.scores, dense.work.flops, dense.work.exps) == (49, dense.work.useful_flops, scores)


@pytest.mark.parametrize("pass_", [FORWARD, FORWARD_BACKWARD])
def test_evaluated_work_is_that_of_the_plan_tiled_takes(pass_: str) -> None:
    for point in points(pass_):
        cost = Plan(point.layer.geometry, choose_tile(point.layer.geometry, 1, point.layer.heads)).cost()
        scores = cost.scores * point.layer.heads
        assert point.work.flops == 2 * NEEDED[pass_][0] * scores * 32
        assert point.work.exps == (1 if pass_ == FORWARD else 2) * scores
        assert point.work.bytes == point.work.useful_bytes
        assert point.work.flops >= point.work.useful_flops


@compiled
def test_work_on_a_gpu_is_that_of_its_launches() -> None:
    layers = selection.find_layers(["dinat_mini@224", "dinat_mini@coco"])
    found = {
        pass_: roofline.points_of(layers, pass_, "bfloat16", None, CUDA, find_target("sm_90"))
        for pass_ in (FORWARD, BACKWARD)
    }
    for point in (point for of_pass in found.values() for point in of_pass):
        assert point.work.flops > point.work.useful_flops
        assert point.work.bytes > point.work.useful_bytes
        assert point.batch == (16 if point.group == "dinat_mini@coco" else 128)
    local, dense = (next(x for x in found[BACKWARD] if x.title == f"56x56 d{d}") for d in (1, 8))
    # One sweep with seven tensors and a number per query, against two with eleven tensors.
    tokens = 128 * 2 * 56 * 56
    numbers = sum(TRAFFIC[name].numbers for name in ("query_backward", "key_backward"))
    assert dense.work.bytes == (7 * 64 + 4) * tokens
    assert local.work.bytes == (11 * 64 + 4 * numbers) * tokens
    # Slots of 64 x 64 around windows of 49 x 49.
    assert dense.work.scores == pytest.approx(64 * 64 / 49)
    assert dense.work.flops == 2 * 5 * 32 * dense.work.exps


def test_the_largest_limit_binds() -> None:
    point = points()[0]
    work = replace(point.work, bytes=1e9, flops=5e10, exps=2e8)
    limits = work.limits(ROUND, "float32")
    assert limits == pytest.approx({"memory": 0.1, "products": 0.5, "exps": 0.2})
    assert replace(point, work=work).bound(ROUND) == ("products", pytest.approx(0.5))
    assert work.limits(ROUND, "float16")["products"] == pytest.approx(0.05)
    assert replace(point, work=work, dtype="bfloat16").bound(ROUND)[0] == "exps"


# Results


def test_stored_times_find_their_layers() -> None:
    found = points()
    roofline.add_timings(found, Results.load([CPU_RESULTS]))
    stored = {
        (r["problem"]["name"], r["implementation"]): r["ms"]["median"]
        for r in json.loads(CPU_RESULTS.read_text())["records"]
        if (r["dtype"], r["pass"]) == ("float32", FORWARD) and r["ms"]
    }
    for point in found:
        assert point.ours == "tiled"
        for name in point.timings:
            assert point.seconds(name) == stored[point.layer.name, name] / 1e3
    assert {"tiled", "flex", "gather"} <= set(roofline.implementations(found))
    assert roofline.implementations(found)[0] == "tiled"


def test_times_of_another_batch_are_not_taken(tmp_path: Path) -> None:
    path = results_file(tmp_path / "r.json", [with_times(x, tiled=1) for x in points(batch=2)])
    with pytest.raises(ValueError, match=r"r\.json must have times of .*batch 1, float32, forward, got batch 2"):
        roofline.add_timings(points(batch=1), Results.load([path]))


def test_results_of_several_devices_are_refused(tmp_path: Path) -> None:
    files = [results_file(tmp_path / f"{name}.json", points(), environment={"device": name}) for name in ("a", "b")]
    with pytest.raises(ValueError, match="of a and of b"):
        Results.load(files)


def test_what_was_drawn_can_be_drawn_again(tmp_path: Path) -> None:
    timed, untimed, *_ = points()
    timed = with_times(timed, tiled=2.5, gather=20.0)
    path = results_file(tmp_path / "roofline.json", [timed, untimed], ceilings=ROUND)
    assert roofline.points_in(harness.load_records(path)) == [timed, untimed]
    assert ceilings.ceilings_in(path) == ROUND


# Figures


def drawn(figure: Figure) -> tuple[set[tuple[float, float]], dict[str, list[tuple[float, float]]]]:
    """What the first two panels show: the marks under the roof, and everyone's times by row."""
    roof, times = figure.axes[:2]
    marks = {tuple(line.get_xydata()[0]) for line in roof.lines if line.get_marker() == "o"}
    return marks, {str(line.get_label()): [tuple(xy) for xy in line.get_xydata()] for line in times.lines}


def test_the_figure_shows_the_numbers_of_the_file() -> None:
    found = points()
    roofline.add_timings(found, Results.load([CPU_RESULTS]))
    marks, times = drawn(figures.plot_roofline(found, ROUND))
    assert set(times) == set(roofline.implementations(found))
    for name, at in times.items():
        assert at == [(point.seconds(name), row) for row, point in enumerate(found) if name in point.timings]
    work, ours = found[0].work, found[0].seconds("tiled")
    assert (work.useful_flops / work.useful_bytes, work.useful_flops / ours) in marks
    assert (work.flops / work.bytes, work.flops / ours) in marks


def test_without_times_every_layer_lies_on_its_roof() -> None:
    found = points()
    for point in found:
        _, (intensity, rate) = figures.marks(point, ROUND)
        exps = ROUND["exps_per_s"] * point.work.flops / point.work.exps
        assert rate == pytest.approx(min(intensity * 1e10, 1e11, exps))
    figure = figures.plot_roofline(found, ROUND)
    assert not drawn(figure)[1]
    assert "not measured" in figure.axes[0].get_title(loc="left")


def test_bars_are_the_limits() -> None:
    found = points()
    bars = figures.plot_roofline(found, ROUND).axes[1].patches
    ends = [
        [bar.get_x() + bar.get_width() for bar in bars[n : n + len(found)]] for n in range(0, len(bars), len(found))
    ]
    expected = [[point.work.limits(ROUND, "float32")[limit] for point in found] for limit in roofline.LIMITS]
    for end, limit in zip(ends, expected, strict=True):
        assert end == pytest.approx(limit)


def test_names_in_the_margin_keep_apart() -> None:
    places = figures.spread([0.9, 0.5, 0.5, 0.51, 0.1], gap=0.1, most=0.95)
    ordered = sorted(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    assert max(places) <= 0.95
    assert places[0] == max(places)
    assert places[4] == min(places)
    assert max(figures.spread([0.9] * 5, gap=0.1, most=0.7)) == pytest.approx(0.7)


def test_the_readmes_figures_are_drawn_from_stored_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_figures", harness.ROOT / "notebooks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = []
    for name, (device, file, draw) in module.STORED.items():
        path = harness.FOLDER / "results" / device / file
        if path.exists():
            assert draw(path).axes[0].has_data()
            drawn.append(name)
    assert {"scaling", "memory", "roofline"} <= set(drawn)


# The command


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["roofline", *map(str, arguments)])
    return code, *capsys.readouterr()


@compiled
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_named_architecture_is_drawn_without_a_gpu(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / f"roof.{suffix}"
    code, text, _ = run(capsys, "--arch", "sm_90", "--layers", "224", "384", "--backward", "--out", out)
    assert code == 0
    assert "H200 (sm_90), vendor's figures, not measured: copies 4.3 TB/s" in text
    assert "dinat_mini@384 96x96 d13 b128" in text
    assert out.stat().st_size > 10_000
    if suffix == "png":
        height, width = matplotlib.image.imread(out).shape[:2]
        assert 1200 < width < 1500
        assert 900 < height < 1300


def test_results_are_drawn_against_their_own_ceilings(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: pytest.fail("measured although a file has them"))
    timed = [with_times(point, tiled=10.0, gather=25.0) for point in points()]
    path = results_file(tmp_path / "cpu.json", timed, ceilings=ROUND, environment={"device": "a round machine"})
    code, text, _ = run(capsys, "--results", path, "--json", tmp_path / "j.json", "--out", tmp_path / "f.svg")
    assert code == 0
    assert "Ceilings of a round machine, measured: copies 10 GB/s" in text
    row = next(line for line in text.splitlines() if "56x56 d8" in line).split()
    assert row[-3:] == ["10000.0", f"{timed[1].bound(ROUND)[1] / 0.01:.0%}", "2.5"]
    assert roofline.points_in(harness.load_records(tmp_path / "j.json")) == timed
    assert "a round machine" in (tmp_path / "f.svg").read_text()


def test_ceilings_of_this_machine_are_measured_for_its_own_results_only(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: ROUND | {"device": str(device)})
    timed = [with_times(point, tiled=10.0) for point in points()]
    code, text, _ = run(capsys, "--results", results_file(tmp_path / "here.json", timed))
    assert (code, "Ceilings of cpu, measured" in text) == (0, True)
    for changed in ({"device": "another CPU"}, {"threads": 99}):
        code, _, error = run(capsys, "--results", results_file(tmp_path / "there.json", timed, environment=changed))
        assert code == 2
        assert "there.json holds no ceilings, and they cannot be measured here" in error


def test_a_layer_faster_than_its_bound_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    timed = [with_times(point, tiled=1e-3) for point in points()]
    _, text, _ = run(capsys, "--results", results_file(tmp_path / "cpu.json", timed, ceilings=ROUND))
    assert "faster than its bound" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "dinat_mimi@224"], "did you mean dinat_mini@224"),
        (["--layers", "224:56x56-d9"], "did you mean 56x56-d8"),
        (["--arch", "sm_91"], "arch must be one of"),
        (["--arch", "sm_90", "--device", "cpu"], "leave one of them out"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--out", "figure.bmp"], "must end in .png, .svg or .pdf, got 'figure.bmp'"),
        (["--out", "no/such/folder/figure.png"], "there is no folder 'no/such/folder'"),
        (["--json", "no/such/folder/found.json"], "there is no folder 'no/such/folder'"),
        (["--results", "no.json"], "no.json"),
        (["--results", CPU_RESULTS, "--arch", "sm_90"], "--arch sm_90 does not go with results of Intel"),
        (["--results", CPU_RESULTS, "--device", "cuda"], "--device cuda does not go with results of Intel"),
        (["--results", CPU_RESULTS, "--batch", "77"], "cpu.json must have times of dinat_mini@224, batch 77"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list, message: str, capsys: pytest.CaptureFixture) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, error = run(capsys, "--device", "cuda")
    assert (code, "torch sees no GPU here" in error) == (2, True)
    gpu = {"device": "NVIDIA H200", "device_type": "cuda"}
    code, _, error = run(capsys, "--results", results_file(tmp_path / "r.json", points(), environment=gpu))
    assert (code, "NVIDIA H200, which is not here: name its architecture with --arch" in error) == (2, True)


@compiled
def test_results_of_a_gpu_are_drawn_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layers = selection.find_layers(["dinat_mini@224"])
    timed = [
        with_times(point, **{"triton": 0.1, "flex": 0.3})
        for point in roofline.points_of(layers, FORWARD, "bfloat16", None, CUDA, find_target("sm_90"))
    ]
    gpu = {"device": "NVIDIA H200", "device_type": "cuda"}
    path = results_file(tmp_path / "layers.json", timed, environment=gpu, ceilings=ROUND)
    code, text, _ = run(capsys, "--results", path, "--arch", "sm_90", "--out", tmp_path / "f.png")
    assert code == 0
    assert "a round machine, measured" in text
    assert "3.0" in next(line for line in text.splitlines() if "56x56 d8" in line)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"schema": 99}', "schema 99"), ('{"schema": 2}', "no records"), ("{", "not a whole result file")],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    code, _, error = run(capsys, "--results", path)
    assert code == 2
    assert message in error


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)
    code, _, error = run(capsys, "--out", tmp_path / "figure.png")
    assert (code, "cannot be written to" in error) == (2, True)


def test_a_record_without_a_time_says_so() -> None:
    (record,) = points()[0].records()
    assert isinstance(record, Record)
    assert record.timing is None
    assert "not measured" in str(record.reason)
