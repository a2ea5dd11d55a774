"""The notebooks run from top to bottom, and what is stored of them is small and says nothing of a machine."""

import ast
import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from matplotlib.figure import Figure

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
pytest.importorskip("ipykernel", reason="the notebooks extra is not installed")

from notebooks.execute import FOLDER, execute  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLACES = re.compile(r"/(?:home|root|usr|opt|tmp|work|Users|mnt|var)/|[A-Z]:\\\\|site-packages|0x[0-9a-f]{8}")
SLOW = {"06_what_grows_with_what": pytest.mark.slow}


def shown_here(path: Path) -> None:
    """Runs a notebook in this process, which has imported torch and timm already, and draws what its cells end with."""
    scope: dict[str, object] = {"__name__": path.stem}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source.replace("%matplotlib inline\n", ""))
            last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, path.name, "exec"), scope)
            if last is not None and isinstance(shown := eval(compile(last, path.name, "eval"), scope), Figure):
                shown.savefig(io.BytesIO())


@pytest.mark.parametrize("path", [pytest.param(p, marks=SLOW.get(p.stem, ()), id=p.stem) for p in NOTEBOOKS])
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem[:2] in ("03", "05", "06") and find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    if "TRITON_INTERPRET" not in path.read_text():
        monkeypatch.chdir(FOLDER)
        shown_here(path)
        assert capsys.readouterr().err == ""
        return
    for cell in execute(path).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_is_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "What you will learn" in notebook.cells[0].source
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    for output in shown:
        assert output.output_type != "error"
        assert not PLACES.search(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")))
