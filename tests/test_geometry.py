"""Windows and their inverse, against a loop-by-loop reading of the definition."""

import numpy as np
import pytest

from dinat_triton.geometry import Geometry, IntArray, geometry_of, split_window
from tests.oracles import brute, sampling

SAMPLES = sampling.samples(200, seed=3, max_tokens=120, borders=sampling.BORDERS)


def pairs(tokens: IntArray, offsets: IntArray) -> dict[tuple[int, int], int]:
    """(row, token) to bias index, in the order of the arrays."""
    row, slot = np.nonzero(tokens >= 0)
    keys = zip(row.tolist(), tokens[row, slot].tolist(), strict=True)
    return dict(zip(keys, offsets[row, slot].tolist(), strict=True))


def test_neighbors_and_their_inverse_match_the_definition() -> None:
    for sample in SAMPLES:
        g = Geometry(sample.shape, **sample.kwargs())
        expected = pairs(*(x.numpy() for x in brute.table(sample.shape, *sample.kwargs().values())))
        assert list(pairs(*g.neighbors()).items()) == list(expected.items()), sample
        inverse = {(query, key): offset for (key, query), offset in pairs(*g.inverse_neighbors()).items()}
        assert inverse == expected, sample
        assert g.num_pairs == len(expected)


def test_scalars_broadcast_and_windows_are_flat() -> None:
    g = Geometry((8, 9), kernel_size=(3,), dilation=(2,))
    assert g == Geometry((8, 9), (3, 3), (2, 2), (1, 1), (False, False), ("shift", "shift"))
    window = (3, 3, 1, 2, 2, 1, 0, 1, 2, 1)
    assert geometry_of((8, 9), window) == Geometry((8, 9), (3, 3), (2, 1), (1, 2), (False, True), ("wrap", "clip"))
    assert split_window(window) == ((3, 3), (1, 2), (2, 1), (0, 1), (2, 1))
    for wrong, message in ((window[:-2], "5 numbers per axis, got 8"), ((*window[:-1], 3), "places in .* got")):
        with pytest.raises(ValueError, match=message):
            geometry_of((8, 9), wrong)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (4, 4, 4, 4)}, ValueError, r"shape must have 1, 2 or 3 axes, got \(4, 4, 4, 4\)"),
        ({"shape": (0, 4)}, ValueError, r"shape must be at least 1, got \(0, 4\)"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be one integer or one per axis \(2\), got"),
        ({"kernel_size": (0,)}, ValueError, r"kernel_size must be at least 1, got \(0,\)"),
        ({"kernel_size": (2.5,)}, TypeError, r"kernel_size must be an integer or 2 integers, got \(2\.5,\)"),
        ({"dilation": (-1,)}, ValueError, r"dilation must be at least 1, got \(-1,\)"),
        ({"stride": (0,)}, ValueError, r"stride must be at least 1, got \(0,\)"),
        ({"stride": (4,)}, ValueError, r"stride must not exceed kernel_size 3, got 4 on axis 0"),
        ({"is_causal": (1,)}, TypeError, r"is_causal must be a boolean or 2 booleans, got \(1,\)"),
        ({"kernel_size": (10,)}, ValueError, r"10 \* 1 = 10 exceeds length 8 of axis 0.* a kernel_size of at most 8"),
        ({"border": ("mirror",)}, ValueError, r"border must be one of 'shift', 'clip', 'wrap', or one per axis, got"),
        ({"border": ("clip",) * 3}, ValueError, r"border must be one name or one per axis \(2\), got"),
        ({"border": ("wrap",), "kernel_size": (10,)}, ValueError, r"10 exceeds length 8 of axis 0; use a "),
        ({"border": ("wrap",), "dilation": (2,)}, ValueError, r"got 2 for length 9 of axis 1; a length of 10 would do"),
        ({"dilation": (3,)}, ValueError, r"3 \* 3 = 9 exceeds length 8 of axis 0.*pad.*at least 9.*at most 2"),
    ],
)
def test_bad_geometries_say_what_would_be_right(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Geometry(**({"shape": (8, 9), "kernel_size": (3,)} | options))
