"""Findings of `dinat-triton tune` on this machine, in one file per device of the user's cache folder.

`$DINAT_TRITON_CACHE` names the folder, or else the platform's custom does. Reading never fails: a file that is damaged,
or was made for other sources, another compiler or another device, is ignored with a warning. Writing is atomic, and two
processes that write at once lose nothing. Neither torch nor Triton is needed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import log2
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from dinat_triton.files import replacing
from dinat_triton.geometry import SHIFT, Geometry

ENVIRONMENT = "DINAT_TRITON_CACHE"
PACKAGE = Path(__file__).parent
# Entries for a geometry hold for this many times as many or as few maps (batch * heads).
REACH = 4
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

# A table is a few kilobytes, and its numbers are sizes.
MAX_BYTES, MAX_DIGITS = 1 << 24, 9

T = TypeVar("T")


def cache_dir() -> Path:
    """The folder of the tables; it need not exist.

    Raises:
        RuntimeError: There is no home to keep it in, and no variable names another place.
    """
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dinat-triton"


@dataclass(frozen=True)
class Table:
    """A file of tuned entries, and what it must have been made for to be of use.

    Attributes:
        kind: What the entries are: `configs` of kernels, `tiles` of the `tiled` backend.
        device: The name of the device that they are for.
        compiler: What runs them, with its version.
        sources: Files of the package that decide how fast an entry is.
        parse: Makes an entry of a key and what the file holds for it, or raises ValueError or TypeError.
    """

    kind: str
    device: str
    compiler: str
    sources: tuple[str, ...]
    parse: Callable[[str, Any], Any]

    @property
    def path(self) -> Path:
        return cache_dir() / f"{self.kind}-{slug(self.device)}.json"

    @cached_property
    def stamp(self) -> dict[str, str]:
        """Entries of another stamp are of no use."""
        return {"device": self.device, "compiler": self.compiler, "sources": source_hash(self.sources)}

    def read(self) -> dict[str, Any]:
        """The entries by their keys, empty where there is no file."""
        try:
            path = self.path
            if not path.exists():
                return {}
        except (OSError, RuntimeError):  # no home, or one that nobody may look into
            return {}
        try:
            return {key: self.parse(key, entry) for key, entry in self._entries(path).items()}
        except BROKEN as error:
            advice = "run `dinat-triton tune` again, or delete the file"
            warnings.warn(f"ignoring the tuned table {path}: {_describe(error)}; {advice}", stacklevel=2)
            return {}

    def update(self, entries: Mapping[str, Any], **about: Any) -> Path:
        """Adds entries to the file, and takes out those that are None. What cannot be read is replaced.

        Args:
            entries: As they go into the file, by their keys.
            about: What else the file says about itself.

        Raises:
            RuntimeError: The folder cannot be written.
        """
        with self._writing() as path:
            try:
                kept = self._entries(path)
            except BROKEN:
                kept = {}
            merged = {key: entry for key, entry in (kept | dict(entries)).items() if entry is not None}
            with replacing(path) as beside:
                beside.write_text(dump({"stamp": self.stamp, **about}, self.kind, merged), encoding="utf-8")
        return path

    def check_writable(self) -> None:
        """Raises RuntimeError where `update` would, before anybody spends time on finding entries."""
        with self._writing() as path, tempfile.TemporaryFile(dir=path.parent):
            pass

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """The file's path, with its lock held."""
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                yield path
        except OSError as error:
            raise RuntimeError(
                f"the tuned table {path} cannot be written: {error}; {ENVIRONMENT} names another folder for it"
            ) from error

    def _entries(self, path: Path) -> dict[str, Any]:
        """Reads the entries of a file, or raises one of BROKEN."""
        if not path.is_file():
            raise ValueError("it is no file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        stamp, entries = data["stamp"], data[self.kind]
        for part, expected in self.stamp.items():
            if stamp[part] != expected:
                raise ValueError(f"it was made for {part} {stamp[part]!r}, not {expected!r}")
        for key, entry in entries.items():
            if any(len(number) > MAX_DIGITS for number in re.findall(r"\d+", key)):
                raise ValueError(f"its key {key[:60]!r} has a number of more than {MAX_DIGITS} digits")
            self.parse(key, entry)
        return entries


def source_hash(names: tuple[str, ...]) -> str:
    """A short hash of files of this package."""
    found = hashlib.sha256()
    for name in names:
        found.update((PACKAGE / name).read_bytes())
    return found.hexdigest()[:16]


def dump(head: Mapping[str, Any], name: str, entries: Mapping[str, Any]) -> str:
    """JSON with an entry per line, so that what changes reads well in a diff."""
    text = json.dumps(head, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items()))
    return f'{text},\n "{name}": {{\n{lines}\n }}\n}}\n'


def geometry_key(geometry: Geometry) -> str:
    """A geometry as a part of keys: `56x56-k7x7-d8x8`, then stride, causal axes and borders but shift."""

    def joined(values: tuple[int, ...]) -> str:
        return "x".join(str(int(v)) for v in values)

    parts = [joined(geometry.shape), f"k{joined(geometry.kernel_size)}", f"d{joined(geometry.dilation)}"]
    if any(s > 1 for s in geometry.stride):
        parts.append(f"s{joined(geometry.stride)}")
    if any(geometry.is_causal):
        parts.append(f"c{joined(geometry.is_causal)}")
    if any(border != SHIFT for border in geometry.border):
        parts.append("x".join(geometry.border))
    return "-".join(parts)


def shape_in(key: str) -> tuple[int, ...]:
    """The map's shape in a key that has a geometry as a part."""
    found = re.search(r"(?:^|/)(\d+(?:x\d+)*)-k", key)
    if found is None:
        raise ValueError(f"{key!r} names no geometry")
    return tuple(map(int, found[1].split("x")))


def nearest(entries: Mapping[str, T], prefix: str, maps: int) -> T | None:
    """The entry `prefix/<maps>` that was found for the most similar number of maps, within a factor of REACH."""

    def distance(key: str) -> float:
        return abs(log2(int(key.rpartition("/")[2]) / maps))

    start = f"{prefix}/"
    keys = [key for key in entries if key.startswith(start) and re.fullmatch(r"[1-9]\d*", key[len(start) :])]
    keys = [key for key in keys if distance(key) <= log2(REACH)]
    return entries[min(keys, key=distance)] if keys else None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(1 << 16), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _describe(error: BaseException) -> str:
    return str(error) if type(error) is ValueError else repr(error)
