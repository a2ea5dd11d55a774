"""Names on the command line: layers by patterns, and suggestions for what nobody knows."""

import pytest
import torch

from dinat_triton import cli
from dinat_triton.bench.selection import find_device, find_layers, short_name
from dinat_triton.commands.bench import SUBJECTS
from dinat_triton.layers import layers_of


def names(*words: str) -> list[str]:
    return [f"{model}@{layer.name}" for model, layer in find_layers(words)]


def test_a_setting_alone_is_dinat_minis() -> None:
    assert find_layers(["coco"]) == [("dinat_mini", layer) for layer in layers_of("dinat_mini@coco")]


def test_commas_and_spaces_are_alike() -> None:
    assert names("dinat_mini@224,dinat_large@384") == names("dinat_mini@224", "dinat_large@384")
    assert names("224, 384") == names("224", "384")


def test_patterns_choose_layers() -> None:
    assert names("dinat_mini@224:56x56*") == ["dinat_mini@224/56x56-d1", "dinat_mini@224/56x56-d8"]
    assert names("dinat_large@384:*-d13", "224:7x7*") == ["dinat_large@384/96x96-d13", "dinat_mini@224/7x7-d1"]


def test_what_is_named_twice_is_taken_once() -> None:
    assert len(find_layers(["224:7x7*", "dinat_mini@224"])) == len(layers_of("dinat_mini@224"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dinat_mni@224", "unknown layers 'dinat_mni@224': did you mean dinat_mini@224"),
        ("cocoa", "unknown layers 'cocoa': did you mean coco"),
        ("dinat_mini", "unknown layers 'dinat_mini': did you mean dinat_mini@"),
        ("x", "unknown layers 'x': there are 224, 384, coco, dinat_mini@224, "),
        ("224:56x56-d7", "unknown layers of dinat_mini@224 '56x56-d7': did you mean 56x56-d8"),
        (",", "no layers were named"),
    ],
)
def test_unknown_layers_come_with_suggestions(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layers([word])


@pytest.mark.parametrize("layer", layers_of("dinat_mini@224"), ids=short_name)
def test_each_layer_has_a_name_of_its_own(layer) -> None:
    assert find_layers([f"224:{short_name(layer)}"]) == [("dinat_mini", layer)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--layers", "dinat_min@224"], "did you mean dinat_mini@224"),
        (["ops", "--peers", "flexx"], "unknown peer 'flexx': did you mean flex"),
        (["cpu", "--peers", "natten-hoper-fna"], "did you mean natten-hopper-fna"),
        (["ops", "--dtype", "float23"], "unknown dtype 'float23': did you mean float32"),
        (["cpu", "--dtype", "float16"], "unknown dtype 'float16'"),
        (["ops", "--batch", "0"], "--batch must be positive, got 0"),
        (["ops", "--budget", "-1"], "--budget must be positive, got -1.0"),
        (["cpu", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["ops", "--device", "cpv"], "--device must be cpu or cuda, got 'cpv'"),
        (["ops", "--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["models", "--models", "dinat_tinny"], "unknown model 'dinat_tinny': did you mean dinat_tiny"),
        (["models", "--compile", "swin"], "unknown model 'swin'"),
        (["models", "--groups", "tinny"], "unknown group 'tinny': did you mean tiny"),
        (["models", "--passes", "infer"], "did you mean inference"),
        (["models", "--seconds", "0"], "--seconds must be positive"),
        (["overhead", "--layers", "225"], "unknown layers '225': did you mean 224"),
        (["overhead", "--seconds", "0"], "--seconds must be positive"),
        (["first-call", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        *(
            ([subject, "--out", "missing/found.json"], "there is no folder 'missing' to write to")
            for subject in ("ops", "cpu", "models", "overhead", "first-call")
        ),
    ],
    ids=" ".join,
)
def test_wrong_use_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("subject", ["ops", "models", "overhead", "first-call"])
def test_a_gpu_that_is_not_there_is_refused(subject: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", subject, "--device", "cuda"]) == 2
    assert "--device cuda was asked for, and torch sees no GPU" in capsys.readouterr().err


def test_a_device_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device(None).type == "cuda"
    assert find_device("cpu").type == "cpu"
    assert str(find_device("cuda:1")) == "cuda:1"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_tells_its_options_and_exit_codes(subject: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", subject, "--help"])
    out = capsys.readouterr().out
    assert "exit codes: 0 all is well" in out
    assert "A.json" in out or subject in ("profile", "scaling")


def test_an_unknown_subject_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "opps"])
    assert "'opps'" in capsys.readouterr().err
