"""One graph for maps of all sizes: compiled and exported, of the layer and of whole models."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import dinat_triton as dt

# Of the layer below: none, one or both axes are shorter than its window's span of 6, and have to be padded.
SIZES = ((9, 10), (12, 11), (15, 8), (5, 9), (9, 4), (4, 3), (20, 21))
LEVELS = {"depths": (2, 1), "embed_dim": 32}
DILATIONS = ((1, 8), (4,))


def layer() -> nn.Module:
    return dt.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)


def timm_model() -> nn.Module:
    return timm.create_model("dinat_mini", num_classes=5, dilations=DILATIONS, **LEVELS)


def transformers_model() -> nn.Module:
    from transformers import DinatConfig
    from transformers.models.dinat.modeling_dinat import DinatModel

    dilations = [list(level) for level in DILATIONS]
    return DinatModel(DinatConfig(dilations=dilations, num_heads=[1, 2], return_dict=False, **LEVELS))


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = module(x)
    return out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))


# By default the first size has a graph of its own.
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("aot_eager", None), ("inductor", True)])
def test_all_sizes_are_one_graph(backend: str, dynamic: bool | None) -> None:
    module = layer()
    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, dynamic=dynamic, fullgraph=True)
    for i, size in enumerate(SIZES):
        x = torch.randn(2, *size, 8)
        with torch.compiler.set_stance("default" if i < 2 - bool(dynamic) else "fail_on_recompile"):
            torch.testing.assert_close(run(compiled, x), run(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("make", [timm_model, transformers_model])
def test_all_images_are_one_graph(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    # On a CPU torch's convolutions tell smaller images apart.
    for i, size in enumerate(((224, 192), (256, 200), (160, 300))):
        image = torch.randn(1, 3, *size)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            torch.testing.assert_close(compiled(image), model(image))


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("make", "channels", "least", "strict"),
    [(layer, 0, 2, False), (layer, 0, 2, True), (timm_model, 3, 33, False), (transformers_model, 3, 33, False)],
)
def test_an_export_works_in_every_size_it_claims(
    make: Callable[[], nn.Module], channels: int, least: int, strict: bool
) -> None:
    def image(*size: int) -> Tensor:
        return torch.randn(2, channels, *size) if channels else torch.randn(2, *size, 8)

    model = make().eval()
    axis = 2 if channels else 1
    dims = {axis + i: torch.export.Dim(name, min=least, max=1024) for i, name in enumerate(("height", "width"))}
    exported = torch.export.export(model, (image(64, 48),), dynamic_shapes=(dims,), strict=strict).module()
    for size in ((least, least), (least, 100), (70, least + 1), (96, 300 if channels else 5)):
        x = image(*size)
        torch.testing.assert_close(exported(x), model(x))


def test_a_window_that_does_not_fit_is_refused_in_a_graph_too() -> None:
    def attend(x: Tensor) -> Tensor:
        return dt.na2d(x, x, x, 5, dilation=2)

    compiled = torch.compile(attend, backend="eager", dynamic=True)
    assert compiled(torch.randn(1, 11, 12, 2, 4)).shape == (1, 11, 12, 2, 4)
    with pytest.raises(Exception, match=r"5 \* 2 = 10 exceeds length 9 of axis 0"):
        compiled(torch.randn(1, 9, 12, 2, 4))
