"""Answers to the page: questions in a query string, answers as plain data. All numbers are Geometry's and Plan's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import prod
from typing import Any
from urllib.parse import parse_qs

import numpy as np

from dinat_triton import plots
from dinat_triton import receptive_field as receptive
from dinat_triton.geometry import SHIFT, Geometry
from dinat_triton.plan import MASKED, Plan

# What a browser still draws at ease, and a request still answers at once.
MAX_TOKENS, MAX_SIDE, MAX_LAYERS, MAX_PAIRS = 4096, 512, 24, 1 << 21
MAX_QUERY, MAX_DIGITS = 1000, 6

Answer = dict[str, Any]


def answer(path: str, query: str) -> Answer | None:
    """Answers a request, or None where nothing lives at that path. A question that makes no sense is a ValueError."""
    question = QUESTIONS.get(path)
    if question is None:
        return None
    if len(query) > MAX_QUERY:
        raise ValueError(f"the query string may have {MAX_QUERY} characters, got {len(query)}")
    fields = parse_qs(query, keep_blank_values=True, max_num_fields=16)
    return question(_Fields({name: values[-1] for name, values in fields.items()}))


class _Fields:
    """The fields of a query string, read as numbers."""

    def __init__(self, values: dict[str, str]):
        self.values = values

    def ints(self, name: str, default: str | None = None, most: int = MAX_LAYERS) -> tuple[int, ...]:
        text = self.values.get(name, default)
        if text is None:
            raise ValueError(f"{name} is missing")
        parts = text.replace(",", " ").split()
        if not 1 <= len(parts) <= most:
            raise ValueError(f"{name} must be 1 to {most} integers, got {text[:60]!r}")
        if not all(part.isascii() and part.isdigit() and len(part) <= MAX_DIGITS for part in parts):
            raise ValueError(f"{name} must be integers of up to {MAX_DIGITS} digits, got {text[:60]!r}")
        return tuple(map(int, parts))

    def words(self, name: str, default: str) -> tuple[str, ...]:
        return tuple(self.values.get(name, default).replace(",", " ").split())

    def shape(self) -> tuple[int, ...]:
        shape = self.ints("shape", most=3)
        if prod(shape) > MAX_TOKENS:
            raise ValueError(f"the map has {prod(shape)} tokens; this page shows up to {MAX_TOKENS}")
        if max(shape) > MAX_SIDE:
            raise ValueError(f"the map has a side of {max(shape)} tokens; this page shows up to {MAX_SIDE}")
        return shape

    def geometry(self) -> Geometry:
        kernel, dilation, stride = (self.ints(name, "1", 3) for name in ("kernel", "dilation", "stride"))
        causal = self.ints("causal", "0", 3)
        if any(flag > 1 for flag in causal):
            raise ValueError(f"causal must be 0 or 1 on each axis, got {causal}")
        return Geometry(self.shape(), kernel, dilation, stride, tuple(map(bool, causal)), self.words("border", SHIFT))

    def token(self, tokens: int) -> int:
        (token,) = self.ints("token", most=1)
        if token >= tokens:
            raise ValueError(f"token must be below {tokens}, got {token}")
        return token


def _position(token: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(token, tuple(shape)))


def about(fields: _Fields) -> Answer:
    """Facts of a geometry, before anything is hovered."""
    geometry = fields.geometry()
    return {
        "shape": geometry.shape,
        "tokens": geometry.num_tokens,
        "pairs": geometry.num_pairs,
        "bias": geometry.bias_shape,
    }


def neighbors(fields: _Fields) -> Answer:
    """The keys that a token sees as a query, and the queries that see it as a key."""
    geometry = fields.geometry()
    position = _position(fields.token(geometry.num_tokens), geometry.shape)
    return {
        "position": position,
        "keys": geometry.keys_of(position).tolist(),
        "queries": np.sort(geometry.queries_of(position)).tolist(),
    }


def field(fields: _Fields) -> Answer:
    """The receptive field of a token after each layer of a stack with the given dilations, with each input's share."""
    geometry = fields.geometry()
    token = fields.token(geometry.num_tokens)
    dilations = fields.ints("dilations")
    layers = [receptive.attention(replace(geometry, dilation=(d,))) for d in dilations]
    grown = receptive.growth(layers, _position(token, geometry.shape))
    return {
        "layers": [
            {
                "dilation": dilation,
                "tokens": np.flatnonzero(reached.mask).tolist(),
                "share": [float(f"{x:.3g}") for x in (reached.heat / reached.heat.max())[reached.mask]],
                "coverage": round(reached.coverage, 2),
            }
            for dilation, reached in zip(dilations, grown, strict=True)
        ]
    }


def plan(fields: _Fields) -> Answer:
    """The tile of a token, the class of every token, and what this tile size costs beside others."""
    geometry = fields.geometry()
    position = _position(fields.token(geometry.num_tokens), geometry.shape)
    tile = fields.ints("tile", "4", 3)
    own = _plan(geometry, tile)
    pairs = own.cost().table_entries
    if pairs > MAX_PAIRS:
        raise ValueError(f"tiles of {own.tile} have {pairs} pairs over all classes; this page shows up to {MAX_PAIRS}")
    rows, columns = plots.tile_tokens(own, position)
    number, _ = plots.tile_of(own, position)
    rel = own.classes[number].rel()
    return {
        "tile": own.tile,
        "class": number,
        "rows": rows.tolist(),
        "columns": columns.tolist(),
        "useful": int((rel != MASKED).sum()),
        "evaluated": rel.size,
        "classes": plots.class_map(own).ravel().tolist(),
        "count": {"classes": len(own.classes), "tiles": own.num_tiles},
        "costs": _costs(geometry),
        "cost": _cost(own),
    }


@lru_cache(maxsize=8)
def _plan(geometry: Geometry, tile: tuple[int, ...]) -> Plan:
    return Plan(geometry, tile)


def _cost(plan: Plan) -> Answer:
    cost = plan.cost()
    return {
        "tile": plan.tile,
        "scores": round(cost.scores_per_query, 2),
        "useful": round(cost.useful_per_query, 2),
        "loads": round(cost.col_loads / cost.queries, 2),
    }


@lru_cache(maxsize=8)
def _costs(geometry: Geometry) -> list[Answer]:
    """Square tiles from one row to the longest residue class, a dozen at most."""
    longest = max(-(-n // d) for n, d in zip(geometry.shape, geometry.dilation, strict=True))
    edges = islice((e for e in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16) if e <= longest), 12)
    return [_cost(Plan(geometry, (edge,) * geometry.rank)) for edge in edges]


QUESTIONS: dict[str, Callable[[_Fields], Answer]] = {
    "/api/about": about,
    "/api/neighbors": neighbors,
    "/api/field": field,
    "/api/plan": plan,
}
