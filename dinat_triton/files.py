"""Files that a command writes: refused before anything is computed, and whole or untouched whatever happens."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FIGURES = (".png", ".svg", ".pdf")


def check_target(
    path: Path, *, endings: Sequence[str] = (), force: bool = False, source: Path | None = None, folder: bool = False
) -> None:
    """Refuses a file that should not be written, or cannot be.

    Args:
        path: The file.
        endings: What its name may end in; anything by default.
        force: Whether it may be there already, and is replaced.
        source: A file that is being read: never replaced, under whatever name.
        folder: Whether its folder is made where there is none.
    """
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"a file's name must end in {_listed(endings)}, got {str(path)!r}")
    if path.exists():
        if source is not None and source.exists() and path.samefile(source):
            raise ValueError(f"{path} would overwrite the source, {source}")
        if not path.is_file():
            raise ValueError(f"{path} is there already, and is no file")
        if not force:
            raise ValueError(f"{path} is there already: --force replaces it")
    parent = Path(os.path.realpath(path)).parent
    if folder:
        parent = next(above for above in (parent, *parent.parents) if above.exists())
    if not parent.is_dir():
        raise ValueError(f"there is no folder {str(parent)!r} to write to")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {str(parent)!r} cannot be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place when the block ends and goes when the block fails."""
    path = Path(os.path.realpath(path))  # behind a link: the link stays
    beside = path.with_name(f".new-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
