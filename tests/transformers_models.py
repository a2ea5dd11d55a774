"""Small DiNATs of transformers' classes, for the tests."""

import torch
import transformers
from torch import Tensor

from dinat_triton.integrations.transformers import load_modeling

DINAT = load_modeling()
CLASSES = ("DinatModel", "DinatForImageClassification", "DinatBackbone")
SMALL = {
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 4, 8],
    "kernel_size": 3,
    "dilations": [[3], [1, 2], [1]],
    "mlp_ratio": 2.0,
    "num_labels": 10,
    "out_features": ["stage1", "stage2"],
}


def small(**changes):
    return transformers.DinatConfig(**(SMALL | changes))


def randomized(model):
    """Biases of the attention start at zero, which would hide them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                parameter.normal_()
    return model


def build(name: str, config=None):
    return randomized(getattr(DINAT, name)(config or small())).eval()


def first(outputs) -> Tensor:
    """What a model is for: logits, features or the first feature map."""
    value = outputs[0]
    return value[0] if isinstance(value, tuple) else value
