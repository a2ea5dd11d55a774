"""The notebooks run from top to bottom, and what is stored of them is small and says nothing of a machine."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
pytest.importorskip("ipykernel", reason="the notebooks extra is not installed")

from notebooks.execute import FOLDER, execute  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLACES = re.compile(r"/(?:home|root|usr|opt|tmp|work|Users|mnt|var)/|[A-Z]:\\\\|site-packages|0x[0-9a-f]{8}")


SLOW = {"06_what_grows_with_what": pytest.mark.slow}


@pytest.mark.parametrize("path", [pytest.param(p, marks=SLOW.get(p.stem, ()), id=p.stem) for p in NOTEBOOKS])
def test_notebook_runs(path: Path) -> None:
    if path.stem[:2] in ("03", "05", "06") and find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    notebook = execute(path)
    for cell in notebook.cells:
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
