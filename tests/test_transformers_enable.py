"""Enabling this package in transformers, undoing it, and what models keep of it."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from dinat_triton.integrations import nat
from dinat_triton.integrations.transformers import disable, enable, is_enabled
from tests.transformers_models import DINAT, SMALL, small


@pytest.fixture(autouse=True)
def _disabled():
    """transformers as it comes."""
    disable()
    yield
    disable()


def test_enabling_is_idempotent_and_reversible() -> None:
    own = (DINAT.NeighborhoodAttention.forward, DINAT.requires_backends)
    disable()  # nothing to do
    enable()
    with enable(), enable():
        assert (DINAT.NeighborhoodAttention.forward, DINAT.requires_backends) != own
    assert is_enabled()
    assert "nat" in transformers.CONFIG_MAPPING
    assert sys.modules["transformers"].NatModel is nat.NatModel
    disable()
    assert not is_enabled()
    assert (DINAT.NeighborhoodAttention.forward, DINAT.requires_backends) == own
    assert "nat" not in transformers.CONFIG_MAPPING
    assert not hasattr(sys.modules["transformers"], "NatModel")
    with enable():
        assert is_enabled()
    assert not is_enabled()


def test_models_that_exist_change_too(monkeypatch) -> None:
    monkeypatch.setattr(DINAT, "requires_backends", lambda *arguments: None)
    model, image = DINAT.DinatModel(small()), torch.randn(1, 3, 32, 32)
    with pytest.raises(transformers.utils.OptionalDependencyNotAvailable):
        model(image)
    with enable():
        assert model(image).last_hidden_state.isfinite().all()


def nat_small():
    return nat.NatModel(nat.NatConfig(**SMALL | {"dilations": None}))  # which enables by itself, as long as it builds


def dinat_small():
    with enable():
        return DINAT.DinatForImageClassification(small())


@pytest.mark.parametrize("make", [dinat_small, nat_small])
def test_a_model_takes_its_repair_along(make) -> None:
    """Out of the block that it was made in, and into copies."""
    model, image = make().eval(), torch.randn(1, 3, 32, 32)
    assert not is_enabled()
    expected = model(image)[0]
    assert expected.isfinite().all()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(image)[0], expected)
        assert (one.accepts_loss_kwargs, one.supports_gradient_checkpointing) == (False, True)


def test_other_requirements_stay(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(DINAT, "requires_backends", lambda _, backends: asked.append(backends))
    with enable():
        DINAT.requires_backends(DINAT.DinatModel, ["natten", "timm"])
        DINAT.requires_backends(DINAT.DinatModel, "timm")
    assert asked == [["timm"], ["timm"]]


@pytest.mark.parametrize(
    ("forward", "difference"),
    [
        (lambda self, hidden_states, **kwargs: None, "its forward takes"),
        (lambda self, hidden_states, output_attentions=False: self.na2d(hidden_states), "na2d"),
    ],
)
def test_code_that_is_not_known_is_refused(monkeypatch, forward, difference: str) -> None:
    monkeypatch.setattr(DINAT.NeighborhoodAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=rf"(?s)transformers {transformers.__version__} is not .*{difference}"):
        enable()
    assert DINAT.NeighborhoodAttention.forward is forward
    assert not is_enabled()
    assert "nat" not in transformers.CONFIG_MAPPING


def test_versions_that_are_too_old_are_refused(monkeypatch) -> None:
    # transformers imports itself a second time under its own name, so that `transformers` here can be the first.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(RuntimeError, match=r"must be 5\.14 or newer .* got 4\.57\.1"):
        enable()


HIDE = """
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == {name!r} else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
ENABLE = """
import sys
from dinat_triton.integrations.transformers import enable, is_enabled
assert not is_enabled()
enable()
import torch
from transformers import AutoModel, DinatConfig, DinatModel, NatConfig, NatForImageClassification, NatModel
config = DinatConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[2], [1]])
assert DinatModel(config).eval()(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()
assert type(AutoModel.from_config(config)) is DinatModel
"""


def run(code: str, path: Path) -> None:
    """Runs code in a process of its own: what is imported first matters here."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n"
    done = subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def failing(code: str, message: str) -> str:
    """Code that must fail, and goes on."""
    return f"""
try:
    {code}
except ImportError as error:
    assert {message!r} in str(error)
else:
    raise AssertionError("transformers' own DiNAT works: nothing is left to repair")
"""


def test_without_natten_and_after_a_failure(tmp_path: Path) -> None:
    attempt = failing(
        "from transformers import DinatConfig, DinatModel; DinatModel(DinatConfig())", "requires the natten"
    )
    run(HIDE.format(name="natten") + attempt + ENABLE + "assert 'natten' not in sys.modules", tmp_path)


def test_with_an_incompatible_natten_and_a_pickle_that_brings_its_repair(tmp_path: Path) -> None:
    """It lacks the functions that transformers imports, as all since 0.17.5."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '0.21.7'")
    (tmp_path / "natten" / "functional.py").touch()
    file, image = tmp_path / "model.pt", torch.randn(1, 3, 32, 32)
    with enable():
        model = DINAT.DinatForImageClassification(small()).eval()
        torch.save((model, image, model(image).logits), file)
    load = f"""
import torch
model, image, expected = torch.load({str(file)!r}, weights_only=False)
torch.testing.assert_close(model(image).logits, expected)
"""
    attempt = failing("from transformers import DinatModel", "cannot import name 'natten2dav'")
    run(attempt + load + ENABLE, tmp_path)


def test_without_transformers(tmp_path: Path) -> None:
    imports = "import dinat_triton.integrations.natten, dinat_triton.integrations.transformers as integration"
    advice = "pip install 'dinat-triton[transformers]'"
    run(HIDE.format(name="transformers") + imports + failing("integration.enable()", advice), tmp_path)
