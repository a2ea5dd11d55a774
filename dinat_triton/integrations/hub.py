"""This package's attention as a folder that `kernels.get_kernel` loads: `make hub`.

A kernel of the hub is imported by a name of its own, perhaps beside an installed `dinat_triton`. So its files import
each other relatively, and its ops have a namespace of their own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from dinat_triton.version import __version__

ROOT = Path(__file__).parents[1]
START = "integrations/natten_0_20.py"
DATA = "kernels/tuned/*.json"
INIT = f'''"""Neighborhood attention of dinat-triton {__version__} under NATTEN's names."""

from .integrations.natten_0_20 import *  # noqa: F403
'''


def write(out: Path) -> Path:
    """Writes the folder anew, below `out`, and returns it."""
    sources = {file: (ROOT / file).read_text() for file in _with_imports(START)}
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:12]
    name = f"dinat_triton_{digest}"
    texts = {file: _renamed(file, text, name) for file, text in sources.items()}
    texts |= {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.glob(DATA)}
    metadata = {
        "name": "dinat-triton",
        "id": name,
        "version": 1,
        "license": "MIT",
        "python-depends": ["einops"],
        "backend": {"type": "cpu"},  # there is no word for all of them; the folder's name says it
    }
    folder = out / "torch-universal"
    shutil.rmtree(folder, ignore_errors=True)
    for file, text in (texts | {"__init__.py": INIT, "metadata.json": json.dumps(metadata, indent=2)}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def _with_imports(start: str) -> list[str]:
    """A file of the package, and those that it needs in turn."""
    found, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting.extend(_imports(file))
    return sorted(found)


def _imports(file: str) -> Iterator[str]:
    """Files that a file imports, and the packages they are in."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dinat_triton":
            parts = node.module.split(".")[1:]
            names = [parts[:end] for end in range(1, len(parts) + 1)] + [[*parts, alias.name] for alias in node.names]
            candidates = [f"{'/'.join(name)}{end}" for name in names for end in (".py", "/__init__.py")]
            yield from (candidate for candidate in candidates if (ROOT / candidate).is_file())


def _renamed(file: str, text: str, name: str) -> str:
    """A file's text with relative imports, and with another name wherever else the package's own stands."""
    dots = "." * (file.count("/") + 1)
    text = re.sub(r"from dinat_triton(?:\.([\w.]+))? import", lambda m: f"from {dots}{m[1] or ''} import", text)
    return text.replace("dinat_triton", name)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
