"""timm's own model tests, on one model: what `make test-timm` runs on all."""

import os
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests import timm_contract

MODELS = ["dinat_mini"]
# Tests of timm 1.0.31 that take their models from the registry. Fewer would mean that a filter left ours out.
NUM_TESTS = 11


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Outcomes by test function."""
    report = tmp_path_factory.mktemp("timm") / "report.xml"
    try:
        timm_contract.run(MODELS, f"--junitxml={report}", "-p", "no:warnings", "--tb=short")
    except timm_contract.Unavailable as reason:
        pytest.skip(str(reason))
    outcomes: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes.setdefault(case.get("name", "").split("[")[0], Counter())[outcome] += 1
    return outcomes


def test_all_pass(results):
    assert {name: outcomes for name, outcomes in results.items() if outcomes != {"passed": len(MODELS)}} == {}
    assert len(results) == NUM_TESTS


@pytest.mark.slow
@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN does not say where timm's train.py is")
def test_train_script(tmp_path):
    """timm's train.py, which its wheel and source archive lack, on an image folder of two colours."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in range(2):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = generator.integers(0, 80, (64, 64, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    options = "--device-modules dinat_triton --model dinat_mini --model-kwargs depths=(1,1,2,1) embed_dim=32 "
    options += "--num-classes 2 --input-size 3 64 64 -b 4 -vb 4 -j 0 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0 "
    options += "--opt adamw --lr 1e-3 --layer-decay 0.8 --model-ema --drop-path 0.2 --amp --amp-dtype bfloat16 "
    options += f"--grad-checkpointing --device cpu --data-dir {tmp_path / 'data'} --output {tmp_path / 'out'}"
    command = [sys.executable, os.environ["TIMM_TRAIN"], *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"top1": 100.0' in result.stdout
