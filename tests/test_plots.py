"""Figures show what Geometry and Plan say: the data of the drawn cells is read back and compared."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from timm.models.swin_transformer import SwinTransformerBlock, window_partition

import dinat_triton as dt
from dinat_triton import Geometry, Plan, plots
from dinat_triton import receptive_field as rf
from dinat_triton.attention_maps import attention_layers, token_at
from dinat_triton.plan import MASKED
from tests.oracles import sampling

GEOMETRIES = [
    Geometry(sample.shape, **sample.kwargs())
    for sample in sampling.samples(30, seed=11, max_tokens=120, borders=sampling.BORDERS)
]


def drawn(ax: Axes) -> np.ma.MaskedArray:
    """The cells of the first map on the axes."""
    mesh = next(artist for artist in ax.collections if isinstance(artist, QuadMesh))
    return np.ma.asarray(mesh.get_array())


def unmosaic(cells: np.ma.MaskedArray, shape: tuple[int, ...]) -> np.ndarray:
    """Takes the gaps between the slices of a 3-D map out again."""
    if len(shape) < 3:
        return cells.filled(np.nan).reshape(shape)
    width = shape[2] + 1
    assert all(cells[:, i * width + shape[2]].mask.all() for i in range(shape[0] - 1))
    return np.stack([cells[:, i * width : i * width + shape[2]].filled(np.nan) for i in range(shape[0])])


def place(geometry: Geometry, token: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(token, geometry.shape))


def sees(geometry: Geometry) -> np.ndarray:
    """`[queries, keys]`, from the table that the reference backend attends with."""
    tokens, _ = geometry.neighbors()
    matrix = np.zeros((geometry.num_tokens,) * 2, dtype=bool)
    for query, keys in enumerate(tokens):
        matrix[query, keys[keys >= 0]] = True
    return matrix


@pytest.mark.parametrize("geometry", GEOMETRIES[::3])
def test_neighborhoods_show_the_geometry(geometry: Geometry) -> None:
    matrix = sees(geometry)
    for token in {0, geometry.num_tokens // 2, geometry.num_tokens - 1}:
        for inverse, row in ((False, matrix[token]), (True, matrix[:, token])):
            figure = plots.plot_neighborhood(geometry, place(geometry, token), inverse=inverse)
            expected = row.astype(int)
            expected[token] = plots.SELF
            cells = unmosaic(drawn(figure.axes[0]), geometry.shape)
            np.testing.assert_array_equal(cells, expected.reshape(geometry.shape))
            assert f" {row.sum()} " in f"{figure.axes[0].get_title()} "


@pytest.mark.parametrize("geometry", GEOMETRIES[2::3])
def test_fields_are_what_averages_of_averages_reach(geometry: Geometry) -> None:
    dense = Geometry(geometry.shape, geometry.kernel_size)
    token, share = geometry.num_tokens // 3, np.eye(geometry.num_tokens)
    geometries = [dense, geometry, dense, geometry]
    layers = [rf.attention(g) for g in geometries]
    for depth, field in enumerate(rf.growth(layers, place(geometry, token))):
        share = sees(geometries[depth]) / sees(geometries[depth]).sum(1, keepdims=True) @ share
        expected = share[token]
        cells = unmosaic(drawn(plots.plot_field(field).axes[0]), geometry.shape)
        np.testing.assert_array_equal(cells.ravel() > 0, expected > 0)
        assert field.coverage == pytest.approx(100 * (expected > 0).mean())
        heat = unmosaic(drawn(plots.plot_field(field, heat=True).axes[0]), geometry.shape)
        np.testing.assert_allclose(heat.ravel(), np.where(expected > 0, expected, -1), atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fields_grow_as_the_paper_says(depth: int) -> None:
    assert rf.field(rf.dilated_stack((343,), 7, [1] * depth)).size == depth * 6 + 1
    assert rf.field(rf.dilated_stack((343,), 7, [7**i for i in range(depth)])).size == 7**depth


@pytest.mark.parametrize("shift", [0, 3])
def test_windows_are_those_of_timms_swin(shift: int) -> None:
    block = SwinTransformerBlock(8, (14, 14), window_size=7, shift_size=shift, num_heads=1)
    tokens = torch.arange(196.0).view(1, 14, 14, 1).roll((-shift, -shift), (1, 2))
    windows = window_partition(tokens, (7, 7)).flatten(1).long()
    open_pairs = torch.ones(4, 49, 49, dtype=torch.bool) if block.attn_mask is None else block.attn_mask == 0
    expected = np.zeros((196, 196), dtype=bool)
    for window, pairs in zip(windows, open_pairs, strict=True):
        expected[np.ix_(window, window)] = pairs
    rows, columns = rf.shifted_windows((14, 14), 7, shift).links
    np.testing.assert_array_equal(np.kron(rows, columns), expected)


def test_downsampling_is_the_models_convolution() -> None:
    x = torch.zeros(1, 1, 9, 6, requires_grad=True)
    out = torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3), stride=2, padding=1)
    layer = rf.downsampling((9, 6))
    assert layer.shape == tuple(out.shape[2:])
    for y, x_out in np.ndindex(*layer.shape):
        (grad,) = torch.autograd.grad(out[0, 0, y, x_out], x, retain_graph=True)
        np.testing.assert_array_equal(grad[0, 0] > 0, np.outer(layer.links[0][y], layer.links[1][x_out]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES[::4])
def test_plan_figures_show_the_plan(geometry: Geometry, transposed: bool) -> None:
    plan = Plan(geometry, tuple(max(1, k // 2) for k in geometry.kernel_size), transposed=transposed)
    token = geometry.num_tokens // 2
    matrix = sees(geometry).T if transposed else sees(geometry)
    classes, tile, pairs = plots.plot_plan(plan, place(geometry, token)).axes[:3]

    cells = unmosaic(drawn(tile), geometry.shape).ravel()
    rows = np.flatnonzero(cells == plots.SELF)
    assert token in rows
    np.testing.assert_array_equal(np.flatnonzero(cells), np.flatnonzero(matrix[rows].any(0) | (cells == plots.SELF)))

    number_of = unmosaic(drawn(classes), geometry.shape).ravel()
    assert len(set(number_of[rows])) == 1
    rel = plan.classes[int(number_of[token])].rel()
    shown = drawn(pairs)
    np.testing.assert_array_equal(shown.filled(MASKED), rel)
    assert f"{matrix[rows].sum()} of {rel.size} scores useful" in pairs.get_title()


@pytest.mark.parametrize(("size", "dilation", "stride", "causal"), [(12, 2, 1, False), (9, 1, 3, True)])
def test_attention_maps_are_what_the_layer_computes(size: int, dilation: int, stride: int, causal: bool) -> None:
    torch.manual_seed(0)
    module = dt.NeighborhoodAttention2D(
        12, 3, 5, dilation=dilation, stride=stride, is_causal=causal, rel_pos_bias=True, dtype=torch.float64
    )
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, size, size, 12, dtype=torch.float64)
    (layer,) = attention_layers(module, x)
    values = module.qkv(x).unflatten(-1, (3, 3, 4))[..., 2, :, :]
    expected = module(x)
    for query in ((0, 0), (size // 2, size - 1)):
        mixed = torch.einsum("bhyx,byxhd->bhd", layer.attention(query), values)
        torch.testing.assert_close(module.proj(mixed.flatten(1)), expected[:, query[0], query[1]])


def test_attention_on_a_padded_map_is_cropped() -> None:
    module = dt.NeighborhoodAttention2D(8, 2, 5, dilation=2)
    (layer,) = attention_layers(module, torch.randn(1, 7, 12, 8))
    assert layer.geometry.shape == (10, 12)
    attention = layer.attention((3, 3))
    assert attention.shape == (1, 2, 7, 12)
    assert 0 < attention.sum() / 2 < 1


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        (lambda: plots.plot_neighborhood(Geometry((9, 9), (3,)), (9, 0)), "position must lie on the map"),
        (lambda: plots.plot_neighborhood(Geometry((9, 9), (3,)), (1,)), "position must lie on the map"),
        (lambda: plots.plot_pairs(Geometry((40, 40), (3,))), "up to 512 tokens"),
        (lambda: rf.field(rf.dilated_stack((9,), 3, [1]), (9,)), "token must lie on the map"),
        (lambda: rf.shifted_windows((9,), 3, 3), "shift must be"),
        (lambda: plots.plot_cone(rf.dilated_stack((9, 9), 3, [1])), "1-D"),
        (lambda: plots.plot_bias(torch.zeros(3)), "rpb must be"),
        (lambda: plots.plot_attention(torch.zeros(9, 9), {}, {}), "image must be"),
        (lambda: token_at((0.5, 1.0), (9, 9)), "a point must be fractions"),
        (lambda: attention_layers(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "no NeighborhoodAttention layers"),
        (lambda: plots.save(Figure(), "figure.txt"), "must end in .png, .svg or .pdf"),
    ],
)
def test_mistakes_are_named(mistake, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mistake()
