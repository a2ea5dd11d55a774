"""Two processes compute what one does, sharded or not, and one goes on with what two have left."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dinat_triton.commands import train as command
from tests.processes import in_processes

from .conftest import SMALL

# All but what is drawn per process: augmentation is drawn per image.
OPTIONS = (
    "--aa rand-m9-mstd0.5-inc1 --reprob 0.5 --smoothing 0.1 --clip-grad 1 --model-ema --layer-decay 0.8 --drop-path 0 "
    "--epochs 4 --mixup 0 --cutmix 0 --warmup-epochs 0"
)
STEPS = 12


def steps(folder: Path, options: str, pictures: Path) -> None:
    """Steps of eight images: leaves their losses and the state after them, which can be loaded again."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    words = [str(pictures), *SMALL.split(), *OPTIONS.split(), *options.split(), "--out", str(folder)]
    run = command.prepare(parser.parse_args(words))
    losses = []
    for epoch in range(STEPS // run.steps):
        run.train.epoch.fill_(epoch)
        run.loader.set_epoch(epoch)
        run.engine.parallel.train()
        for batch in run.loader:
            losses.append(run.accelerator.reduce(run.engine.step(*batch), "mean").item())
    state = run.state()
    if run.accelerator.is_main_process:
        torch.save((losses, state), folder / "found.pt")
        torch.save(state, folder / "state.pt")
    run.accelerator.wait_for_everyone()
    run.engine.step(*batch)
    saved = torch.load(folder / "state.pt")
    run.load(torch.load(folder / "state.pt"))
    again = run.state()
    if run.accelerator.is_main_process:
        for mine, theirs in zip(tree_leaves(again), tree_leaves(saved), strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.fixture(scope="module")
def one(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("one")
    steps(folder, "--batch-size 8", pictures)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("kind", ["no-fsdp", "fsdp"])
def test_two_processes_equal_one_that_goes_on_where_they_stopped(
    kind: str, one: Any, pictures: Path, train, tmp_path: Path
) -> None:
    in_processes(2, steps, tmp_path / "two", f"--batch-size 2 --grad-accum-steps 2 --{kind}", pictures)
    (losses, mine), (found, theirs) = one, torch.load(tmp_path / "two" / "found.pt")
    assert len(found) == STEPS
    assert found == pytest.approx(losses, abs=1e-5)
    for part in ("model", "averages"):
        for name, tensor in mine["engine"][part].items():
            torch.testing.assert_close(theirs["engine"][part][name], tensor, atol=1e-4, rtol=0)
    assert train(tmp_path / "run", f"{OPTIONS} --batch-size 8 --resume {tmp_path / 'two' / 'state.pt'}") == 0
    assert (tmp_path / "run" / "last.safetensors").stat().st_size > 1000
