"""`import natten` after `install`, by stand-ins for the code of NATTEN's users, unchanged and of every version."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import dinat_triton as dt
from dinat_triton.integrations.natten import install, uninstall

RPB = torch.randn(2, 5, 5)


@pytest.fixture(autouse=True)
def no_other_natten(monkeypatch: pytest.MonkeyPatch):
    """The one that other tests compare with is not imported, and is back after."""
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    uninstall()


def unfused(qk: Callable, av: Callable, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, **options) -> Tensor:
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    return av(qk(q, k, *bias, 3, 2, **options).softmax(-1), v, 3, 2).movedim(1, -2)


def bias_by_position(q, k, v):
    from natten.functional import natten2dav, natten2dqkrpb

    return unfused(natten2dqkrpb, natten2dav, q, k, v, RPB)


def autograd_functions(q, k, v):
    from natten.functional import NeighborhoodAttention2DAVAutogradFunction as AV
    from natten.functional import NeighborhoodAttention2DQKAutogradFunction as QK

    qk, av = (lambda q, k, *window: QK.apply(q, k, RPB, None, *window)), (lambda a, v, *w: AV.apply(a, v, None, *w))
    return unfused(qk, av, q, k, v)


def whichever_there_is(q, k, v):
    import natten

    if natten.has_fused_na() and not hasattr(natten.functional, "na2d_qk"):
        return natten.functional.na2d(q, k, v, 3, 2, scale=1.0)
    return unfused(natten.functional.na2d_qk, natten.functional.na2d_av, q, k, v)


def by_version(q, k, v):
    import natten

    if tuple(int(part) for part in natten.__version__.split(".")[:2]) < (0, 20):
        assert not hasattr(natten.functional, "natten2dav")  # which 0.17.5 dropped
        return unfused(natten.functional.na2d_qk, natten.functional.na2d_av, q, k, v)
    assert not hasattr(natten.functional, "na2d_av")
    wide = torch.cat((v, v), -1)
    return natten.na2d(q, k, wide, kernel_size=(3, 3), dilation=2, scale=1.0, backend="cutlass-fna")[..., :4]


def switches(q, k, v):
    import natten
    from natten.context import is_fna_enabled
    from natten.functional import FusedNeighborhoodAttention2D
    from natten.types import CausalArg2DTypeOrDed  # noqa: F401
    from natten.utils import check_all_args

    natten.use_fused_na(True)
    natten.use_gemm_na(False)
    natten.use_autotuner(True)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    assert is_fna_enabled()
    window = check_all_args(2, 3, 2, False)
    assert window == ((3, 3), (2, 2), (False, False))
    return FusedNeighborhoodAttention2D.apply(q, k, v, RPB, *window, 1.0, (8, 8), (8, 8), (8, 8), (8, 8), (1, 1), False)


def generic(q, k, v):
    import natten
    from natten.functional import neighborhood_attention_generic

    assert natten.HAS_LIBNATTEN
    assert importlib.metadata.version("natten") == natten.__version__
    return neighborhood_attention_generic(
        query=q, key=k, value=v, kernel_size=(3, 3), stride=(1, 1), dilation=(2, 2), is_causal=(False, False),
        scale=1.0, backend="blackwell-fna", q_tile_shape=(16, 8), run_persistent_kernel=True,
    )  # fmt: skip


def registers(q, k, v):
    from natten.functional import na2d_av, na2d_qk

    none = k[:, 0, 0, :, None][:, :, :0]
    qk, av = partial(na2d_qk, additional_keys=none), partial(na2d_av, additional_values=none)
    return unfused(qk, av, q, k, v)


@pytest.mark.parametrize(
    ("user", "version"),
    [
        *((bias_by_position, version) for version in ("0.14.6", "0.15.1", None)),
        *((autograd_functions, version) for version in ("0.15.1", None)),
        *((by_version, version) for version in ("0.17.5", "0.21.7")),
        *((generic, version) for version in ("0.21.0", None)),
        *((user, "0.17.3") for user in (whichever_there_is, switches, registers)),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_users_code_runs_unchanged(user: Callable, version: str | None) -> None:
    qkv = [torch.randn(2, 9, 8, 2, 4, requires_grad=True) for _ in range(3)]
    rpb = RPB if user in (bias_by_position, autograd_functions, switches) else None
    expected = dt.na2d(*qkv, 3, dilation=2, rpb=rpb, scale=1.0, backend="reference")
    with install(version):
        out = user(*qkv)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["0.14.6", "0.15.1", "0.17.5", None])
def test_a_module_is_asked_for_its_bias_as_its_version_has_it(version: str | None) -> None:
    ours = dt.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)
    with install(version):
        import natten
        from natten import NeighborhoodAttention2D as NeighborhoodAttention

        options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
        options["rel_pos_bias" if hasattr(natten, "context") else "bias"] = True
        layer = NeighborhoodAttention(8, kernel_size=3, dilation=2, num_heads=2, **options)
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(1, 4, 9, 8)  # smaller than the window
    torch.testing.assert_close(layer(x), ours(x))


def test_it_is_undone_without_a_trace() -> None:
    def state() -> tuple:
        spec = importlib.util.find_spec("natten")
        return list(sys.path), os.environ.get("PYTHONPATH"), spec and spec.origin

    before = state()
    with install("0.17.5"):
        import natten
        import natten.functional
        import natten.utils.log
        from natten.utils.varlen import generate_varlen_parameters  # noqa: F401

        assert natten.__version__ == importlib.metadata.version("natten") == "0.17.5"
        assert state()[2] == natten.__file__
        with pytest.raises(RuntimeError, match=r"installed already: call uninstall\(\) first"):
            install()
    assert state() == before
    assert not any(name.split(".")[0] == "natten" for name in sys.modules)


def test_scores_can_be_left_out_for_code_that_prefers_them() -> None:
    q = torch.randn(1, 9, 8, 2, 4)
    with install("0.17.3", scores=False):
        from natten import functional

        assert {name for name in dir(functional) if name.startswith("na")} == {"na1d", "na2d", "na3d"}
        whichever_there_is(q, q, q)


def test_where_it_cannot_stand_in_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.13", "0.22.0", "1", "new"):
        with pytest.raises(ValueError, match=f"version must be one of NATTEN's from 0.14 to 0.21, .*got '{version}'"):
            install(version)
    monkeypatch.setitem(sys.modules, "natten", importlib.util)
    with pytest.raises(RuntimeError, match=r"another natten was imported from .*call install"):
        install()
