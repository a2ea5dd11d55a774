"""How much memory a run needs at most, and runs in processes of their own, where nothing was there before."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The allocator gives freed memory back at once, so that what counts is what is live.
EAGER_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
CALL = "import json, sys; from {module} import {name}; print(json.dumps({name}(**json.loads(sys.argv[1]))))"


def in_fresh_process(function: Callable[..., Any], environment: Mapping[str, str], **arguments: Any) -> Any:
    """What a function of a module returns in a new process. Arguments and result have to be JSON.

    Args:
        function: Importable by its name.
        environment: Variables to set there.
        arguments: Of the function.
    """
    code = CALL.format(module=function.__module__, name=function.__name__)
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    child = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"]
        raise RuntimeError(f"{function.__name__} in a fresh process: {lines[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at most during a run. To be called under EAGER_ALLOCATOR."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
