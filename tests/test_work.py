"""Bytes, products and exponentials of layers, against counts by hand and by brute force."""

import pytest
import torch
import triton

from dinat_triton.bench.harness import Cell
from dinat_triton.bench.roofline import work_of
from dinat_triton.layers import Layer, layers_of
from dinat_triton.offline.targets import find_target
from dinat_triton.plan import Plan
from dinat_triton.tiled import choose_tile
from dinat_triton.work import BACKWARD, FORWARD, FORWARD_BACKWARD, LIMITS, Ceilings, Work, tiled_work

RAGGED = Layer("ragged", (9, 11), 2, (2, 1), kernel_size=(3, 5), dim=8, batch=3)
CEILINGS = Ceilings("measured", "a machine", 1e10, {"float32": 1e11, "bfloat16": 1e12}, 1e9)


@pytest.mark.parametrize(
    ("pass_", "products", "exps", "tensors"), [(FORWARD, 2, 1, 4), (BACKWARD, 5, 1, 7), (FORWARD_BACKWARD, 7, 2, 11)]
)
@pytest.mark.parametrize("layer", [RAGGED, *layers_of("dinat_mini@224")], ids=str)
def test_useful_work_is_what_the_definition_asks_for_and_evaluated_work_that_of_the_tiles(
    layer: Layer, pass_: str, products: int, exps: int, tensors: int
) -> None:
    found, pairs = tiled_work(layer, pass_, torch.bfloat16), layer.maps * layer.geometry.num_pairs
    tokens = layer.maps * layer.geometry.num_tokens
    assert (found.useful_flops, found.useful_exps) == (2 * products * pairs * layer.dim, exps * pairs)
    assert found.bytes == found.useful_bytes == tensors * tokens * layer.dim * 2
    assert found.useful_scores == pairs / tokens
    assert tiled_work(layer, pass_, torch.float32).bytes == 2 * found.bytes
    plan = Plan(layer.geometry, choose_tile(layer.geometry, layer.batch, layer.heads))
    # Every tile of a class is as large as its class.
    sizes = [(c.rows >= 0).sum() * (c.columns >= 0).sum() * len(c.row_base) for c in plan.classes]
    scores = int(sum(sizes)) * layer.maps
    assert (found.flops, found.exps) == (2 * products * scores * layer.dim, exps * scores)
    assert found.flops >= found.useful_flops


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")
def test_work_on_a_gpu_is_that_of_its_launches() -> None:
    """One sweep with seven tensors and a number per query, against two with eleven tensors."""
    local, dense = layers_of("dinat_mini@224", batch=128)[:2]
    target, tokens = find_target("sm_90"), 128 * 2 * 56 * 56
    forward, backward = (work_of(Cell(dense, "bfloat16", pass_), target) for pass_ in (FORWARD, BACKWARD))
    assert forward.bytes == (4 * 64 + 4) * tokens
    assert backward.bytes == (7 * 64 + 4) * tokens
    # Slots of 64 x 64 around windows of 49 x 49.
    assert forward.scores == backward.scores == pytest.approx(64 * 64 / 49)
    assert backward.flops == 2 * 5 * 32 * backward.exps
    assert backward.exps == pytest.approx(backward.scores * tokens)
    sliding = work_of(Cell(local, "bfloat16", BACKWARD), target)
    assert sliding.bytes > (11 * 64) * tokens
    assert sliding.exps > backward.exps


def test_each_limit_alone() -> None:
    work = Work(0, 0, 1e10, 2e9, 1e8, 5e10, 1e9, 2e8)
    assert work.limits(CEILINGS, "float32") == pytest.approx(dict(zip(LIMITS, (0.1, 0.5, 0.2), strict=True)))
    assert work.limits(CEILINGS, "float16")["products"] == pytest.approx(0.05)
    assert work.useful_limits(CEILINGS, "float32") == pytest.approx(dict(zip(LIMITS, (0.2, 0.1, 0.1), strict=True)))
