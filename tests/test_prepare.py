"""What launches keep from call to call, on a GPU that is not there."""

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

import dinat_triton as dt
from dinat_triton.geometry import Geometry
from dinat_triton.kernels import attention, prepare
from dinat_triton.kernels.kept import Kept
from dinat_triton.offline.targets import find_target
from tests.oracles.gpu import GPU, flat, forget_launches, pretended

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")

# One pass over closed tiles, and several passes that read the bias from tables.
CLOSED, OPEN = Geometry((6, 6), (3,), (2,)), Geometry((1, 160), (1, 129))
FOLDS = ["sum_programs", "fold_bias"]
KERNELS = {
    CLOSED: ["forward", "closed_backward", *FOLDS],
    OPEN: ["table", "forward", "table", "query_backward", "query_backward", "table", "key_backward", *FOLDS],
}


@pytest.fixture
def gpu() -> Iterator[GPU]:
    with pretended(find_target("sm_90")) as gpu:
        yield gpu


def step(geometry: Geometry, number: int = 0, dropout_p: float = 0.0, shift: int = 0) -> list[Tensor | None]:
    """The results of one training step's launches; its queries begin `shift` numbers behind an aligned address."""
    torch.manual_seed(number)
    shape = torch.Size((2, *geometry.shape, 2, 16))
    query = torch.randn(shape.numel() + shift).bfloat16()[shift:].view(shape)
    key, value, grad_out = torch.randn(3, *shape).bfloat16()
    rpb, seed = torch.randn(2, *geometry.bias_shape).bfloat16(), torch.tensor([number]) if dropout_p else None
    qkv = [query, key, value]
    out, lse = attention.forward(qkv, rpb, seed, geometry, 0.25, dropout_p, True)
    grads = [torch.empty_like(x) for x in qkv]
    grad_rpb = attention.backward(qkv, rpb, seed, out, lse, grad_out, None, geometry, 0.25, dropout_p, grads)
    return [out, lse, *grads, grad_rpb]


def launched(gpu: GPU) -> list[tuple]:
    """What was since the last call, without the numbers in its tensors."""
    found, gpu.launched = gpu.launched, []
    plain = [[(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in flat(each.arguments)] for each in found]
    return [(x.kernel.removesuffix("_kernel"), x.variant, x.grid, y) for x, y in zip(found, plain, strict=True)]


def searched(run: Callable[[], object]) -> int:
    """How often Triton looked for a variant."""
    original = JITFunction.run
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=original) as looked:
        run()
    return looked.call_count


@pytest.mark.parametrize("geometry", KERNELS)
def test_a_launch_that_is_kept_gives_its_kernel_what_triton_would(gpu: GPU, geometry: Geometry) -> None:
    assert searched(lambda: step(geometry)) == len(KERNELS[geometry])
    by_triton, ours = launched(gpu), []
    assert [name for name, *_ in by_triton] == KERNELS[geometry]
    assert searched(lambda: ours.extend(step(geometry, 1))) == 0
    assert launched(gpu) == by_triton
    assert prepare.prepare_backward.bytes > 4 * sum(geometry.kernel_size)  # of the arrays of all its launches
    forget_launches()
    torch.testing.assert_close(ours, step(geometry, 1), rtol=0, atol=0)


def test_a_launch_searches_again_for_what_triton_tells_apart(gpu: GPU) -> None:
    step(CLOSED)
    variants = {variant for _, variant, *_ in launched(gpu)}
    # The forward and the backward read the shifted query, the sums of the bias gradient do not.
    assert searched(lambda: step(CLOSED, shift=1)) == 2
    assert len({variant for _, variant, *_ in launched(gpu)} - variants) == 2
    assert searched(lambda: step(CLOSED)) == 0
    step(CLOSED, dropout_p=0.1)
    # Of which Triton could take the first for a constant, the second for aligned, the others for wider.
    for dropout_p in (2**-32, 2**-28, 0.5, 1 - 2**-32):
        assert searched(lambda p=dropout_p: step(CLOSED, dropout_p=p)) == 0


def test_results_are_kept_within_their_bounds() -> None:
    made = []
    kept = Kept(lambda n: made.append(n) or n, size=lambda n: n, most=3, most_bytes=10)
    for n in (5, 4, 5, 4, 3, 5, 20, 20, 1, 2, 3, 4, 2):  # 3 pushes 5 out, 20 all, 1 that, and 4 the oldest of four
        assert kept(n) == n
    assert made == [5, 4, 3, 5, 20, 1, 2, 3, 4]


def test_a_pass_of_which_nothing_is_wanted_is_not_launched(gpu: GPU) -> None:
    for wanted, passes in ((0, {"query_backward"}), (2, {"query_backward", "key_backward"})):
        qkv = [torch.randn(1, *OPEN.shape, 2, 16, dtype=torch.bfloat16, requires_grad=i == wanted) for i in range(3)]
        out = dt.na2d(*qkv, OPEN.kernel_size, rpb=torch.zeros(2, *OPEN.bias_shape), backend="triton")
        launched(gpu)
        out.sum().backward()
        assert {name for name, *_ in launched(gpu)} - {"table"} == passes


def test_tokens_that_lie_unevenly_are_copied() -> None:
    shape = torch.Size((2, 4, 6, 3, 8))
    assert prepare.find_strides(shape, (576, 144, 24, 8, 1)) == (576, 24, 8)
    assert prepare.find_strides(shape, (3456, 432, 72, 8, 1)) == (3456, 72, 8)  # a part of packed tokens
    for stride in ((1152, 288, 24, 8, 1), (576, 144, 24, 1, 3)):
        assert prepare.find_strides(shape, stride) is None
    uneven, even = torch.zeros(2, 8, 6, 3, 16)[:, ::2], torch.zeros(2, 4, 6, 3, 3, 16)[..., 1, :, :]
    operands, found = prepare._operands(attention._places([uneven, even]))
    assert found == (0,)
    tensors = attention._evened([uneven, even], found)
    assert tensors[0].is_contiguous()
    assert tensors[1] is even
    assert [prepare.find_strides(x.shape, x.stride()) for x in tensors] == [x.strides for x in operands]
