"""The parts of transformers' DiNAT that this package repairs: models made while enabled consist of them, and keep them.

They are classes of this module, so that a copy, a pickle or another process has them too, enabled or not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dinat_triton.functional import na2d
from dinat_triton.integrations.transformers import load_modeling
from dinat_triton.integrations.unfused import aggregate, scores
from dinat_triton.padding import crop_like, pad_to_span

_dinat: Any = load_modeling()

# What models say of themselves.
FLAGS = {
    # Their forwards take keyword arguments but give none to the loss. A Trainer that thinks otherwise does not divide
    # the loss by the steps and processes that gradients are summed over.
    "accepts_loss_kwargs": False,
    "supports_gradient_checkpointing": True,
    "_no_split_modules": ["DinatLayer"],
}


class NeighborhoodAttention(_dinat.NeighborhoodAttention):
    """Attention without its output projection."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
        """Computes what transformers' forward is meant to."""
        x = pad_to_span(hidden_states, [self.kernel_size * self.dilation] * 2, self.all_head_size)
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (layer(x).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation}
        if not output_attentions:
            dropout_p = self.dropout.p if self.dropout.training else 0.0
            context = na2d(query, key, value, **window, rpb=self.rpb, dropout_p=dropout_p)
            return (crop_like(context.flatten(-2), hidden_states),)
        # The probabilities are an output here, so they have to exist.
        query, key, value = (x.movedim(-2, 1) for x in (query * self.attention_head_size**-0.5, key, value))
        probabilities = self.dropout(scores(query, key, **window, rpb=self.rpb).softmax(-1))
        context = aggregate(probabilities, value, **window).movedim(1, -2).flatten(-2)
        shape = hidden_states.shape[1:3]
        if probabilities.shape[2:4] != shape:  # a slice would not be what the output is computed from
            probabilities = probabilities[:, :, : shape[0], : shape[1]]
        return crop_like(context, hidden_states), probabilities


class DinatLayer(GradientCheckpointingLayer, _dinat.DinatLayer):
    """A layer that can be computed again in the backward instead of being kept."""

    def maybe_pad(self, hidden_states: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
        """Leaves padding to the attention."""
        return hidden_states, (0,) * 6


class DinatPatchEmbeddings(_dinat.DinatPatchEmbeddings):
    """A 3x3 convolution of stride 2 for every doubling of the patch size."""

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)  # transformers' own knows 4 only
        sizes = {2**n: n for n in range(1, 5)} | {(2**n, 2**n): n for n in range(1, 5)}
        size = config.patch_size
        num_convs = sizes.get(size if isinstance(size, int) else tuple(size))
        if num_convs is None:
            raise ValueError(f"patch_size must be 2, 4, 8 or 16, one number or one twice, got {size}")
        self.num_channels = config.num_channels
        channels = [self.num_channels, *(config.embed_dim // 2**n for n in reversed(range(num_convs)))]
        convs = [nn.Conv2d(*pair, 3, stride=2, padding=1) for pair in pairwise(channels)]
        self.projection = nn.Sequential(*convs)


PARTS = (NeighborhoodAttention, DinatLayer, DinatPatchEmbeddings)


def rebuild(model_class: Any) -> Any:
    """An empty model, for `reduce`."""
    return model_class.__new__(model_class)


def reduce(model: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles a model so that whoever loads it imports this module first, and transformers' through it.

    transformers' own cannot be imported where there is a NATTEN of today.
    """
    return rebuild, (type(model),), model.__getstate__()
