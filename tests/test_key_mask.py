"""Key masks beyond eager calls on tensors apart: packed, of maps of different sizes, in graphs, transforms, modules."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import dinat_triton as dt
from dinat_triton import ops
from dinat_triton.functional import window_of

WINDOW = window_of(2, 3, 1, (1, 2), False)
BACKENDS = ["tiled", "reference"]


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """A packed qkv whose hidden keys and values are NaN, a bias, and the mask, which hides all of one map."""
    torch.manual_seed(0)
    qkv, rpb, key_mask = torch.randn(3, 6, 7, 3, 2, 4), torch.randn(2, 5, 5), torch.rand(3, 6, 7) < 0.4
    key_mask[1] = False
    qkv[..., 1:, :, :].masked_fill_(~key_mask[..., None, None, None], torch.nan)
    return qkv, rpb, key_mask


def attend(qkv: Tensor, rpb: Tensor, key_mask: Tensor, backend: str = "reference", **options: Any) -> Tensor:
    return dt.na2d(*qkv.unbind(-3), 3, dilation=(1, 2), rpb=rpb, key_mask=key_mask, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tensors_and_graphs(backend: str) -> None:
    qkv, rpb, key_mask = draw()
    out, lse = attend(qkv, rpb, key_mask, return_lse=True)
    assert not out[1].any()
    assert lse[1].isneginf().all()
    arguments = ([qkv], WINDOW, rpb, None, 0.0, True, backend, None, key_mask)
    for run in (ops.na, ops.opened) if torch.__version__ >= "2.14" else (ops.na,):  # older ones have no export
        torch.testing.assert_close(run(*arguments), (out, lse))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, rpb, key_mask, backend, return_lse=True), (out, lse))
    finite = [qkv.nan_to_num().requires_grad_()]
    opcheck(torch.ops.dinat_triton.na, (finite, *arguments[1:]))
    opcheck(torch.ops.dinat_triton.fused, ([*finite, key_mask], rpb, None, WINDOW, 0.5, 0.0, True, "tiled"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_different_sizes(backend: str) -> None:
    qkv, rpb, key_mask = draw()
    sizes = [(6, 7), (4, 6), (3, 7)]
    out = attend(qkv, rpb, key_mask, backend, sizes=sizes)
    for i, (h, w) in enumerate(sizes):
        own, own_mask = qkv[i : i + 1, :h, :w], key_mask[i : i + 1, :h, :w]
        torch.testing.assert_close(out[i : i + 1, :h, :w], attend(own, rpb, own_mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend: str) -> None:
    qkv, rpb, key_mask = draw()

    def loss(qkv: Tensor, rpb: Tensor, key_mask: Tensor, backend: str) -> Tensor:
        return attend(qkv[None], rpb, key_mask[None], backend).sin().sum()

    def derivatives(backend: str) -> Any:
        of_each = vmap(grad(loss, (0, 1)), (0, None, 0, None))(qkv, rpb, key_mask, backend)
        return of_each, jvp(lambda x: attend(x, rpb, key_mask, backend), (qkv,), (qkv.cos(),))

    found = derivatives(backend)
    torch.testing.assert_close(found, derivatives("reference"))
    assert all(x.isfinite().all() for x in (*found[0], *found[1]))


@pytest.mark.parametrize("shape", [(6, 7), (4, 9)])
def test_modules(shape: tuple[int, int]) -> None:
    """Also on a map that is padded, where a mask that hides nothing changes nothing."""
    module = dt.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True).eval()
    x, key_mask = torch.randn(2, *shape, 8), torch.rand(2, *shape) < 0.5
    torch.testing.assert_close(module(x, torch.ones_like(key_mask)), module(x))
    expected = module(x, key_mask)
    assert not torch.allclose(expected, module(x))
    poisoned = x.masked_fill(~key_mask[..., None], torch.nan)
    torch.testing.assert_close(module(poisoned, key_mask)[key_mask], expected[key_mask])
    exported = torch.export.export(module, (x, key_mask)).module()
    torch.testing.assert_close(exported(x, key_mask), expected)
    torch.testing.assert_close(torch.jit.script(module)(x, key_mask), expected)


@pytest.mark.parametrize(
    ("key_mask", "error", "message"),
    [
        (
            torch.ones(1, 6),
            TypeError,
            "key_mask must be a bool tensor, True where the key may be seen, got torch.float32",
        ),
        (
            torch.ones(6, dtype=torch.bool),
            ValueError,
            r"key_mask must have the batch and map of query, \(1, 6\), got \(6,\)",
        ),
        (torch.ones(1, 6, dtype=torch.bool, device="meta"), ValueError, "on the device of query, cpu, got meta"),
    ],
)
def test_bad_masks(key_mask: Tensor, error: type[Exception], message: str) -> None:
    x = torch.ones(1, 6, 1, 8)
    with pytest.raises(error, match=message):
        dt.na1d(x, x, x, 3, key_mask=key_mask)
    with pytest.raises(error, match=message):
        dt.NeighborhoodAttention1D(8, 1, 7)(x[:, :, 0], key_mask)
