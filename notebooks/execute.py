"""Runs the notebooks and stores their outputs, small and the same on every machine.

python notebooks/execute.py                    # all of them
python notebooks/execute.py 02_receptive_field
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
COLOURS = 128


def execute(path: Path, timeout: int = 120) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom in its folder; the first cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    # What a notebook needs of the environment it sets itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DINAT_TRITON_BACKEND")}
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=environment)
    return notebook


def slim(notebook: nbformat.NotebookNode) -> None:
    """Drops what is not for readers: times, widget views without their state, colours that pictures do not need."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell.id = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.outputs = merge([output for output in cell.outputs if WIDGET not in output.get("data", {})])
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = quantise(output.data["image/png"])
                output.data["text/plain"] = "<figure>"


def merge(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins printed lines that arrived apart, so that how they were cut does not depend on timing."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def quantise(encoded: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").quantize(COLOURS)
    small = io.BytesIO()
    picture.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = execute(path)
        slim(notebook)
        nbformat.write(notebook, path)
        print(f"{path.stem}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
