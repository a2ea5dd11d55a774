"""Batches of maps of different sizes: every map is attended to exactly as if it were alone."""

import random
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor
from torch.library import opcheck

import dinat_triton as dt
from dinat_triton.map_batch import join_maps, split_maps
from tests.oracles import sampling
from tests.oracles.map_batches import make_map_case

SAMPLES = sampling.samples(24, seed=17, max_tokens=60, borders=sampling.BORDERS)
BACKENDS = ("reference", "tiled")
ROUNDING = {"reference": 1e-6, "tiled": 0.0}


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_map_is_attended_to_as_if_it_were_alone(sample: sampling.Sample, poisoned: None) -> None:
    case = make_map_case(sample, random.Random(str(sample)))
    for backend in BACKENDS:
        alone = case.alone(backend)
        for packed in (False, True):
            case.check(case.run(backend, packed), alone, ROUNDING[backend])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_a_thousand_batches(chunk: int) -> None:
    rng = random.Random(chunk)
    for sample in sampling.samples(1000, seed=18, max_tokens=80, borders=sampling.BORDERS)[chunk::10]:
        case = make_map_case(sample, rng)
        backend = rng.choice(BACKENDS)
        case.check(case.run(backend, rng.random() < 0.5), case.alone(backend), ROUNDING[backend])


def inputs(packed: bool, together: bool = False) -> tuple[list[Tensor], Tensor]:
    lead, channels = (30 + 56 + 30,) if packed else (3, 7, 8), [(3, 4, 8)] if together else [(4, 8), (2, 8), (2, 6)]
    qkv = [torch.randn(*lead, *c, requires_grad=True) for c in channels]
    return qkv, torch.randn(4, 5, 5, requires_grad=True)


SIZES, WINDOW = [(6, 5), (7, 8), (5, 6)], [3, 3, 1, 1, 1, 1, 0, 0, 0, 0]
FLAT = [n for size in SIZES for n in size]


def run(attend: Callable, qkv: list[Tensor], rpb: Tensor, **options) -> list[Tensor]:
    """Output, and gradients of what attention gives for all maps."""
    out = attend(*qkv, 3, rpb=rpb, sizes=SIZES, **options)
    return [out, *torch.autograd.grad(out.square().sum(), [*qkv, rpb])]


@pytest.mark.parametrize("packed", [False, True])
def test_an_output_without_log_sum_exp(packed: bool) -> None:
    qkv, rpb = inputs(packed)
    out = run(dt.na2d, qkv, rpb, backend="tiled")[0]
    parts = [split_maps(x.detach(), SIZES, packed) for x in qkv]
    for found, *own in zip(split_maps(out, SIZES, packed), *parts, strict=True):
        assert torch.equal(found, dt.na2d(*own, 3, rpb=rpb, backend="tiled"))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph_and_exports(packed: bool) -> None:
    qkv, rpb = inputs(packed)
    expected = run(dt.na2d, qkv, rpb)
    compiled = torch.compile(dt.na2d, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, qkv, rpb), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
            return dt.na2d(query, key, value, 3, rpb=rpb, sizes=SIZES)

    program = torch.export.export(Attend(), (*qkv, rpb))
    torch.testing.assert_close(program.module()(*qkv, rpb), expected[0])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool, together: bool) -> None:
    qkv, rpb = inputs(packed, together)
    opcheck(torch.ops.dinat_triton.na, (qkv, WINDOW, rpb, None, 0.0, True, "tiled", FLAT))
    out, lse = (x.detach() for x in torch.ops.dinat_triton.na(qkv, WINDOW, rpb, None, 0.0, True, "tiled", FLAT))
    args = ([x.detach() for x in qkv], rpb.detach(), None, out, lse, out.sin(), lse.cos())
    opcheck(torch.ops.dinat_triton.fused_backward, (*args, WINDOW, 0.3, 0.0, "tiled", FLAT))


def test_maps_drop_different_pairs_and_the_backward_the_same() -> None:
    x = torch.randn(1, 6, 6, 2, 8).expand(2, -1, -1, -1, -1).clone().requires_grad_()
    torch.manual_seed(0)
    out = dt.na2d(x, x, x, 3, sizes=[6, 6], dropout_p=0.5, backend="tiled")
    assert not torch.equal(out[0], out[1])
    grad = torch.autograd.grad(out.sum(), x)[0]
    torch.manual_seed(0)
    exact = dt.na2d(x, x, x, 3, sizes=[6, 6], dropout_p=0.5, backend="reference")
    torch.testing.assert_close(grad, torch.autograd.grad(exact.sum(), x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "sizes must have a shape of 2 integers for each of at least one map, got ()"),
        ([(6, 5), (7, 8)], "sizes must (have one shape for each of 3 .*, got 2|add up to the 116 .* got 86)"),
        (
            [(6, 5), (7, 9), (5, 6)],
            r"sizes must (fit the map .*\(7, 8\), got \(7, 9\) for item 1|add up.* 123)",
        ),
        ([(6, 10), (7, 8), (5, 0)], r"sizes\[2\] must be at least 1, got \(5, 0\)"),
        ([(6, 5), (7, 8), (2, 15)], r"sizes must fit|must fit the map: 3 \* 1 = 3 exceeds length 2 of axis 0.*item 2"),
        ([(6, 5), (7, 8), (5, 6, 1)], r"sizes\[2\] must be one integer or one per axis \(2\), got \(5, 6, 1\)"),
        ([(6, 5), (7, 8), "5"], r"sizes\[2\] must be an integer or 2 integers, got '5'"),
        (7, "sizes must be a list with a shape for each map, got 7"),
    ],
)
def test_wrong_sizes_say_what_would_be_right(sizes: object, message: str, packed: bool) -> None:
    qkv, rpb = inputs(packed)
    with pytest.raises((ValueError, TypeError), match=message):
        dt.na2d(*qkv, 3, rpb=rpb, sizes=sizes)


def test_a_packed_batch_needs_sizes() -> None:
    x = torch.randn(30, 2, 8)
    with pytest.raises(ValueError, match=r"\[batch, height, width, heads, dim\], got shape \(30, 2, 8\)"):
        dt.na2d(x, x, x, 3)
    with pytest.raises(ValueError, match=r"dim\] or \[tokens of all maps, heads, dim\], got shape \(2, 30, 2, 8\)"):
        dt.na2d(x.expand(2, -1, -1, -1), x, x, 3, sizes=[(6, 5)])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_modules_pad_and_project_every_map_alone(packed: bool, rank: int) -> None:
    """Maps smaller than the window too; the bias of the projection makes keys of their padding."""
    module = (dt.NeighborhoodAttention1D, dt.NeighborhoodAttention2D)[rank - 1](12, 3, 3, dilation=2, rel_pos_bias=True)
    torch.nn.init.normal_(module.qkv.bias)
    sizes = [size[:rank] for size in ((9, 4), (7, 8), (3, 2))]
    maps = [torch.randn(1, *size, 12, requires_grad=True) for size in sizes]
    x = join_maps(maps, rank, None if packed else (9, 8)[:rank])
    mask = join_maps([torch.ones(1, *size) for size in sizes], rank, None if packed else (9, 8)[:rank]) > 0
    out = module(x.masked_fill(~mask[..., None], torch.nan), sizes=sizes)
    assert not out[~mask].any()
    alone = [module(m) for m in maps]
    for found, expected in zip(split_maps(out, sizes, packed), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [*maps, *module.parameters()]
    expected = torch.autograd.grad(sum(y.square().sum() for y in alone), leaves)
    for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


TINY = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "kernel_size": 3, "num_classes": 5}


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"])
def test_models_give_for_every_image_what_they_give_for_it_alone(name: str) -> None:
    isotropic = {"embed_dim": 16, "depth": 2, "num_heads": 2, "kernel_size": 3, "num_classes": 5}
    options = isotropic | {"num_heads": (2, 2)} if "isotropic" in name else TINY
    model = timm.create_model(name, dilations=2, **options).eval()
    sizes = [(49, 70), (33, 64), (90, 31)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    batch = torch.full((3, 3, 90, 70), torch.nan)
    for item, image, (height, width) in zip(batch, images, sizes, strict=True):
        item[:, :height, :width] = image[0]
    logits, features = model(batch, sizes=sizes), model.forward_features(batch, sizes)
    final, levels = model.forward_intermediates(batch, sizes=sizes, norm=True)
    assert torch.equal(final, features)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for i, image in enumerate(images):
        torch.testing.assert_close(logits[i], model(image)[0], rtol=1e-4, atol=1e-5)
        found = [features.permute(0, 3, 1, 2), *levels]
        expected = [model.forward_features(image).permute(0, 3, 1, 2)]
        expected += model.forward_intermediates(image, norm=True, intermediates_only=True)
        for a, b in zip(found, expected, strict=True):
            height, width = b.shape[2:]
            torch.testing.assert_close(a[i : i + 1, :, :height, :width], b, rtol=1e-4, atol=1e-5)
            assert not a[i, :, height:].any()
            assert not a[i, :, :, width:].any()


def test_models_say_what_sizes_would_be_right() -> None:
    model = timm.create_model("dinat_mini", **TINY)
    with pytest.raises(ValueError, match=r"sizes must be at least 8 x 8, got \(7, 9\) for item 0"):
        model(torch.randn(1, 3, 32, 32), sizes=[(7, 9)])
    with pytest.raises(ValueError, match=r"sizes must fit the map they are padded to, \(32, 32\), got \(33, 9\)"):
        model(torch.randn(1, 3, 32, 32), sizes=[(33, 9)])
