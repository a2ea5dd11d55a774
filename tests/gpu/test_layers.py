"""Every attention layer of the models on a GPU: output and gradients against float64."""

import os

import pytest
import torch

from dinat_triton.layers import Layer, layers_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted"),
]
NAMES = ("dinat_mini@224", "dinat_mini@384", "dinat_mini@coco", "dinat_large@224")
LAYERS = [layer for name in NAMES for layer in layers_of(name, batch=2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_is_right(layer: Layer, dtype: torch.dtype) -> None:
    from dinat_triton.kernels import attention
    from dinat_triton.tuner.layer_run import LayerRun

    torch.backends.cuda.matmul.allow_tf32 = False
    assert LayerRun(layer, dtype, torch.device("cuda"), attention, lambda _: {}).check(None) is None
