"""What a command is asked to measure: layers and other things by their names, with suggestions for misspelt ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatch

import torch

from dinat_triton.layers import SETTINGS, SIZES, Layer, layers_of

DEFAULT_MODEL = "dinat_mini"
LAYERS_HELP = "such as dinat_mini@224, coco (of dinat_mini), or dinat_large@384:24x24*; commas or spaces between them"


def find_layers(words: Iterable[str]) -> list[tuple[str, Layer]]:
    """The layers that words name, each with its model, in order and without repetition.

    Args:
        words: `model@setting`, or a setting alone for that of dinat_mini; `:pattern` behind it chooses among its
            layers, such as `56x56*` or `*-d1`. A word may hold several with commas between them.
    """
    found = [pair for word in split(words) for pair in _layers_of_word(word)]
    if not found:
        raise ValueError("no layers were named")
    return list(dict.fromkeys(found))


def _layers_of_word(word: str) -> list[tuple[str, Layer]]:
    name, _, pattern = word.partition(":")
    check_names("layers", [name], [*SETTINGS, *(f"{model}@{setting}" for model in SIZES for setting in SETTINGS)])
    name = f"{DEFAULT_MODEL}@{name}" if name in SETTINGS else name
    model, layers = name.partition("@")[0], layers_of(name)
    shapes = [short_name(layer) for layer in layers]
    chosen = [layer for layer, shape in zip(layers, shapes, strict=True) if fnmatch(shape, pattern or "*")]
    if not chosen:
        check_names(f"layers of {name}", [pattern], shapes)
    return [(model, layer) for layer in chosen]


def short_name(layer: Layer) -> str:
    """Map and dilation, such as `56x56-d8`."""
    return layer.name.partition("/")[2]


def split(words: Iterable[str]) -> list[str]:
    """Words that have commas or spaces between them."""
    return [part for word in words for part in word.replace(",", " ").split()]


def check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuses names that nobody knows, with those that may have been meant."""
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"unknown {kind} {name!r}: {hint}")


def find_device(name: str | None) -> torch.device:
    """The device that was asked for, or else a GPU if there is one; never another than what was asked for."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {name} was asked for, and torch sees no GPU here")
    return device
