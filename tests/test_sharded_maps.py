"""Maps sharded over processes against the whole map in one: outputs, gradients, bytes and errors."""

import os
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import dinat_triton as dt
from dinat_triton import plots, tiled
from dinat_triton.distributed import exchange
from dinat_triton.distributed import shares as sharing
from dinat_triton.distributed.shares import CLASSES, HALO, chunks, shares
from dinat_triton.geometry import BORDERS, Axis
from tests.oracles.cases import NA, Case, make_case
from tests.oracles.sampling import sample
from tests.processes import in_processes

MESHES = [(2,), (3,), (4,), (2, 2)]


def in_a_group(ranks: int, program: Callable[[], None], timeout: timedelta = timedelta(minutes=1)) -> None:
    in_processes(ranks, joined, program, timeout)


def joined(program: Callable[[], None], timeout: timedelta) -> None:
    dist.init_process_group("gloo", timeout=timeout)
    program()
    dist.destroy_process_group()


def axes(count: int) -> Iterator[tuple[Axis, int]]:
    """Random axes, and numbers of ranks."""
    rng = random.Random(count)
    for _ in range(count):
        one = sample(rng, 1, max_tokens=60, borders=BORDERS)
        yield dt.Geometry(one.shape, **one.kwargs()).axes[0], rng.randint(1, 9)


@pytest.mark.parametrize("scheme", [HALO, CLASSES])
def test_windows_of_a_share_are_those_of_the_map(scheme: str) -> None:
    for axis, ranks in axes(250):
        parts = shares(axis, ranks, scheme)
        assert sorted(p for part in parts for p in part.owned) == list(range(axis.size))
        for part in parts:
            seen = [axis.seen_at(int(position)).tolist() for position in part.owned]
            assert [part.positions[part.axis.seen_at(query)].tolist() for query in part.queries] == seen
            assert (part.positions[part.slots] == part.needed[part.sources]).all()
            assert part.needed.tolist() == sorted({key for window in seen for key in window})


def test_queries_that_see_only_keys_of_their_rank_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with few rows computes them at once."""
    for length, is_split in ((10, False), (41, False), (42, True)):
        (axis,) = dt.Geometry((4 * length,), 7).axes
        assert (sharing.split_share(axis, np.arange(length, 2 * length)) is not None) == is_split
    monkeypatch.setattr(sharing, "MOST_WORK_OF_A_SPLIT", 1000)
    for axis, ranks in axes(200):
        for own in chunks(axis.size, ranks):
            split = sharing.split_share(axis, own)
            inside = [set(axis.seen_at(int(position))) <= set(own) for position in own]
            if split is None:
                assert all(inside) or not any(inside)
                continue
            assert np.array_equal(np.concatenate([share.owned for share in split if share]), own)
            first, count = len(split[0].owned) if split[0] else 0, len(split[1].owned)
            assert all(inside[first : first + count])


@pytest.mark.parametrize("scheme", [HALO, CLASSES])
def test_the_picture_shows_what_ranks_compute_and_read(scheme: str) -> None:
    geometry = dt.Geometry((4, 23), (3, 3), (1, 4), (1, 2))
    cells, fetched = plots.share_cells(geometry, 3, 1, scheme)
    assert (cells == plots.SELF).sum(0).tolist() == [1] * 23
    for rank, (row, count) in enumerate(zip(cells, fetched, strict=True)):
        read = {key for query in np.flatnonzero(row == plots.SELF) for key in geometry.axes[1].seen_at(int(query))}
        assert set(np.flatnonzero(row)) == read | set(np.flatnonzero(row == plots.SELF))
        assert count == len(read - set(chunks(23, 3)[rank]))


def told(tell: Callable[..., object], function: Callable) -> Callable:
    """A function that tells what it is called with."""

    def call(*args, **kwargs):
        tell(*args)
        return function(*args, **kwargs)

    return call


def random_case(rng: random.Random, mesh: DeviceMesh) -> tuple[Case, list[Placement]]:
    """Maps are cut along their axes more often than along the batch, and along heads where these divide."""
    rank = rng.randint(max(1, mesh.ndim - 1), 3)
    case = make_case(sample(rng, rank, borders=BORDERS), rng, masked=rng.random() < 0.3)
    dims = [*range(1, rank + 1)] * 3 + [0]
    dims += [rank + 1] * (rank == 1 and all(case.leaves[1].shape[-2] % n == 0 for n in mesh.shape))
    cut: dict[int, None] = {}
    while len(cut) < mesh.ndim:
        cut[rng.choice(dims)] = None
    return case, [Shard(dim) for dim in cut]


def cut(x: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def run_sharded(case: Case, mesh: DeviceMesh, placements: list[Placement], backend: str) -> dict[str, Tensor]:
    """What `Case.run` gives, from ranks that have parts."""
    heads = Shard(case.sample.rank + 1)
    of_bias = [Shard(0) if p == heads else Replicate() for p in placements]
    leaves = [cut(x, mesh, *of_bias if i == 3 else placements).requires_grad_() for i, x in enumerate(case.leaves)]
    options = case.sample.kwargs() | {"scale": case.scale, "rpb": leaves[3] if len(leaves) == 4 else None}
    if case.key_mask is not None:
        options["key_mask"] = cut(case.key_mask, mesh, *(Replicate() if p == heads else p for p in placements))
    out, lse = NA[case.sample.rank](*leaves[:3], **options, return_lse=True, backend=backend)
    grads = torch.autograd.grad([out, lse], leaves, [cut(x, mesh, *placements) for x in (case.grad_out, case.grad_lse)])
    names = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_rpb")
    return {name: x.full_tensor() for name, x in zip(names, (out.detach(), lse.detach(), *grads), strict=False)}


def foreseen(case: Case, mesh: DeviceMesh, placements: list[Placement]) -> int:
    """Bytes that this rank is to receive in a forward."""
    query, key, value = (cut(x, mesh, *placements).to_local() for x in case.leaves[:3])
    rank, ranks, at = case.sample.rank, [1] * (query.ndim - 1), [0] * (query.ndim - 1)
    for dim, placement in enumerate(placements):
        ranks[placement.dim], at[placement.dim] = mesh.size(dim), mesh.get_local_rank(dim)
    counts = {"batch": len(query), "heads": query.shape[-2], "kv_heads": key.shape[-2], "dim": query.shape[-1]}
    counts |= {"value_dim": value.shape[-1], "has_key_mask": case.key_mask is not None}
    geometry = dt.Geometry(case.sample.shape, **case.sample.kwargs())
    cost = dt.distributed.cost(geometry, ranks[1 : rank + 1], **counts, dtype=torch.float64, return_lse=True)
    return int(cost.received[tuple(at[1 : rank + 1])])


def compare(cases: int, first: int) -> None:
    sharing.MOST_WORK_OF_A_SPLIT = 1000  # whatever it costs
    meshes = [DeviceMesh("cpu", torch.arange(prod(shape)).view(shape)) for shape in MESHES]
    for number in range(first, first + cases):
        rng = random.Random(number)
        torch.manual_seed(number)
        mesh = meshes[number % len(meshes)]
        case, placements = random_case(rng, mesh)
        if mesh.get_coordinate() is None:
            continue
        expected = case.run("reference", torch.float64)
        swapped: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            tell = partial(lambda to, x, *_: to.append(x.nbytes), swapped)
            patch.setattr(dist, "all_to_all_single", told(tell, dist.all_to_all_single))
            results = run_sharded(case, mesh, placements, "reference" if number % 3 else "tiled")
        what = f"{case.sample}, {placements}"
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9, msg=f"{what}: {{}}".format)
        received = torch.tensor([sum(swapped), foreseen(case, mesh, placements)])
        for dim in range(mesh.ndim):
            dist.all_reduce(received, group=mesh.get_group(dim))
        assert received[0] == 2 * received[1], (received, case.sample, placements)


def overlap() -> None:
    """What the rank in the middle does, in its order: there and back it computes while keys or gradients are moved."""
    mesh, events = DeviceMesh("cpu", torch.arange(3)), []
    torch.manual_seed(0)
    maps = [torch.randn(1, 60, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parts = [cut(x.detach(), mesh, Shard(1)).requires_grad_() for x in maps]
    watched = [(tiled, "forward", "attend"), (tiled, "backward", "attend")]
    watched += [(dist, "all_to_all_single", "send"), (exchange._Transit, "receive", "receive")]
    with pytest.MonkeyPatch.context() as patch:
        for place, name, event in watched:
            patch.setattr(place, name, told(lambda *_, event=event: events.append(event), getattr(place, name)))
        out = dt.na1d(*parts, 3, backend="tiled")
        there = events.copy()
        events.clear()
        grads = torch.autograd.grad(out.full_tensor().sin().sum(), parts)
    if dist.get_rank() == 1:
        assert there == ["send", "attend", "receive", "attend", "attend"]
        assert events == ["attend", "attend", "send", "attend", "receive"]
    exact = dt.na1d(*maps, 3, backend="reference")
    found = tuple(x.full_tensor() for x in (out, *grads))
    torch.testing.assert_close(found, (exact, *torch.autograd.grad(exact.sin().sum(), maps)))


def refuse_alike() -> None:
    """Every rank raises, whichever of them is to blame."""
    rank, mesh = dist.get_rank(), DeviceMesh("cpu", torch.arange(3))

    def part(length: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> DTensor:
        return DTensor.from_local(torch.zeros(1, length, heads, 4, dtype=dtype), mesh, [Shard(1)], run_check=False)

    def whole(*shape: int, placement: Placement) -> DTensor:
        return cut(torch.zeros(*shape), mesh, placement)

    good = part(4)
    uneven = DTensor.from_local(
        torch.zeros(1, 5 - rank, 2, 4), mesh, [Shard(1)], run_check=False, shape=good.shape, stride=good.stride()
    )
    partial_sums = DTensor.from_local(torch.zeros(1, 12, 2, 4), mesh, [Partial()], run_check=False)
    calls: list[tuple[str, tuple, dict]] = [
        (r"query must be alike on all ranks: \(1, 12, .* on rank 0, \(1, 15, ", (part(4 + rank // 2),) * 3, {}),
        (r"query must have a local part of shape \(1, 4, 2, 4\).* got \(1, [35], 2, 4\)", (uneven,) * 3, {}),
        (r"key must have the dtype of query", (good, part(4, 2, [torch.float32, torch.float64][rank == 1]), good), {}),
        (r"value must be a DTensor", (good, good, torch.zeros(1, 12, 2, 4)), {}),
        (r"value must be placed with query", (good, good, whole(1, 12, 2, 4, placement=Shard(0))), {}),
        (r"query must be placed by Shard or Replicate, got P", (partial_sums,) * 3, {}),
        (r"query must not be sharded over the channels", (whole(1, 12, 2, 4, placement=Shard(3)),) * 3, {}),
        (r"key must have a multiple of 3 heads", (whole(1, 12, 4, 4, placement=Shard(2)),) * 3, {}),
        (r"kernel_size \* dilation must fit the map: 3 \* 5", (good,) * 3, {"dilation": 5}),
        (r"dilation must be alike on all ranks", (good,) * 3, {"dilation": 1 + rank // 2}),
        (r"key_mask must be a DTensor", (good,) * 3, {"key_mask": torch.ones(1, 12) > 0}),
        (r"key_mask must be a bool tensor", (good,) * 3, {"key_mask": whole(1, 12, placement=Shard(1))}),
        (r"key_mask must be placed with query, by", (good,) * 3, {"key_mask": whole(1, 12, placement=Shard(0)) == 0}),
        (r"sizes must be None for DTensors", (good,) * 3, {"sizes": [12]}),
        (r"rpb must be replicated", (good,) * 3, {"rpb": whole(2, 5, placement=Shard(0))}),
        (r"rpb must have shape", (good,) * 3, {"rpb": torch.zeros(2, 4)}),
        (r"dropout_p must be at least 0", (good,) * 3, {"dropout_p": 1.5}),
    ]
    for message, tensors, options in calls:
        with pytest.raises((ValueError, TypeError), match=message):
            dt.na1d(*tensors, 3, **options)


def lose_a_rank() -> None:
    mesh = DeviceMesh("cpu", torch.arange(3))
    x = cut(torch.zeros(1, 12, 2, 4), mesh, Shard(1))
    dt.na1d(x, x, x, 3)
    if dist.get_rank() == 2:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)timed out|closed by peer|reset by peer"):  # noqa: PT012
        dt.na1d(x, x, x, 3)
        dt.na1d(x, x, x, 3)  # one that needs nothing from rank 2 notices when its neighbor has gone
    os._exit(0)  # nor can the group be left in good order


@pytest.mark.parametrize(
    ("ranks", "program", "seconds"),
    [
        (4, partial(compare, 16, 0), 60),
        pytest.param(4, partial(compare, 300, 100), 60, marks=pytest.mark.slow),
        (3, overlap, 60),
        (3, refuse_alike, 60),
        (3, lose_a_rank, 5),
    ],
)
def test_ranks(ranks: int, program: Callable[[], None], seconds: int) -> None:
    """What each of several processes checks; a collective that one of them does not join ends after some seconds."""
    in_a_group(ranks, program, timedelta(seconds=seconds))
