"""Runs timm's own model tests on this package's models: a script, and the pytest plugin that it runs timm's tests with.

    python tests/timm_contract.py [MODEL ...] [-- PYTEST_ARGUMENT ...]

timm's tests are not part of its wheel, so its source archive is fetched into .timm-tests/, which git ignores. timm's
TORCH_BACKEND hook imports this package; the plugin adds its modules to the lists that the tests take models from, and
leaves out timm's own models.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import timm

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".timm-tests"
MODULES = ["dinat", "dinat_s", "isotropic"]
SELECTION = "DINAT_TRITON_TIMM_MODELS"


class Unavailable(RuntimeError):
    """timm's tests cannot be had here."""


def timm_tests() -> Path:
    """The folder of timm's tests, of the installed version."""
    folder = CACHE / f"timm-{timm.__version__}"
    if not (folder / "tests" / "test_models.py").is_file():
        archive = CACHE / f"{folder.name}.tar.gz"
        if not archive.is_file():
            _download()
        with tarfile.open(archive) as tar:
            # Only the tests: next to a folder named timm they would test that one instead of the installed.
            members = [m for m in tar if m.name.startswith((f"{folder.name}/tests/", f"{folder.name}/pyproject.toml"))]
            tar.extractall(CACHE, members=members, filter="data")
    return folder


def _download() -> None:
    arguments = ["download", "--no-binary", ":all:", "--no-deps", "--dest", str(CACHE), f"timm=={timm.__version__}"]
    for command in ([sys.executable, "-m", "pip"], ["pip"], ["uvx", "pip"]):
        if shutil.which(command[0]):
            result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                return
    raise Unavailable(f"timm's source archive cannot be fetched: {result.stderr.strip().splitlines()[-1:]}")


def run(models: list[str], *pytest_arguments: str) -> int:
    """Runs timm's tests/test_models.py; all registered models of this package where none is named."""
    folder = timm_tests()
    environment = os.environ | {"TORCH_BACKEND": "dinat_triton", SELECTION: " ".join(models)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environment.get("PYTHONPATH", "")]).strip(":")
    environment.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads cost more than they bring
    # -P: this folder and the archive's stay off the path.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "timm_contract", "-p", "no:cacheprovider", "-q"]
    command += ["--import-mode=importlib", "-W", "ignore::pytest.PytestUnknownMarkWarning", "tests/test_models.py"]
    return subprocess.run([*command, *pytest_arguments], cwd=folder, env=environment, check=False).returncode


def pytest_configure(config) -> None:
    import timm.models

    original = timm.list_models

    def list_models(filter="", module="", *args, **kwargs):
        names = original(filter, [*module, *MODULES] if isinstance(module, list) else module, *args, **kwargs)
        return [name for name in names if _is_selected(name)]

    timm.list_models = list_models


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out tests of models that timm's tests name themselves, and those that need the network."""

    def is_ours(item) -> bool:
        model = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        return isinstance(model, str) and _is_selected(model) and "pretrained" not in item.name

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]


def _is_selected(name: str) -> bool:
    arch = name.split(".")[0]
    wanted = os.environ.get(SELECTION, "").split()
    return any(timm.models.is_model_in_modules(arch, [module]) for module in MODULES) and (not wanted or arch in wanted)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    sys.exit(run(arguments[:split], *arguments[split + 1 :]))
