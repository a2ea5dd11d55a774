"""Layouts say the same as the plans that they are made of."""

import numpy as np
import pytest
import torch

from dinat_triton.geometry import Geometry
from dinat_triton.plan import MASKED, Plan
from tests.oracles import sampling

pytest.importorskip("triton")
from dinat_triton.kernels.layout import EMPTY, Layout, layout_of

CPU = torch.device("cpu")
LONG = sampling.Sample((3, 40), (3, 9), (1, 1), (1, 1), (False, True))
SAMPLES = [LONG, *sampling.samples(90, seed=8, max_tokens=150, borders=sampling.BORDERS)]


def layouts() -> list[Layout]:
    found = []
    for number, sample in enumerate(SAMPLES):
        geometry = Geometry(sample.shape, **sample.kwargs())
        tile = (40, 1, 2, 3, 5)[number % 5]
        for transposed in (False, True):
            plan = Plan(geometry, (tile,), chunk=16, transposed=transposed)
            plan = Plan(geometry, plan.tile, plan.largest[0] + number % 3, 16, transposed)
            found.append(layout_of(plan, 1 + number % 4, False, CPU))
    return found


def pairs_of(layout: Layout) -> np.ndarray:
    """Bias index of every pair of every class, or MASKED, as the kernels work it out."""
    rows, columns = layout.rows.numpy(), layout.columns.numpy()
    seen = rows[:, 2, :, None] & columns[:, 2, None, :] == 0
    place = columns[:, 3, None, :] - rows[:, 3, :, None]
    if layout.has_long_axis:
        seen &= (place >= 0) & (place < rows[:, 4, :, None])
    return np.where(seen, rows[:, 1, :, None] + columns[:, 1, None, :], MASKED)


def test_words_and_codes_give_the_bias_index_of_every_pair() -> None:
    assert {layout.has_long_axis for layout in layouts()} == {False, True}
    for layout in layouts():
        for c, ours in zip(layout.plan.classes, pairs_of(layout), strict=True):
            rel = c.rel()
            assert (ours[: rel.shape[0], : rel.shape[1]] == rel).all()
            assert (ours == MASKED).sum() == ours.size - (rel != MASKED).sum()


def test_tokens_are_bases_and_offsets() -> None:
    for layout in layouts():
        bases, rows, columns = layout.bases.numpy(), layout.rows.numpy(), layout.columns.numpy()
        first = 0
        for number, c in enumerate(layout.plan.classes):
            own = bases[first : first + c.tiles]
            for base, expected_base, offsets, expected in (
                (own[:, 0], c.row_base, rows[number, 0], c.rows),
                (own[:, 1], c.col_base, columns[number, 0], c.columns),
            ):
                assert (base == expected_base).all()
                assert (offsets[: len(expected)] == expected).all()
                assert (offsets[len(expected) :] == EMPTY).all()
            first += c.tiles
        assert first == len(bases)


def test_runs_hold_every_tile_once() -> None:
    for layout in layouts():
        held = [(int(owner), tile) for owner, start, end, _ in layout.runs for tile in range(start, end)]
        shapes = layout.plan.shapes[:, 0]
        assert held == [(owner, tile) for tile, owner in enumerate(np.repeat(np.arange(len(shapes)), shapes))]
        assert layout.first_run.tolist() == [int((layout.runs[:, 0] < n).sum()) for n in range(len(shapes) + 1)]


def test_entries_lead_to_the_only_column_with_which_a_row_has_a_bias_entry() -> None:
    for layout in layouts():
        pairs = pairs_of(layout)
        classes, slots, span = pairs.shape
        entry, row = (x.numpy() for x in layout.entries)
        column = entry[:, :, None] + row[:, None, :]  # [classes, offsets, rows]
        inside = (column >= 0) & (column < span)
        of_class, of_row = np.arange(classes)[:, None, None], np.arange(slots)
        found = inside & (pairs[of_class, of_row, np.where(inside, column, 0)] == np.arange(entry.shape[1])[:, None])
        assert found.sum() == (pairs != MASKED).sum()
