"""Problems of attention, run by any backend or by brute force, and compared in float64."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import dinat_triton as dt
from tests.oracles import brute
from tests.oracles.sampling import Sample

NA = {1: dt.na1d, 2: dt.na2d, 3: dt.na3d}


@dataclass
class Case:
    """A problem in float64; leaves are query, key, value and maybe the bias."""

    sample: Sample
    leaves: list[Tensor]
    grad_out: Tensor
    grad_lse: Tensor
    scale: float | None = None
    dropout_p: float = 0.0
    key_mask: Tensor | None = None

    def run(self, backend: str, dtype: torch.dtype, wanted: Iterable[int] = range(4)) -> dict[str, Tensor]:
        """Outputs, and gradients of the wanted leaves.

        The bias is never narrower than float32, as a parameter under autocast would be.
        `backend` is one of ours, which get NaNs in hidden keys and values, or "brute" for loops over the definition.
        """
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(dtype if i < 3 else wide).detach() for i, x in enumerate(self.leaves)]
        wanted = [i for i in wanted if i < len(leaves)]
        for i in wanted:
            leaves[i].requires_grad_()
        options = self.sample.kwargs() | {"scale": self.scale, "rpb": leaves[3] if len(leaves) == 4 else None}
        if self.key_mask is not None:
            options["key_mask"] = self.key_mask
            hidden = torch.nan if backend != "brute" else 0
            for x in leaves[1:3]:
                x.data.masked_fill_(~self.key_mask[..., None, None], hidden)
        if backend == "brute":
            out, lse = brute.attention(*leaves[:3], **options)
        else:
            torch.manual_seed(3)  # the same dropout everywhere
            options |= {"dropout_p": self.dropout_p, "return_lse": True, "backend": backend}
            out, lse = NA[self.sample.rank](*leaves[:3], **options)
        outputs = [x for x in (out, lse) if x.requires_grad]  # the reference's log-sum-exp does not depend on values
        given = [self.grad_out.to(out.dtype), self.grad_lse.to(lse.dtype)]
        grads = torch.autograd.grad(outputs, [leaves[i] for i in wanted], given[: len(outputs)])
        names = ("grad_query", "grad_key", "grad_value", "grad_rpb")
        return {"out": out.detach(), "lse": lse.detach()} | dict(zip([names[i] for i in wanted], grads, strict=True))


def make_case(sample: Sample, rng: random.Random, device: str = "cpu", **options) -> Case:
    """Sizes differ from each other, so that a mixed-up axis cannot go unseen."""
    kv_heads = rng.choice([1, 2])
    heads = options.pop("heads", kv_heads * rng.choice([1, 1, 2]))
    kv_heads = min(kv_heads, heads)
    dim, value_dim = options.pop("dims", rng.choice([(8, 8), (5, 3), (12, 20)]))
    lead = (options.pop("batch", rng.choice([1, 2])), *sample.shape)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device)

    leaves = [normal(*lead, heads, dim), normal(*lead, kv_heads, dim), normal(*lead, kv_heads, value_dim)]
    if options.pop("biased", rng.random() < 0.85):
        leaves.append(normal(heads, *(2 * k - 1 for k in sample.kernel_size)))
    if options.pop("masked", False):
        options["key_mask"] = torch.rand(lead, device=device) < rng.choice([0.2, 0.6, 0.9])
    return Case(sample, leaves, normal(*lead, heads, value_dim), normal(*lead, heads), **options)


def check_wanted(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Compares gradients that are wanted alone, and in pairs, with those of a backward of all."""
    every = case.run(backend, dtype)
    for wanted in [(0,), (1,), (2,), (3,), (0, 3), (1, 2)]:
        for name, value in case.run(backend, dtype, wanted).items():
            torch.testing.assert_close(value, every[name], msg=lambda m, x=f"{name} of {wanted}": f"{x}: {m}")


def hide(case: Case) -> Tensor:
    """Hides all keys of head 0, and of other heads each query from itself; returns who then sees nothing."""
    case.leaves[3][0] = -torch.inf
    case.leaves[3][(slice(1, None), *(k - 1 for k in case.sample.kernel_size))] = -torch.inf
    empty = torch.zeros(case.grad_lse.shape, dtype=torch.bool)
    empty[..., 0] = True
    if case.sample.is_causal == (True,):
        empty[:, : case.sample.dilation[0]] = True  # the first of a residue class would see itself alone
    return empty


def check(
    case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, *backends: str, truth: str = "reference"
) -> None:
    """Compares backends, by default the kernels, with another one in float64."""
    exact = case.run(truth, torch.float64)
    for backend in backends or ("triton",):
        for name, value in case.run(backend, dtype).items():
            empty = exact[name].isneginf()  # log-sum-exps of who sees nothing
            assert torch.equal(value.isneginf(), empty), f"{name} of {backend} on {case.sample}"
            found, expected = value.double().masked_fill(empty, 0), exact[name].masked_fill(empty, 0)
            error = (found - expected).norm() / expected.norm().clamp(min=1e-3)
            assert error < tolerance, f"{name} of {backend} is off by {error:.1e} on {case.sample}"


def check_narrow(case: Case, dtype: torch.dtype) -> None:
    """Every error is at most 2 eps of the dtype; that of the log-sum-exp, which is float32, as in float32."""
    case.leaves = [x.to(dtype).double() for x in case.leaves]  # what rounding the inputs costs is not ours
    case.grad_out = case.grad_out.to(dtype).double()
    exact = case.run("reference", torch.float64)
    for name, value in case.run("triton", dtype).items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        allowed = 1e-5 if name == "lse" else 2 * torch.finfo(dtype).eps
        assert error < allowed, f"{name}: {error:.1e} against {allowed:.1e} on {case.sample}"
