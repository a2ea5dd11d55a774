"""Layers against their peers: the peers compute what we do, or say why not, and the report tells what was found."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinat_triton import cli
from dinat_triton.bench import layers
from dinat_triton.bench.harness import Cell, Record, Results
from dinat_triton.bench.layers import Bench
from dinat_triton.bench.peers import PEERS, Attention, Inputs, Peer
from dinat_triton.layers import Layer
from dinat_triton.work import FORWARD, FORWARD_BACKWARD, TIMED, Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings("measured", "a machine", 1e10, {"float32": 1e11, "bfloat16": 2e11}, 1e9)
WHOLE = Layer("tiny@x/14x14-d2", (14, 14), 2, (2, 2), dim=8, batch=2)
RAGGED = Layer("tiny@x/9x11-d2", (9, 11), 2, (2, 2), kernel_size=(3, 5), dim=8)
HERE = ("natten", "sdpa", "gather", "gather-tuned", "swin")


def measured(layer: Layer, pass_: str, *peers: Peer, **options) -> dict[str, Record]:
    bench = Bench(CPU, seconds=0.0, **options)
    records = bench.measure(Cell(layer, "float32", pass_), [*layers.ours(CPU), *peers])
    return {record.implementation: record for record in records}


@pytest.mark.parametrize("layer", [WHOLE, RAGGED], ids=lambda layer: layer.short_name)
@pytest.mark.parametrize("pass_", TIMED)
def test_peers_agree_or_say_why_they_cannot_run(layer: Layer, pass_: str) -> None:
    found = measured(layer, pass_, *(PEERS[name] for name in HERE), PEERS["natten-hopper-fna"])
    expected = {"natten-hopper-fna": "RuntimeError: Can't run Hopper FNA; NATTEN was not built with libnatten."}
    if layer == RAGGED:
        expected["swin"] = "its windows of 7x7 do not tile this map"
    if pass_ != FORWARD:
        expected["natten"] = "NotImplementedError: FlexAttention does not support backward on CPU."
    reasons = {name: record.reason for name, record in found.items() if record.reason}
    assert reasons.keys() == expected.keys()
    assert all(reason.startswith(expected[name]) for name, reason in reasons.items())
    assert {name for name, record in found.items() if record.timing} == found.keys() - expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flex", "flex-tuned"])
@pytest.mark.parametrize("layer", [WHOLE, RAGGED], ids=lambda layer: layer.short_name)
def test_compiled_peers_agree(name: str, layer: Layer) -> None:
    layer = replace(layer, dim=16)
    assert measured(layer, FORWARD, PEERS[name])[name].reason is None
    assert measured(layer, FORWARD_BACKWARD, PEERS[name])[name].reason == "FlexAttention has no backward on the CPU"


@pytest.mark.parametrize("name", ["gather", "gather-tuned", "sdpa"])
def test_peers_have_our_gradients(name: str) -> None:
    inputs = Inputs.of(RAGGED, torch.float64, requires_grad=True)
    peer, mine = PEERS[name].prepare(RAGGED, inputs), layers.prepare_ours(RAGGED, inputs, "reference")
    found, expected = (torch.autograd.grad(a.call(), a.leaves, inputs.grad_out) for a in (peer, mine))
    torch.testing.assert_close(found, expected)


def planted(call) -> Peer:
    return Peer("planted", lambda layer, inputs: Attention(lambda: call(inputs), inputs.leaves))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda inputs: inputs.value + 1, "differs from ours by"),
        (lambda inputs: inputs.value * torch.nan, "differs from ours by nan"),
        (lambda inputs: 1 // 0, "ZeroDivisionError: "),
    ],
)
def test_what_is_wrong_or_fails_is_not_timed_and_stops_nobody(call, reason: str) -> None:
    found = measured(WHOLE, FORWARD, planted(call), PEERS["gather"])
    assert found["planted"].timing is None
    assert reason in str(found["planted"].reason)
    assert found["gather"].timing


def test_the_command_measures_prints_and_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "measure_ceilings", lambda device: CEILINGS)
    out = tmp_path / "layers.json"
    arguments = ["--layers", "224:7x7*", "--peers", "gather,swin", "--backward", "--device", "cpu"]
    arguments += ["--seconds", "0.001"]
    assert cli.main(["bench", "layers", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "dinat_mini@224/7x7-d1 h16 b1 float32 forward+backward" in printed
    results = Results.load(out)
    assert results.ceilings == CEILINGS
    assert {(r.implementation, r.pass_) for r in results.records if r.timing} == {
        (name, pass_) for name in ("tiled", "gather", "swin") for pass_ in (FORWARD, FORWARD_BACKWARD)
    }
    assert cli.main(["bench", "report", str(out)]) == 0
    assert printed.rpartition("\n\nwrote")[0] in capsys.readouterr().out
