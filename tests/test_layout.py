"""Layouts say the same as the plans that they are made of."""

import numpy as np
import pytest
import torch

from dinat_triton.geometry import Geometry
from dinat_triton.plan import MASKED, Plan
from tests.oracles import sampling

pytest.importorskip("triton")
from dinat_triton.kernels.layout import EMPTY, Layout, layout_of

LONG = sampling.Sample((3, 40), (3, 9), (1, 1), (1, 1), (False, True))
SAMPLES = [LONG, *sampling.samples(90, seed=8, max_tokens=150, borders=sampling.BORDERS)]


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    found = []
    for number, sample in enumerate(SAMPLES):
        geometry = Geometry(sample.shape, **sample.kwargs())
        for transposed in (False, True):
            plan = Plan(geometry, ((40, 1, 2, 3, 5)[number % 5],), chunk=16, transposed=transposed)
            plan = Plan(geometry, plan.tile, plan.largest[0] + number % 3, 16, transposed)
            found.append(layout_of(plan, 1 + number % 4, True, False, torch.device("cpu")))
    return found


def pairs_of(layout: Layout) -> np.ndarray:
    """Bias index of every pair of every class, or MASKED, as the kernels work it out."""
    rows, columns = layout.rows.numpy(), layout.columns.numpy()
    seen = rows[:, 1, :, None] & columns[:, 1, None, :] == 0
    if layout.has_long_axis:
        place = columns[:, 2, None, :] - rows[:, 2, :, None]
        seen &= (place >= 0) & (place < rows[:, 3, :, None])
    row_code, column_code = (codes.numpy() for codes in layout.codes)
    return np.where(seen, row_code[:, :, None] + column_code[:, None, :], MASKED)


def test_tokens_are_bases_and_offsets_and_runs_hold_every_tile_once(layouts: list[Layout]) -> None:
    for layout in layouts:
        owners = np.repeat(np.arange(len(layout.plan.classes)), [c.tiles for c in layout.plan.classes])
        assert len(layout.bases) == len(owners)
        for number, c in enumerate(layout.plan.classes):
            row_base, column_base = layout.bases.numpy()[owners == number].T
            assert (row_base == c.row_base).all()
            assert (column_base == c.col_base).all()
            for slots, expected in ((layout.rows, c.rows), (layout.columns, c.columns)):
                offsets = slots.numpy()[number, 0]
                assert (offsets == np.pad(expected, (0, len(offsets) - len(expected)), constant_values=EMPTY)).all()
        held = [(int(owner), tile) for owner, start, end, _ in layout.runs for tile in range(start, end)]
        assert held == [(owner, tile) for tile, owner in enumerate(owners)]
        firsts = [int((layout.runs[:, 0] < n).sum()) for n in range(len(layout.plan.classes) + 1)]
        assert layout.first_run.tolist() == firsts


def test_words_and_codes_give_the_bias_index_of_every_pair_and_entries_lead_to_it(layouts: list[Layout]) -> None:
    assert {layout.has_long_axis for layout in layouts} == {False, True}
    for layout in layouts:
        pairs = pairs_of(layout)
        for c, ours in zip(layout.plan.classes, pairs, strict=True):
            rel = c.rel()
            assert (ours[: rel.shape[0], : rel.shape[1]] == rel).all()
            assert (ours == MASKED).sum() == ours.size - (rel != MASKED).sum()
        # A row has an entry with one column only.
        classes, slots, span = pairs.shape
        entry, row = (x.numpy() for x in layout.entries)
        column = entry[:, :, None] + row[:, None, :]  # [classes, offsets, rows]
        inside = (column >= 0) & (column < span)
        of_class, of_row = np.arange(classes)[:, None, None], np.arange(slots)
        found = inside & (pairs[of_class, of_row, np.where(inside, column, 0)] == np.arange(entry.shape[1])[:, None])
        assert found.sum() == (pairs != MASKED).sum()
