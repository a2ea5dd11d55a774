"""Exported files against the models they were made from, and the op's open form against the reference."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import dinat_triton as dt
from dinat_triton import cli, reference, tile_form
from dinat_triton.export import FORMATS, export, writing
from dinat_triton.models.dinat import DiNAT
from tests.oracles.sampling import BORDERS, samples

if torch.__version__ < "2.14":
    pytest.skip("no export in this torch", allow_module_level=True)


@pytest.mark.parametrize("sample", samples(16, seed=3, max_tokens=400, borders=BORDERS), ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_open_form_is_the_op(sample, biased: bool) -> None:
    geometry = dt.Geometry(sample.shape, **sample.kwargs())
    query, key, value = (torch.randn(2, *geometry.shape, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    rpb = torch.randn(4, *geometry.bias_shape) if biased else None
    if rpb is not None:
        rpb[0] = -torch.inf
    expected = reference.attention(query, key, value, rpb, None, geometry, 0.3, 0.0)
    torch.testing.assert_close(tile_form.attention([query, key, value], rpb, geometry, 0.3), expected)


class Attention(nn.Module):
    """The op alone, on a packed map."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.rpb = rank, nn.Parameter(torch.randn(2, *[5] * rank))

    def forward(self, qkv: Tensor) -> Tensor:
        na = (dt.na1d, dt.na2d, dt.na3d)[self.rank - 1]
        causal = (True, False, False)[: self.rank]
        return na(*qkv.unbind(-3), 3, stride=2, dilation=2, is_causal=causal, rpb=self.rpb)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_op_goes_to_onnx_by_itself(rank: int, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    attention, maps = Attention(rank).eval(), torch.randn(3, *(13, 7, 6)[:rank], 3, 2, 8)
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(attention, (maps[:2],), dynamo=True, dynamic_shapes=batch, verbose=False).save(
        tmp_path / "na.onnx"
    )
    session = ort.InferenceSession(tmp_path / "na.onnx")
    found = session.run(None, {session.get_inputs()[0].name: maps.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), attention(maps).detach())


def small(**options) -> DiNAT:
    """A model with dilation, padding and a layer of several tile classes on an image of 40 x 52."""
    return DiNAT(embed_dim=32, depths=(1, 1), kernel_size=3, dilations=[1, 3], num_classes=5, **options).eval()


# AOTInductor's compiler takes half a minute.
QUICK = [pytest.param(to, marks=[pytest.mark.slow] if to == "aoti" else []) for to in FORMATS]


@pytest.mark.parametrize("to", QUICK)
def test_every_format_computes_what_the_model_does(to: str, tmp_path: Path) -> None:
    model, path, images = small(), tmp_path / f"model{FORMATS[to].ending}", torch.randn(3, 3, 40, 52)
    written = export(model, path, to, size=(40, 52), class_names=list("abcde"))
    expected = model(images)
    assert written.difference < 1e-4 * written.largest
    torch.testing.assert_close(FORMATS[to].load(FORMATS[to].files(path))(images), expected, rtol=0, atol=1e-5)
    metadata = FORMATS[to].metadata(path)
    assert (metadata["size"], metadata["class_names"]) == ("[40, 52]", '["a", "b", "c", "d", "e"]')
    assert {"mean", "std", "crop_pct", "crop_mode", "interpolation"} <= metadata.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in FORMATS[to].files(path))


def test_onnx_in_int8_is_smaller_and_close(tmp_path: Path) -> None:
    model, path = timm.create_model("dinat_mini", depths=(1, 1, 1, 1), dilations=1).eval(), tmp_path / "model.onnx"
    written = export(model, path, "onnx", size=(40, 52), dtype=torch.int8)
    assert 0 < written.difference < 0.05 * written.largest
    assert path.stat().st_size < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="dtype for format 'pt2' must be one of"):
        export(model, tmp_path / "model.pt2", "pt2", dtype=torch.int8)


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("dinat_mini", {}, (256, 192)),
        ("dinat_mini", {"dilations": "coco"}, (416, 320)),
        ("dinat_s_tiny", {}, (224, 224)),
        ("dinat_isotropic_small", {}, (224, 224)),
    ],
)
def test_models(name: str, options: dict, size: tuple[int, int], to: str, tmp_path: Path) -> None:
    if to == "aoti":  # each further block is compiled anew, which takes minutes
        options = options | ({"depth": 2} if "isotropic" in name else {"depths": (2, 2, 2, 2)})
    model = timm.create_model(name, **options)
    assert export(model, tmp_path / f"model{FORMATS[to].ending}", to, size=size).difference < 1e-4


def test_a_file_that_is_off_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = torch.export.export(nn.Sequential(small(), nn.Softmax(-1)), (torch.randn(2, 3, 32, 32),))
    monkeypatch.setattr(writing, "trace", lambda *_, **__: scaled)
    with pytest.raises(RuntimeError, match="would differ from the model by"):
        export(small(), tmp_path / "model.pt2", "pt2", size=(32, 32), batch=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--to onnx -o model.onnx", "needs onnxruntime: pip install 'dinat-triton[export]'"),
        ("--to pt2 -o model.pt2 --size 31 64", "image must be at least 32 x 32, got 31 x 64"),
        ("--to pt2 -o model.onnx", "must end in .pt2"),
        ("--to pt2 -o nowhere/model.pt2", "there is no folder"),
        ("--to pt2 -o model.pt2 --batch 0", "batch must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: str, reason: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", "dinat_mini", "--weights", "random", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of onnx, openvino, aoti, torchscript, pt2, got 'tflite'"):
        export(small(), tmp_path / "model", "tflite")
