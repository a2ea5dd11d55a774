"""Options that commands share: layers, devices and output files, refused with a hint before anything is done."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from dinat_triton.layers import OTHERS, SETTINGS, SIZES, Layer, layers_of

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MODEL = "dinat_mini"
LAYERS_HELP = (
    "such as dinat_mini@224, coco (of dinat_mini), dinat_large@384:24x24* or ltx@decoder; commas or spaces between them"
)
BATCH_HELP = "images; coco takes an eighth of them"


def add_out(parser: argparse._ActionsContainer, what: str, default: Path | None = None) -> None:
    """Adds the output options: where to write, and whether to replace what is there."""
    parser.add_argument("-o", "--out", metavar="PATH", type=Path, default=default, help=what)
    add_force(parser)


def add_force(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that are there already")


def find_layers(words: Iterable[str], dim: int | None = None, batch: int = 1) -> list[Layer]:
    """The layers that words name, in order and without repetition.

    Args:
        words: `model@setting`, or a setting alone for that of dinat_mini; `:pattern` behind it chooses among its
            layers, such as `56x56*` or `*-d1`. A word may hold several with commas between them.
        dim: Channels of a head; each model's own by default.
        batch: Images, as in `layers_of`.
    """
    found = [layer for word in split(words) for layer in _layers_of_word(word, dim, batch)]
    if not found:
        raise ValueError("no layers were named")
    return list(dict.fromkeys(found))


def _layers_of_word(word: str, dim: int | None, batch: int) -> list[Layer]:
    name, _, pattern = word.partition(":")
    check_names(
        "layers", [name], [*SETTINGS, *OTHERS, *(f"{model}@{setting}" for model in SIZES for setting in SETTINGS)]
    )
    name = f"{DEFAULT_MODEL}@{name}" if name in SETTINGS else name
    layers = layers_of(name, dim, batch)
    chosen = [layer for layer in layers if fnmatch(layer.short_name, pattern or "*")]
    if not chosen:
        check_names(f"layers of {name}", [pattern], [layer.short_name for layer in layers])
    return chosen


def split(words: Iterable[str]) -> list[str]:
    """Words that have commas or spaces between them."""
    return [part for word in words for part in word.replace(",", " ").split()]


def check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuses unknown names, with those that may have been meant."""
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(list(known)[:40])}"
            raise ValueError(f"unknown {kind} {name!r}: {hint}")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses options that were given and are not positive."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


def check_dims(dims: Iterable[int]) -> None:
    """Refuses head dims that the kernels do not take."""
    for dim in dims:
        if not 1 <= dim <= 256:
            raise ValueError(f"--dim must be between 1 and 256, got {dim}")


def find_device(name: str | None) -> torch.device:
    """The device that was asked for, or else a GPU if there is one; never another than what was asked for."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda was asked for, and torch sees no GPU here")
    return torch.device(name)
