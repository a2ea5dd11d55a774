"""Layers against their peers: the peers compute what we do, or say why not, and the report tells what was found."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinat_triton import cli
from dinat_triton.bench import cpu, harness, ops
from dinat_triton.bench.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Record, Timing
from dinat_triton.bench.ops import Bench, Cell
from dinat_triton.bench.peers import PEERS, Attention, Inputs, Peer, Problem

CPU = torch.device("cpu")
CEILINGS = {
    "copy_bytes_per_s": 1e10,
    "product_flops_per_s": {"float32": 1e11, "bfloat16": 2e11},
    "exps_per_s": 1e9,
}
WHOLE = Problem("tiny", "tiny/14x14-d2", (14, 14), 2, 8, (7, 7), (2, 2), batch=2)
RAGGED = Problem("tiny", "tiny/9x11-d2", (9, 11), 2, 8, (3, 5), (2, 2))
PASSES = (FORWARD, BACKWARD, FORWARD_BACKWARD)
HERE = ("natten", "sdpa", "gather", "gather-tuned", "swin")


def bench(**options) -> Bench:
    return Bench(CPU, "tiled", CEILINGS, seconds=0.0, **options)


def measured(problem: Problem, pass_: str, *chosen: Peer, **options) -> dict[str, Record]:
    records = bench(**options).measure(Cell(problem, torch.float32, pass_), [ops.ours("tiled"), *chosen])
    return {record.implementation: record for record in records}


def peers_of(names: Sequence[str]) -> list[Peer]:
    return [PEERS[name] for name in names]


# The peers


@pytest.mark.parametrize("problem", [WHOLE, RAGGED], ids=lambda problem: problem.name)
@pytest.mark.parametrize("pass_", PASSES)
def test_peers_agree_or_say_why_they_cannot_run(problem: Problem, pass_: str) -> None:
    found = measured(problem, pass_, *peers_of(HERE))
    reasons = {name: record.reason for name, record in found.items() if record.reason}
    expected = {"swin": "its windows of 7x7 do not tile this map"} if problem == RAGGED else {}
    if pass_ != FORWARD:
        expected["natten"] = "NATTEN has no backward on the CPU"
    assert reasons == expected
    assert all(record.timing for name, record in found.items() if name not in reasons)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flex", "flex-tuned"])
@pytest.mark.parametrize("problem", [WHOLE, RAGGED], ids=lambda problem: problem.name)
def test_compiled_peers_agree(name: str, problem: Problem) -> None:
    problem = replace(problem, dim=16)
    assert measured(problem, FORWARD, PEERS[name])[name].reason is None
    assert measured(problem, FORWARD_BACKWARD, PEERS[name])[name].reason == "FlexAttention has no backward on the CPU"


@pytest.mark.parametrize("name", ["gather", "gather-tuned", "sdpa"])
def test_peers_have_our_gradients(name: str) -> None:
    inputs = Inputs.of(RAGGED, torch.float64, requires_grad=True)
    attention = PEERS[name].prepare(RAGGED, inputs)
    mine = ops.prepare_ours(RAGGED, inputs, "reference")
    found, expected = (torch.autograd.grad(a.call(), a.leaves, inputs.grad_out) for a in (attention, mine))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["cutlass-fna", "hopper-fna"])
def test_nattens_kernels_need_a_gpu(backend: str) -> None:
    reason = measured(WHOLE, FORWARD, PEERS[f"natten-{backend}"])[f"natten-{backend}"].reason
    assert reason == f"NATTEN's {backend} runs on NVIDIA GPUs only"


def test_natten_says_itself_why_a_backend_cannot_run() -> None:
    class OnGpu:
        """Passes for a tensor of a GPU up to where NATTEN looks at its own build."""

        device = torch.device("cuda")
        requires_grad = False

    inputs = replace(Inputs.of(WHOLE), query=OnGpu())  # type: ignore[arg-type]
    reason = PEERS["natten-hopper-fna"].obstacle(inputs)
    assert reason is not None
    assert "Hopper FNA" in reason


def test_a_bias_that_does_not_fit_is_said() -> None:
    class Large:
        shape = (1, 200, 304, 2, 32)

        @staticmethod
        def element_size() -> int:
            return 4

    inputs = replace(Inputs.of(WHOLE), query=Large())  # type: ignore[arg-type]
    assert PEERS["sdpa"].obstacle(inputs) == "its bias would take 28 GiB"


def test_swin_attends_within_its_windows() -> None:
    inputs = Inputs.of(WHOLE, requires_grad=True)
    attention = PEERS["swin"].prepare(WHOLE, inputs)
    (windows, _) = attention.leaves
    out = attention.call()
    assert windows.shape == (8, 49, 3 * 2 * 8)
    (grad,) = torch.autograd.grad(out.flatten(1, 2)[0, 0].sum(), windows)
    touched = grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [True] + [False] * 7
    assert (grad[0].abs().sum(1) > 0).all()


def test_swins_bias_is_ours() -> None:
    """Of one whole window, dilation 1, both are the same function."""
    problem = Problem("tiny", "tiny/7x7-d1", (7, 7), 2, 8, (7, 7), (1, 1), batch=3)
    inputs = Inputs.of(problem)
    found, expected = PEERS["swin"].prepare(problem, inputs), ops.prepare_ours(problem, inputs, "tiled")
    torch.testing.assert_close(found.call(), expected.call())


# What is measured


def planted(name: str, call, **options) -> Peer:
    return Peer(name, lambda problem, inputs: Attention(lambda: call(inputs), inputs.leaves), **options)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    wrong = planted("wrong", lambda inputs: inputs.value + 1)
    found = measured(WHOLE, FORWARD, wrong)["wrong"]
    assert found.timing is None
    assert found.reason is not None
    assert found.reason.startswith(ops.DIFFERS)


def test_nan_is_a_difference() -> None:
    wrong = planted("wrong", lambda inputs: inputs.value * torch.nan)
    assert "differs from ours by nan" in str(measured(WHOLE, FORWARD, wrong)["wrong"].reason)


def test_a_peer_that_fails_does_not_stop_the_others() -> None:
    def fail(inputs: Inputs):
        raise RuntimeError("first line\nsecond line")

    found = measured(WHOLE, FORWARD, planted("failing", fail), PEERS["gather"])
    assert found["failing"].reason == "RuntimeError: first line"
    assert found["gather"].timing
    assert found["tiled"].timing


def test_after_the_deadline_nothing_is_begun() -> None:
    found = measured(WHOLE, FORWARD, PEERS["gather"], deadline=time.monotonic() - 1)
    assert {record.reason for record in found.values()} == {ops.TIME_IS_UP}


@pytest.mark.parametrize(
    ("pass_", "products", "tensors"), [(FORWARD, 2, 4), (BACKWARD, 5, 7), (FORWARD_BACKWARD, 7, 11)]
)
def test_work_is_what_the_definition_asks_for(pass_: str, products: int, tensors: int) -> None:
    cell = Cell(WHOLE, torch.bfloat16, pass_)
    queries = 2 * 2 * 14 * 14
    found = ops.work(cell, torch.device("cuda"), CEILINGS)
    assert found["bytes"] == tensors * queries * 8 * 2
    assert found["flops"] == 2 * products * queries * 49 * 8
    exps = queries * 49 * (2 if pass_ == FORWARD_BACKWARD else 1)
    limits = (found["bytes"] / 1e10, found["flops"] / 2e11, exps / 1e9)
    assert found["floor_ms"] == pytest.approx(1e3 * max(limits), abs=1e-6)
    # What is called again and again lies in a cache.
    assert ops.work(cell, CPU, {**CEILINGS, "copy_bytes_per_s": 1.0})["floor_ms"] == pytest.approx(
        1e3 * max(limits[1:])
    )


def test_fractions_count_evaluated_and_useful_products() -> None:
    record = measured(RAGGED, FORWARD)["tiled"]
    assert record.timing
    seconds, found = record.timing.median / 1e3, record.work
    assert found["fraction_of_floor"] == pytest.approx(found["floor_ms"] / record.timing.median, abs=1e-4)
    assert found["fraction_of_products"] == pytest.approx(found["evaluated_flops"] / seconds / 1e11, abs=1e-4)
    assert found["useful_fraction_of_products"] == pytest.approx(found["flops"] / seconds / 1e11, abs=1e-4)
    assert found["evaluated_flops"] >= found["flops"]


# What is reported


def timed(name: str, ms: float | None, problem: Problem = WHOLE, pass_: str = FORWARD, **more) -> Record:
    timing = None if ms is None else Timing(ms, ms, ms, 9)
    return Record(problem.to_dict(), name, pass_, "float32", timing, **more)


def test_a_stored_result_becomes_a_table(tmp_path: Path) -> None:
    records = [
        timed(
            "tiled",
            0.1,
            work={"fraction_of_floor": 0.5, "fraction_of_products": 0.25, "useful_fraction_of_products": 0.2},
        ),
        timed("gather", 0.4),
        timed("natten", None, reason="not installed"),
        timed("natten", None, problem=RAGGED, reason="not installed"),
    ]
    harness.add_ratios(records, "tiled")
    harness.save(tmp_path / "found.json", harness.environment("cpu"), records)
    lines = ops.report(harness.load_records(tmp_path / "found.json"), "tiled").splitlines()
    assert lines[2].startswith("tiny@tiny/14x14-d2 b2 float32 forward ")
    assert lines[2].split()[4:] == ["0.100", "50%", "25%", "20%", "0.400", "(4.00x)", "-"]
    assert lines[-1] == "- natten, forward, float32: not installed (2 layers)"


def test_means_weigh_each_layer_as_often_as_the_model_has_it() -> None:
    often = replace(WHOLE, name="tiny/7x7-d1", weight=3)
    records = [timed("tiled", 1.0), timed("gather", 2.0), timed("tiled", 1.0, often), timed("gather", 4.0, often),
               timed("flex", 8.0, often)]  # fmt: skip
    harness.add_ratios(records, "tiled")
    (mean,) = ops.summarize(records, "tiled")
    assert mean["ratios"] == {"gather": pytest.approx((2 * 4**3) ** 0.25, abs=1e-3), "flex": 8.0}
    assert (mean["layers"], mean["count"], mean["measured"]) == ("tiny@tiny", 2, {"gather": 2, "flex": 1})
    assert "8.00x (1 of 2)" in ops.mean_table([mean], ["flex"])


def test_committed_means_are_those_of_their_records() -> None:
    for path in sorted((harness.ROOT / "bench" / "results").glob("*/cpu.json")):
        stored = [mean for mean in harness.load(path)["summary"] if mean["dtype"] == "float32"]
        found = [mean for mean in ops.summarize(harness.load_records(path), "tiled") if mean["dtype"] == "float32"]
        assert len(found) == len(stored) > 0
        for a, b in zip(found, stored, strict=True):
            assert a["ratios"] == pytest.approx(b["ratios"], abs=2e-3)


@pytest.mark.parametrize(
    ("reason", "implementation", "strict", "code"),
    [
        (f"{ops.DIFFERS} by 1.0e+00", "gather", True, 1),
        (f"{ops.DIFFERS} by 1.0e+00", "gather", False, 0),
        ("not installed", "gather", True, 0),
        ("RuntimeError: no", "tiled", False, 1),
        (ops.TIME_IS_UP, "tiled", True, 0),
    ],
)
def test_exit_codes(reason: str, implementation: str, strict: bool, code: int) -> None:
    assert ops.verdict([timed(implementation, None, reason=reason)], "tiled", strict) == code


# The commands


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured for long."""
    for module in (ops, cpu):
        monkeypatch.setattr(module, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(ops, "SECONDS", 0.0)
    monkeypatch.setattr(Bench, "seconds", 0.0)
    monkeypatch.setattr(cpu, "QUICK_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_ops_measures_prints_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "ops.json"
    arguments = ["--layers", "224:7x7*", "--peers", "gather,swin", "--backward", "--device", "cpu", "--out", str(out)]
    assert cli.main(["bench", "ops", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "dinat_mini@224/7x7-d1 float32 forward+backward" in printed
    assert "Geometric means" in printed
    data, records = harness.load(out), harness.load_records(out)
    assert {(r.implementation, r.pass_) for r in records} == {
        (name, pass_) for name in ("tiled", "gather", "swin") for pass_ in (FORWARD, FORWARD_BACKWARD)
    }
    assert data["ceilings"] == CEILINGS
    assert all(r.timing and {"bytes", "flops", "floor_ms", "fraction_of_floor"} <= r.work.keys() for r in records)


@pytest.mark.usefixtures("quick")
def test_a_spent_budget_leaves_reasons(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "ops", "--layers", "224:7x7*", "--peers", "--budget", "1e-9", "--device", "cpu"]) == 0
    assert ops.TIME_IS_UP in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_cpu_reports_targets_and_fails_only_if_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    memory = {pass_: {"pass": pass_, "over_q": 99.0, "reason": None} for pass_ in cpu.PASSES}
    monkeypatch.setattr(cpu, "peak_memory", lambda pass_, threads: memory[pass_])
    out = tmp_path / "cpu.json"
    arguments = ["bench", "cpu", "--layers", "224:7x7*", "--dtype", "float32", "--peers", "gather", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "99.00  MISSED" in capsys.readouterr().out
    assert cli.main([*arguments, "--strict"]) == 1
    data = harness.load(out)
    assert [m["over_q"] for m in data["memory"]] == [99.0, 99.0]
    # One layer of seven says nothing of a target over all.
    assert [t["met"] for t in data["targets"]] == [None, None, None, False, False]


def test_cpu_targets_are_judged_on_all_layers() -> None:
    mean = {"layers": "dinat_mini@224", "batch": 1, "dtype": "float32", "pass": FORWARD, "count": 7}
    ratios = {"flex": 31.0, "gather": 9.0}
    complete = mean | {"ratios": ratios, "measured": {"flex": 7, "gather": 7}}
    assert [v["met"] for v in cpu.judge([complete], [])][:3] == [True, False, None]
    partial = mean | {"ratios": ratios, "measured": {"flex": 6, "gather": 7}}
    assert [v["met"] for v in cpu.judge([partial], [])][:3] == [None, False, None]


def test_cpu_compiles_flex_in_float32_only() -> None:
    peer = cpu.float32_only(planted("flex", lambda inputs: inputs.value))
    assert peer.obstacle(Inputs.of(WHOLE)) is None
    assert "float32 only" in str(peer.obstacle(Inputs.of(WHOLE, torch.bfloat16)))


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process() -> None:
    found = cpu.peak_memory(FORWARD, threads=1)
    assert found["reason"] is None
    assert 0.5 < found["over_q"] < 50
    assert found["query_bytes"] == 200 * 304 * 64 * 4
