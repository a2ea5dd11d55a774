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

from torch import Tensor

from tests.oracles import brute


def _forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    heads = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    window = ((self.kernel_size,) * 2, (self.dilation,) * 2, (1, 1), (False, False), ("shift",) * 2)
    out, _ = brute.attention(query, key, value, *window, self.rpb)
    return (out.flatten(-2).to(hidden_states.dtype),)


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
