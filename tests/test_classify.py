"""`dinat-triton classify`."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dinat_triton.cli import main
from dinat_triton.commands import classify, inputs
from dinat_triton.models.checkpoints import save_state_dict
from dinat_triton.models.layouts import from_native


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    inputs.picture().save(path)
    return path


@pytest.fixture
def offline(monkeypatch):
    class Session:
        def head(self, *args, **options):
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")


def test_random_weights_run_when_told_so(picture, capsys):
    assert main(["classify", str(picture), "--weights", "random", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("dinat_mini with random weights, 224 x 224, center crop")
    assert len([line for line in out.splitlines() if " %  " in line]) == 3
    assert "mean nothing" in out


def test_without_network_it_says_so_and_stops(offline, picture, capsys):
    assert main(["classify", str(picture)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no weights of dinat_mini from the hub" in captured.err
    assert "--weights FILE" in captured.err
    assert main(["classify", "--or-random"]) == 0
    assert "random weights" in capsys.readouterr().out


def test_weights_of_a_file(tmp_path, picture, capsys):
    """The classifier is made to answer class 281, a tabby, to whatever it sees."""
    model = timm.create_model("nat_mini")
    with torch.no_grad():
        model.head.fc.bias[281] = 100
    path = tmp_path / "model.bin"
    save_state_dict(from_native(model.state_dict(), "transformers")[0], path)
    assert main(["classify", str(picture), str(picture), "--model", "nat_mini", "--weights", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("100.00 %    281  tabby") == 2
    assert f"weights of {path}" in out
    assert "mean nothing" not in out


def test_transforms_are_the_authors_or_the_hubs(monkeypatch, tmp_path, capsys):
    """On a wide image with a bright border, cropping the centre drops the border and squashing keeps it."""
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[:, :64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    seen = []
    model = timm.create_model("dinat_mini", depths=(1, 1, 1, 1), embed_dim=32, num_classes=10).eval()
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    monkeypatch.setattr(classify, "build", lambda *arguments: (model, "weights of a test"))
    for crop in ("center", "squash"):
        assert main(["classify", str(tmp_path / "wide.png"), "--crop", crop]) == 0
    center, squash = seen
    assert center.shape == squash.shape == (1, 3, 224, 224)
    assert (center > 0).sum() == 0
    assert 0.1 < (squash > 0).float().mean() < 0.15
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(center[0, :, 100, 100], black)


def test_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("hello")
    save_state_dict(timm.create_model("dinat_mini", num_classes=0).state_dict(), tmp_path / "backbone.pth")
    refused = {
        "--model resnet": "no model 'resnet'",
        "--weights missing.pth": "no such checkpoint file: missing.pth",
        "--weights backbone.pth": "it is a backbone",
        "missing.png --weights random": "missing.png",
        "notes.png --weights random": "no picture that can be read",
        "--top 0": "--top must be at least 1",
    }
    for arguments, says in refused.items():
        assert main(["classify", *arguments.split()]) == 2
        assert says in capsys.readouterr().err
