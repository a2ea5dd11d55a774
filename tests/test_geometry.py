"""Windows and their inverse, against a loop-by-loop reading of the definition."""

import numpy as np
import pytest

from dinat_triton.geometry import Geometry, geometry_of, split_window
from tests.oracles import brute, sampling

SAMPLES = sampling.samples(200, seed=3, max_tokens=120)


def geometry(sample: sampling.Sample) -> Geometry:
    return Geometry(sample.shape, sample.kernel_size, sample.dilation, sample.stride, sample.is_causal)


def seen(g: Geometry) -> dict[tuple[int, int], int]:
    """(query, key) -> bias index, from `neighbors`."""
    tokens, offsets = g.neighbors()
    pairs = zip(np.nonzero(tokens >= 0)[0], tokens[tokens >= 0], offsets[tokens >= 0], strict=True)
    return {(int(q), int(k)): int(o) for q, k, o in pairs}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_neighbors_match_the_definition(rank: int) -> None:
    for sample in (s for s in SAMPLES if s.rank == rank):
        tokens, offsets = geometry(sample).neighbors()
        axes = [
            brute.windows(*axis)
            for axis in zip(
                sample.shape, sample.kernel_size, sample.dilation, sample.stride, sample.is_causal, strict=True
            )
        ]
        bias_shape = tuple(2 * k - 1 for k in sample.kernel_size)
        for query, index in enumerate(np.ndindex(sample.shape)):
            per_axis = [axis[i] for axis, i in zip(axes, index, strict=True)]
            keys = np.ravel_multi_index(np.meshgrid(*(k for k, _ in per_axis), indexing="ij"), sample.shape)
            # The oracle counts offsets from the query, the table from its corner.
            shifted = [np.add(o, k - 1) for (_, o), k in zip(per_axis, sample.kernel_size, strict=True)]
            bias = np.ravel_multi_index(np.meshgrid(*shifted, indexing="ij"), bias_shape)
            np.testing.assert_array_equal(tokens[query][tokens[query] >= 0], keys.ravel(), err_msg=str(sample))
            np.testing.assert_array_equal(offsets[query][tokens[query] >= 0], bias.ravel(), err_msg=str(sample))


def test_inverse_neighbors_hold_the_same_pairs() -> None:
    for sample in SAMPLES:
        g = geometry(sample)
        queries, offsets = g.inverse_neighbors()
        inverse = {
            (int(queries[k, i]), int(k)): int(offsets[k, i]) for k, i in zip(*np.nonzero(queries >= 0), strict=True)
        }
        assert inverse == seen(g), sample
        assert g.num_pairs == len(inverse)


def test_every_query_sees_itself_and_a_full_window_unless_causal() -> None:
    for sample in SAMPLES:
        g = geometry(sample)
        tokens, _ = g.neighbors()
        assert (tokens == np.arange(g.num_tokens)[:, None]).any(1).all(), sample
        if not any(sample.is_causal):
            assert (tokens >= 0).all(), sample


def test_a_window_reads_as_its_axes_say() -> None:
    g = Geometry((10,), kernel_size=(3,), dilation=(2,))
    tokens, offsets = g.neighbors()
    assert tokens[:4].tolist() == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5]]
    assert offsets[[0, 4, 9]].tolist() == [[2, 3, 4], [1, 2, 3], [0, 1, 2]]


def test_scalars_broadcast_and_equal_geometries_are_one() -> None:
    g = Geometry((8, 9), kernel_size=(3,), dilation=(2,))
    assert g == Geometry((8, 9), (3, 3), (2, 2), (1, 1), (False, False))
    assert hash(g) == hash(Geometry((8, 9), (3, 3), (2, 2), (1, 1), (False, False)))
    window = (3, 3, 1, 2, 2, 1, 0, 1)
    assert geometry_of((8, 9), window) == Geometry((8, 9), (3, 3), (2, 1), (1, 2), (False, True))
    assert split_window(window) == ((3, 3), (1, 2), (2, 1), (0, 1))


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
        ({"dilation": (3,)}, ValueError, r"3 \* 3 = 9 exceeds length 8 of axis 0.*pad.*at least 9.*at most 2"),
    ],
)
def test_bad_geometries_say_what_would_be_right(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Geometry(**({"shape": (8, 9), "kernel_size": (3,)} | options))
