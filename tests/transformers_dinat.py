"""transformers' DiNAT with its attention repaired: an implementation of the models that owes nothing to this package.

No release of transformers that we support can run its own: the package it takes attention from dropped those functions,
and its view of the heads is wrong since 4.54. The module is loaded privately, so that the one in `sys.modules` stays as
it is.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor


def axis_window(size: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Positions of each query's keys and their offsets into the bias, `[size, kernel]`."""
    position = torch.arange(size)
    residue, index = position % dilation, position // dilation
    length = (size - residue + dilation - 1) // dilation
    start = torch.minimum((index - kernel // 2).clamp(min=0), length - kernel)
    keys = start[:, None] + torch.arange(kernel)
    return keys * dilation + residue[:, None], keys - index[:, None] + kernel - 1


def attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, kernel: int, dilation: int) -> Tensor:
    """The definition, on `[batch, height, width, heads, dim]`."""
    (rows, row_offsets), (columns, column_offsets) = (axis_window(n, kernel, dilation) for n in query.shape[1:3])
    at = (slice(None), rows[:, None, :, None], columns[None, :, None, :])  # [height, width, kernel, kernel]
    bias = rpb[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]].permute(1, 2, 3, 4, 0)
    logits = torch.einsum("bhwnd,bhwijnd->bhwijn", query, key[at]) * query.shape[-1] ** -0.5 + bias
    probabilities = logits.flatten(3, 4).softmax(3).view_as(logits)
    return torch.einsum("bhwijn,bhwijnd->bhwnd", probabilities, value[at])


def _forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    heads = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    return (attention(query, key, value, self.rpb, self.kernel_size, self.dilation).flatten(-2),)


@cache
def modeling() -> ModuleType:
    """A private, repaired copy of transformers' module."""
    import transformers.utils

    spec = importlib.util.find_spec("transformers.models.dinat.modeling_dinat")
    name = "transformers.models.dinat.modeling_dinat_repaired"
    spec = importlib.util.spec_from_file_location(name, spec.origin)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with patch.object(transformers.utils, "is_natten_available", lambda: False):
        spec.loader.exec_module(module)
    module.requires_backends = lambda *arguments: None
    module.NeighborhoodAttention.forward = _forward
    return module
