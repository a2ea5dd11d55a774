"""Plants the bugs of mutants.toml, each in a copy of the tree, and runs the tests that should catch it: `make mutants`.

With words, only bugs that have one in their name or file. Fails if a text is not found once, or a bug not caught.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def hunt(file: str, tests: str, name: str, old: str, new: str) -> list[str]:
    """The test that fails with the bug and passes without it, if any."""
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder, "tree"), symlinks=True, ignore=shutil.ignore_patterns(".*"))
        own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int("kernels/" in tests))}
        right, done = (tree / file).read_text(), []
        for text, option in ((right.replace(old, new), "-x"), (right, "--last-failed")):
            (tree / file).write_text(text)
            command = [sys.executable, "-m", "pytest", "-q", option, f"tests/{tests}.py"]
            done.append(subprocess.run(command, cwd=tree, env=os.environ | own, capture_output=True, text=True))
    failed = re.findall(r"FAILED (.*?)(?: - |\n)", done[0].stdout) if [x.returncode for x in done] == [1, 0] else []
    print(f"{name:<30}  {''.join(failed) or 'SURVIVES'}", flush=True)
    return failed


def main(words: list[str]) -> None:
    places = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    bugs = [(*place.split(), name, *texts) for place, some in places.items() for name, texts in some.items()]
    bugs = [bug for bug in bugs if any(word in f"{bug[0]} {bug[2]}" for word in words)]
    if unclear := [name for file, _, name, old, _ in bugs if (ROOT / file).read_text().count(old) != 1]:
        sys.exit(f"the old text of a bug must be in its file exactly once, that of these is not: {', '.join(unclear)}")
    caught = list(ThreadPoolExecutor(2).map(hunt, *zip(*bugs, strict=True)))
    print(f"{sum(map(bool, caught))} of {len(bugs)} bugs were caught")
    sys.exit(not all(caught))


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
