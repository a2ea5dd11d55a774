"""`import natten` as this package: for code whose import line may not change.

`install` makes a folder with a package `natten` in it, and with what an installed package is recognised by, and puts
that in front on Python's path. Nothing is imported in a special way, so everything that looks for NATTEN finds it:
`import`, `find_spec`, `importlib.metadata`, and processes that are started later, which inherit the path.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from dinat_triton.integrations.replacements import Enabled

PACKAGE = """\
from {module} import populate

populate({version!r}, {with_scores!r})
"""
METADATA = "Metadata-Version: 2.1\nName: natten\nVersion: {version}\nSummary: dinat-triton under NATTEN's name\n"


_folder: Path | None = None  # on the path while installed


def install(version: str | None = None, *, scores: bool = True) -> Enabled:
    """From now on `import natten` is this package, here and in processes started from here, until `uninstall`.

    Args:
        version: Of NATTEN, from "0.14" to "0.21": decides which names exist and what the order of arguments means. By
            default all names exist, `__version__` is the newest, and a call that could mean two things is refused.
        scores: Whether there are the unfused functions, `na*d_qk` and their like. Code that works with old and new
            versions takes them where it finds them, though the fused ones need a fraction of the memory.

    Raises:
        RuntimeError: Another natten is imported already, or this is installed already.
        ValueError: The version is not one of NATTEN's.
    """
    global _folder
    from dinat_triton.integrations.natten.versions import NEWEST, line_of

    if version is not None:
        line_of(version)
    if _folder is not None:
        raise RuntimeError("natten is installed already: call uninstall() first")
    if (found := sys.modules.get("natten")) is not None:
        raise RuntimeError(f"another natten was imported from {found.__file__}: call install() before anything else")
    _folder = Path(tempfile.mkdtemp(prefix="dinat-triton-natten-"))
    _write(_folder / "natten" / "__init__.py", PACKAGE.format(module=__name__, version=version, with_scores=scores))
    _write(_folder / f"natten-{version or NEWEST}.dist-info" / "METADATA", METADATA.format(version=version or NEWEST))
    sys.path.insert(1, str(_folder))  # the first is the script's own
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    atexit.register(_remove, _folder, os.getpid())
    return Enabled(uninstall)


def uninstall() -> None:
    """Undoes `install`: the next `import natten` finds whatever was there before. Does nothing if not installed."""
    global _folder
    if _folder is None:
        return
    sys.path[:] = [entry for entry in sys.path if entry != str(_folder)]
    entries = [e for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e not in ("", str(_folder))]
    os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    if not entries:
        del os.environ["PYTHONPATH"]
    for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
        del sys.modules[name]
    _remove(_folder, os.getpid())
    _folder = None


def populate(version: str | None, with_scores: bool) -> None:
    """Fills the package `natten`, which is being imported, and all its modules."""
    from dinat_triton.integrations.natten.versions import namespace

    names = namespace(version, with_scores)
    package = sys.modules["natten"]
    for path in names.keys() - {""}:
        module = sys.modules[f"natten.{path}"] = ModuleType(f"natten.{path}", f"`natten.{path}` on dinat-triton.")
        is_package = any(name.startswith(f"{path}.") for name in names)
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=is_package)
        if is_package:
            module.__path__ = []
        vars(module).update(names[path])
    for path in sorted(names):  # after the modules, so that `natten.na2d` is the function where there is one
        parent, _, child = f"natten.{path}".rpartition(".")
        if path:
            setattr(sys.modules[parent], child, sys.modules[f"natten.{path}"])
    vars(package).update(names[""])
    package.__all__ = sorted(names[""])  # type: ignore[attr-defined]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a fork has no business with its parent's folder
        shutil.rmtree(folder, ignore_errors=True)
