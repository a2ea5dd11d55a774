"""Batches of maps of different sizes, run at once and map by map."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dinat_triton.map_batch import join_maps, split_maps
from tests.oracles.cases import NA
from tests.oracles.sampling import Sample

NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")


@dataclass
class MapCase:
    """A batch; `maps` are query, key, value and the gradients of output and log-sum-exp of each map."""

    sample: Sample  # its shape is what maps are padded to
    sizes: list[tuple[int, ...]]
    maps: list[list[Tensor]]
    rpb: Tensor | None

    def run(self, backend: str, packed: bool, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
        """Results of every map from one call; padding is NaN going in, and zero coming out."""
        shape = None if packed else self.sample.shape
        mask = join_maps([torch.ones(1, *size) for size in self.sizes], self.sample.rank, shape) > 0
        tensors = [join_maps(x, self.sample.rank, shape).to(dtype) for x in zip(*self.maps, strict=True)]
        tensors = [x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), torch.nan) for x in tensors]
        results = self._attend(tensors, backend, sizes=self.sizes)
        for name in NAMES:
            assert not results[name][~mask].any(), f"{name} of padding"
            results[name] = split_maps(results[name], self.sizes, packed)
        return results

    def alone(self, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
        """The same from one call per map."""
        each = [self._attend([x.to(dtype) for x in tensors], backend) for tensors in self.maps]
        return {name: [results[name] for results in each] for name in each[0]}

    def _attend(self, tensors: list[Tensor], backend: str, **options) -> dict:
        *qkv, grad_out, grad_lse = tensors
        leaves = [x.detach().requires_grad_() for x in qkv]
        rpb = None if self.rpb is None else self.rpb.to(qkv[0].dtype).requires_grad_()
        options |= self.sample.kwargs() | {"rpb": rpb, "return_lse": True, "backend": backend}
        out, lse = NA[self.sample.rank](*leaves, **options)
        leaves += [] if rpb is None else [rpb]
        grads = torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse.to(lse.dtype)])
        return dict(zip((*NAMES, "grad_rpb"), (out.detach(), lse.detach(), *grads), strict=False))

    def check(self, together: dict, alone: dict, tolerance: float = 0.0) -> None:
        """Equal bits unless there is a tolerance, but for the bias gradient, which is a sum over the maps."""
        for name in NAMES:
            for a, b in zip(together[name], alone[name], strict=True):
                error = (a - b).norm() / b.norm().clamp(min=1e-3)
                exact = torch.equal(a, b) if tolerance == 0 else error < tolerance
                assert exact, f"{name} is off by {error:.1e} for {self.sizes} in {self.sample}"
        if self.rpb is not None:
            expected = sum(x.double() for x in alone["grad_rpb"])
            torch.testing.assert_close(together["grad_rpb"].double(), expected, rtol=1e-4, atol=1e-4)


def make_map_case(sample: Sample, rng: random.Random, maps: int | None = None) -> MapCase:
    """Sizes between a window's span and the sample's shape, some of them alike."""
    axes = [*zip(sample.shape, sample.kernel_size, sample.dilation, sample.border, strict=True)]
    lengths = [
        [n for n in range(1 if border == "clip" else k * d, size + 1) if border != "wrap" or n % d == 0]
        for size, k, d, border in axes
    ]
    sizes = [tuple(map(rng.choice, lengths)) for _ in range(maps or rng.randint(1, 3))]
    sizes.insert(rng.randint(0, len(sizes)), rng.choice(sizes))
    kv_heads = rng.choice([1, 2])
    heads, (dim, value_dim) = kv_heads * rng.choice([1, 2]), rng.choice([(8, 8), (5, 3)])
    channels = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim), (heads,)]
    tensors = [[torch.randn(1, *size, *c) for c in channels] for size in sizes]
    rpb = torch.randn(heads, *(2 * k - 1 for k in sample.kernel_size)) if rng.random() < 0.8 else None
    return MapCase(sample, sizes, tensors, rpb)
