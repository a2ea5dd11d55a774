"""How cost grows, counted from plans: linear where it has to be, and the figures drawn of what was written."""

import math
import time
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from dinat_triton import cli
from dinat_triton.bench import figures, harness, scaling
from dinat_triton.bench.ceilings import ceilings_of
from dinat_triton.bench.scaling import BATCH, DILATED, IMAGE, KERNEL, LOCAL, STUDIES, TILED, Case

ARCH = "sm_90"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return scaling.cases(ARCH)


def line(cases: list[Case], study: str, series: str, backend: str = ARCH) -> list[Case]:
    return [case for case in cases if (case.study, case.series, case.backend) == (study, series, backend)]


def exponent(pairs: list[tuple[float, float]]) -> float:
    """The power with which y grows, from the first to the last pair."""
    (x0, y0), *_, (x1, y1) = pairs
    return math.log(y1 / y0) / math.log(x1 / x0)


@pytest.mark.parametrize("backend", [ARCH, TILED])
@pytest.mark.parametrize("series", [LOCAL, DILATED])
def test_work_is_linear_in_tokens(series: str, backend: str, cases: list[Case]) -> None:
    found = line(cases, IMAGE, series, backend)
    assert [case.tokens for case in found] == [(size // 4) ** 2 for size in scaling.IMAGES]
    for of in ("flops", "bytes", "exps"):
        assert exponent([(case.tokens, getattr(case.work, of)) for case in found]) == pytest.approx(1, abs=0.05)


def test_full_attention_is_quadratic_and_the_kernels_linear_in_memory(cases: list[Case]) -> None:
    found = line(cases, IMAGE, LOCAL)[3:]
    assert exponent([(case.tokens, case.full_attention_bytes) for case in found]) == pytest.approx(2, abs=0.01)
    assert exponent([(case.tokens, case.gather_bytes) for case in found]) == pytest.approx(1)
    assert exponent([(case.tokens, case.memory or 0) for case in found]) == pytest.approx(1, abs=0.03)
    for case in found:
        assert 4 * case.tensor_bytes < (case.memory or 0) < 1.2 * 4 * case.tensor_bytes


def test_bytes_are_counted_by_hand(cases: list[Case]) -> None:
    case = line(cases, IMAGE, DILATED)[0]
    tensor = 2 * 56 * 56 * 32 * 2
    assert case.tensor_bytes == tensor
    assert case.full_attention_bytes == 4 * tensor + 2 * (56 * 56) ** 2 * 2
    assert case.gather_bytes == (4 + 2 * 49) * tensor
    # Four tensors and a log-sum-exp; 64 windows of 49 rows and columns of their own; one picture of 64 x 64 pairs.
    assert case.work.bytes == 4 * tensor + 4 * 2 * 56 * 56
    assert case.memory == case.work.bytes + 4 * 2 * 56 * 56 + 4 * 3 * 64 * 64


def test_evaluated_scores_are_never_fewer_than_useful_ones(cases: list[Case]) -> None:
    for case in cases:
        assert case.work.scores >= case.work.useful_scores
        assert case.work.useful_scores == math.prod(case.layer.kernel_size)


def test_dilated_layers_take_the_largest_dilation_that_fits(cases: list[Case]) -> None:
    for case in (case for study in (IMAGE, KERNEL, BATCH) for case in line(cases, study, DILATED)):
        span, size = case.layer.kernel_size[0] * case.layer.dilation[0], case.layer.shape[0]
        assert span <= size < span + case.layer.kernel_size[0]


def test_times_are_those_of_the_largest_limit(cases: list[Case]) -> None:
    rates = ceilings_of(ARCH)
    for case in cases:
        if case.backend == TILED:
            assert not case.limits
            assert case.memory is None
        else:
            assert case.limits == case.work.limits(rates, "bfloat16")
            assert case.seconds == max(
                case.work.bytes / rates["copy_bytes_per_s"], case.work.exps / rates["exps_per_s"]
            )


def test_a_batch_costs_what_its_images_cost(cases: list[Case]) -> None:
    first, *others = line(cases, BATCH, LOCAL)
    for case in others:
        assert case.work.bytes == case.batch * first.work.bytes
        assert case.tensor_bytes == case.batch * first.tensor_bytes


def test_it_takes_seconds() -> None:
    start = time.monotonic()
    scaling.cases("sm_80")
    assert time.monotonic() - start < 15


# Figures


def points(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    return {str(x.get_label()): [(float(a), float(b)) for a, b in x.get_xydata()] for x in figure.axes[panel].lines}


def test_figures_show_what_was_written(tmp_path: Path, cases: list[Case]) -> None:
    harness.save(tmp_path / "scaling.json", harness.environment(), [case.record() for case in cases])
    stored = [Case.of(record) for record in harness.load_records(tmp_path / "scaling.json")]
    assert stored == cases

    figure = figures.plot_scaling(stored)
    assert len(figure.axes) == 2 * len(STUDIES)
    for panel, study in enumerate(STUDIES):
        above, below = points(figure, panel), points(figure, panel + len(STUDIES))
        for case in (case for case in cases if case.study == study):
            who = "tiled, CPU" if case.backend == TILED else f"kernels, {ARCH}"
            assert (case.x, case.work.scores) in above[f"{who}, {case.series}"]
            for name, seconds in case.limits.items():
                label = f"limit: {name}" + (f", {case.series}" if name != "memory" else "")
                assert (case.x, pytest.approx(1e12 * seconds / case.queries)) in below[label]

    drawn = points(figures.plot_memory(stored), 0)
    found = line(cases, IMAGE, LOCAL)
    assert drawn["dinat-triton"] == [(case.tokens, case.memory) for case in found]
    assert drawn["every score of N x N written"] == [(case.tokens, case.full_attention_bytes) for case in found]


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["bench", "scaling", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, text, _ = run(capsys, "--out", tmp_path, "--json", tmp_path / "found.json")
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("4096") and "local" in line).split()
    assert row[:4] == ["4096", "local", "d1", ARCH]
    assert row[-1] == "memory"
    assert len(harness.load_records(tmp_path / "found.json")) == len(scaling.cases(ARCH))
    for name, width in (("scaling", 1320), ("memory", 840)):
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert abs(image.shape[1] - width) < 60
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_9"], "unknown architecture 'sm_9': did you mean sm_90"),
        (["--out", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["--json", "no/such/found.json"], "there is no folder 'no/such'"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert message in error
