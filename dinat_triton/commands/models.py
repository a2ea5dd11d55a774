"""`dinat-triton models`: the published models and their weights, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinat_triton.models.variants import Variant

HEADER = ("model", "parameters", "GMACs", "input", "crop", "top-1", "weights")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="of names, such as 'dinat_large*' (default: all)")


def run(args: argparse.Namespace) -> int:
    rows = list(published(args.pattern))
    if not rows:
        raise ValueError(f"no model's name matches {args.pattern!r}; without a pattern all are listed")
    print(as_markdown(rows))
    return 0


def published(pattern: str = "*") -> Iterator[tuple[str, ...]]:
    """Yields a row for each of the weights; a model's first are those that timm loads by default."""
    import timm

    from dinat_triton.models.variants import VARIANTS

    named = set(timm.list_models(pattern))
    for name in VARIANTS:
        if name in named:
            tagged = timm.list_pretrained(f"{name}.*")
            default = f"{name}.{timm.models.resolve_pretrained_cfg(name).tag}"
            yield _row(default, VARIANTS[name])
            yield from (_row(other) for other in tagged if other != default)


def _row(name: str, variant: Variant | None = None) -> tuple[str, ...]:
    import timm

    config = timm.models.resolve_pretrained_cfg(name)
    parameters = sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) / 1e6
    gmacs, top1 = ("", "") if variant is None else (str(variant.gmacs), str(variant.top1))
    weights = config.hf_hub_id or str(config.url).rpartition("/")[2]
    return name, f"{parameters:.1f} M", gmacs, str(config.input_size[-1]), str(config.crop_pct), top1, weights


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    lines = [HEADER, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(f"{x:{w}}" for x, w in zip(line, widths, strict=True)) + " |" for line in lines)
