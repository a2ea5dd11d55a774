"""Draws the README's pictures: `python notebooks/figures.py`, or `make figures`.

The page's picture needs Chromium; without it, it is left as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from matplotlib.figure import Figure

from dinat_triton import Geometry, Plan, plots
from dinat_triton import receptive_field as rf
from dinat_triton.bench import figures, harness
from dinat_triton.explore.server import Server

FOLDER = Path(__file__).parent / "figures"
PAGE = "?shape=24,24&kernel=5&dilation=2&tile=4&token=276&view=tiles"
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync hide-scrollbars virtual-time-budget=8000 window-size=1060,900"
)


def receptive_fields() -> Figure:
    """The first four layers of a stage of 56 x 56 tokens."""
    shape = (56, 56)
    return plots.plot_receptive_fields(
        {
            "NAT": rf.dilated_stack(shape, 7, [1, 1, 1, 1]),
            "Swin": rf.swin_stack(shape, 7, 4),
            "DiNAT": rf.dilated_stack(shape, 7, [1, 8, 1, 8]),
        },
        heat=True,
    )


FIGURES = {
    "dilations": lambda: plots.plot_dilations((24, 24), kernel_size=3),
    "receptive_fields": receptive_fields,
    "plan": lambda: plots.plot_plan(Plan(Geometry((14, 14), (5,)), (4, 4))),
    "shares": lambda: plots.plot_shares(Geometry((48,), (3,), dilation=(4,)), 4),
    "cost": lambda: plots.plot_cost(Geometry((56, 56), (7,))),
}


# Result files, and the figures drawn of them.
STORED = {
    "roofline": "offline/roofline-sm_90.json",
    "roofline_cpu": "amd-epyc/roofline.json",
    "profile": "amd-epyc/profile.json",
}


def photograph(path: Path) -> None:
    """A picture of the page: a tile of dilated attention and the keys it loads."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print(f"{path.name} is left as it is: there is no chromium on this machine")
        return
    with Server() as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [f"--{flag}" for flag in FLAGS.split()]
        command = [chromium, *flags, f"--user-data-dir={profile}", f"--screenshot={path}", server.url + PAGE]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        server.shutdown()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        plots.save(draw(), FOLDER / f"{name}.png")
    for name, file in STORED.items():
        plots.save(figures.draw(harness.Results.load(harness.FOLDER / "results" / file)), FOLDER / f"{name}.png")
    photograph(FOLDER / "explore.png")
    print(*(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB" for file in sorted(FOLDER.glob("*.png"))), sep="\n")


if __name__ == "__main__":
    main()
