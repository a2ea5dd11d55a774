"""The wheel, the namespace, and what must not happen on import."""

import inspect
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import dinat_triton as dt

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "models", "bench")
WITHOUT_TRITON_AND_TIMM = """
import sys
class Hidden:
    names = {"triton", "timm"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
sys.path.insert(0, ".")

import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dinat_triton as dt
from dinat_triton.dispatch import why_not
x = torch.randn(1, 6, 6, 2, 4)
assert dt.na2d(x, x, x, 3).shape == x.shape
print(dt.__file__, why_not("triton", x, x, x), *(w.message for w in caught if "timm" in str(w.message)))

Hidden.names = {"triton"}
from dinat_triton.models import dinat, dinat_s, isotropic
"""
LIGHT = """
import sys, torch, timm, dinat_triton
print(*{"matplotlib", "transformers"} & set(sys.modules))
# With the root on the path, transformers must not take `kernels/` for the hub's package of that name.
sys.path.insert(0, ".")
from transformers import BertModel
"""


def python(code: str, *, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    # A copy, without the working tree's build folder: nothing stale can get in.
    source = out / "source"
    source.mkdir()
    for name in ("dinat_triton", *LINKED, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    for name in LINKED:  # text, as git writes them where it makes no links: on Windows
        link = source / "dinat_triton" / name
        link.unlink()
        link.write_text(f"../{name}")
    return out / python(build, cwd=source).splitlines()[-1]


def test_the_wheel_is_small_and_complete(wheel: Path) -> None:
    assert wheel.stat().st_size < 1 << 20
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"dinat_triton"}
    parts = ("kernels/forward.py", "models/dinat.py", "bench/harness.py", "explore/page.html", "py.typed")
    assert {f"dinat_triton/{part}" for part in parts} <= set(names)
    packaged = {n for n in names if n.startswith("dinat_triton/")}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "dinat_triton").rglob("*.py")}
    sources |= {f"dinat_triton/{p.relative_to(ROOT)}" for folder in LINKED for p in (ROOT / folder).glob("**/*.py")}
    sources |= {f"dinat_triton/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("**/*.json")}
    assert sources <= packaged


def test_the_wheel_works_without_triton_and_timm_and_says_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    printed = python(WITHOUT_TRITON_AND_TIMM, cwd=tmp_path)
    assert str(tmp_path) in printed or printed.startswith("./")
    assert "the package triton is not installed" in printed
    assert "the models are not registered: they need timm >= 1.0.31" in printed


def test_import_is_light_and_shadows_no_other_distribution() -> None:
    """Neither matplotlib nor transformers is loaded before it is used."""
    assert python(LIGHT).strip() == ""
    assert not [*ROOT.glob("kernels/__init__.py"), *ROOT.glob("models/__init__.py")]


def test_the_public_surface() -> None:
    assert dt.__version__ == version("dinat-triton")
    classes = {"Geometry", "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "Plan"}
    assert set(dt.__all__) == classes | {"__version__", "merge", "na1d", "na2d", "na3d", "use_backend"}
    window = ["stride", "dilation", "is_causal", "border"]
    options = [*window, "rpb", "scale", "dropout_p", "return_lse", "backend", "sizes", "key_mask"]
    for function in (dt.na1d, dt.na2d, dt.na3d):
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters] == ["query", "key", "value", "kernel_size", *options]
        assert {p.name for p in parameters if p.kind == p.KEYWORD_ONLY} == set(options)
    of_module = [*window, "rel_pos_bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop"]
    for module in (dt.NeighborhoodAttention1D, dt.NeighborhoodAttention2D, dt.NeighborhoodAttention3D):
        parameters = inspect.signature(module).parameters
        assert list(parameters) == ["embed_dim", "num_heads", "kernel_size", *of_module, "device", "dtype"]
