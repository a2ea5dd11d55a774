"""`dinat-triton run`: scripts that know nothing of this package, and the processes they start."""

import os
import subprocess
import sys
from pathlib import Path

from dinat_triton import cli

ROOT = Path(__file__).parent.parent
SCRIPT = """
import multiprocessing, sys
import timm

def work(name):
    import natten
    model = timm.create_model("dinat_mini", num_classes=2, device="meta")
    is_usual = sys.path[0] == sys.argv[1] and __file__ == sys.argv[2]
    print(name, type(model).__module__, natten.__version__, is_usual, flush=True)

if __name__ == "__main__":
    work("script")
    worker = multiprocessing.get_context("spawn").Process(target=work, args=("worker",))
    worker.start()
    import transformers
    transformers.DinatModel(transformers.DinatConfig(depths=[1], num_heads=[1], embed_dim=16, dilations=[[1]]))
    worker.join()
    raise RuntimeError("its own")
"""


def test_a_script_and_its_spawned_worker_have_the_models(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ["--natten", "--natten-version", "0.17.3"]
    command = [sys.executable, "-m", "dinat_triton", "run", *options, str(script), str(tmp_path), str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [f"{name} dinat_triton.models.dinat 0.17.3 True" for name in ("script", "worker")]
    assert result.stdout.splitlines() == lines, result.stderr
    assert result.returncode == 1
    assert f'File "{script}"' in result.stderr  # its traceback


def test_what_is_no_script_is_refused(tmp_path: Path, capsys) -> None:
    assert cli.main(["run", str(tmp_path)]) == 2
    assert cli.main(["run", "--no-scores", __file__]) == 2
    assert "SCRIPT must be a Python file" in (message := capsys.readouterr().err)
    assert "--natten-version and --no-scores need --natten" in message
