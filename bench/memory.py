"""Peak memory of a run, and runs in processes of their own, where nothing was there before."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Options of glibc's mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function of a module in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at most during a run. To be called in a fresh process.

    The allocator gives freed memory back at once from here on, so that what counts is what is live.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(TRIM_THRESHOLD, 0)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
