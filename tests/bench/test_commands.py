"""Wrong use of the commands that measure: one line that names what is wrong, before anything is done."""

from pathlib import Path

import pytest
import torch

from dinat_triton import Geometry, cli
from dinat_triton.commands.options import find_layers
from dinat_triton.layers import layers_of
from dinat_triton.offline.targets import TARGETS


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench layers --layers dinat_min@224", "unknown layers 'dinat_min@224': did you mean dinat_mini@224"),
        ("bench cpu --layers 224:56x56-d7", "unknown layers of dinat_mini@224 '56x56-d7': did you mean 56x56-d8"),
        ("bench ops --peers flexx", "unknown peer 'flexx': did you mean flex"),
        ("bench layers --dtype float23", "unknown dtype 'float23': did you mean float32"),
        ("bench layers --batch 0", "--batch must be positive, got 0"),
        ("bench layers --device meta", "--device must be cpu or cuda, got 'meta'"),
        ("bench layers --out missing/found.json", "there is no folder"),
        ("bench layers --out found.txt", "must end in .json"),
        ("bench models --models dinat_tinny", "unknown model 'dinat_tinny': did you mean dinat_tiny"),
        ("bench models --device cpu --graph", "CUDA graphs need a GPU"),
        ("bench overhead --new-sizes -1", "--new-sizes must be positive"),
        ("bench report {file}", "not a whole result file"),
        ("roofline --arch sm_91", "arch must be one of"),
        ("roofline --arch sm_90 --out {file}", "is there already: --force replaces it"),
        ("roofline --results {file} --arch sm_90", "do not go together"),
        ("inspect --dim 300", "--dim must be between 1 and 256, got 300"),
        ("inspect --arch sm_77", "unknown arch 'sm_77': did you mean sm_90"),
        ("tune --arch volta", f"there are {', '.join(TARGETS)}"),
        ("tune --budget nan", "the budget must be a positive number of seconds, got nan"),
        ("tune --device cpu --out x.json", "only tiles of the CPU are tuned"),
        ("tune --arch sm_80 sm_90 --out x.json", "--out must be a folder for 2 architectures"),
        ("tune --arch sm_80 --device cuda", "sees no GPU"),
    ],
)
def test_wrong_use_is_named(command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "found.json"
    file.write_text("{")
    assert cli.main(command.format(file=file).split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("The machine was busy")]
    assert message in line


def test_words_name_layers() -> None:
    mini = layers_of("dinat_mini@224")
    assert find_layers(["224"]) == find_layers(["dinat_mini@224, 224:7x7*"]) == mini
    assert find_layers(["224:56x56*"]) == mini[:2]
    assert [find_layers([f"224:{layer.short_name}"]) for layer in mini] == [[layer] for layer in mini]
    assert {layer.batch for layer in find_layers(["coco"], batch=128)} == {16}
    (video,), strided = find_layers(["ltx@decoder:79*"]), find_layers(["natten@tables:*-s*"])
    assert (video.geometry, video.heads, video.dim, video.has_bias) == (Geometry((79, 192, 192), (11,)), 4, 64, False)
    assert [layer.geometry.stride for layer in strided] == [(16, 16), (16, 8, 8)]
