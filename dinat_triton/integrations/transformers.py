"""DiNAT in transformers, on this package's attention: after `enable()`, whatever transformers builds from it works.

transformers takes its attention from functions that NATTEN dropped in 0.17.5, so no installed NATTEN helps: without one
its constructors raise, with a newer one the import does. And since 4.54 its own forward moves the wrong axis, so that
no operator alone can repair it. `enable()` replaces three things in `transformers.models.dinat.modeling_dinat`: the
forward of its attention, the check of its constructors for NATTEN, and what its classifier tells a Trainer about its
loss. Parameters and checkpoints stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from dinat_triton.functional import na2d
from dinat_triton.integrations.unfused import aggregate, scores

OLDEST = (5, 14)
MODELING = "transformers.models.dinat.modeling_dinat"

# What is replaced is recognised by its parameters and by the names that its code uses: all that the replacement relies
# on, and what it leaves out. Unlike a hash of the source this survives comments, annotations and new formatting, and it
# needs no source file. A forward that was repaired or does anything else names other things, and is refused.
_INIT = ("self", "config", "dim", "num_heads", "kernel_size", "dilation")
_FORWARD = ("self", "hidden_states", "output_attentions")
_NAMES = {
    *("shape", "attention_head_size", "all_head_size", "query", "key", "value", "rpb", "kernel_size", "dilation"),
    *("view", "transpose", "permute", "contiguous", "size", "math", "sqrt"),
    *("natten2dqkrpb", "nn", "functional", "softmax", "dropout", "natten2dav"),
}

# What `enable` replaced: (owner, name) to the original, or to MISSING. Empty while it is not in force.
_replaced: dict[tuple[Any, str], Any] = {}
MISSING = object()


class Enabled:
    """What `enable` returns: a context manager that ends what its `enable` began, and nothing from before."""

    def __init__(self, is_new: bool):
        self._is_new = is_new

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_new:
            disable()


def enable() -> Enabled:
    """Makes transformers' DiNAT run on this package's attention, with any NATTEN installed or none, until `disable`.

    Models that exist already change with it. The model type `nat`, which transformers dropped, returns too. Enabling
    twice changes nothing. As a context manager it disables again, unless it had been enabled before.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: It is too old, or its code is not what this knows how to repair.
    """
    if _replaced:
        return Enabled(False)
    modeling = load_modeling()
    check_recognised(modeling)
    from dinat_triton.integrations import nat

    nat.register()  # the only thing here that can fail still: the name may be taken
    requires_backends = modeling.requires_backends

    def requires_other_backends(obj: Any, backends: Any) -> None:
        named = backends if isinstance(backends, (list, tuple)) else [backends]
        requires_backends(obj, [name for name in named if name != "natten"])

    _replace(modeling.NeighborhoodAttention, "forward", _forward)
    _replace(modeling, "requires_backends", requires_other_backends)
    # Its forward takes keyword arguments but gives none to its loss. A Trainer that thinks otherwise does not divide
    # the loss by the steps and processes that gradients are summed over.
    _replace(modeling.DinatForImageClassification, "accepts_loss_kwargs", False)
    return Enabled(True)


def disable() -> None:
    """Gives transformers back its own code, which does not run. Does nothing where `enable` is not in force."""
    if not _replaced:
        return
    for (owner, name), original in _replaced.items():
        delattr(owner, name) if original is MISSING else setattr(owner, name, original)
    _replaced.clear()
    from dinat_triton.integrations import nat

    nat.unregister()


def is_enabled() -> bool:
    """Whether `enable` is in force."""
    return bool(_replaced)


def _replace(owner: Any, name: str, new: Any) -> None:
    _replaced[owner, name] = vars(owner).get(name, MISSING)
    setattr(owner, name, new)


def load_modeling() -> ModuleType:
    """transformers' module of DiNAT, imported as if there were no NATTEN: its import breaks on any recent one."""
    _check_version()
    if MODELING in sys.modules:
        return sys.modules[MODELING]
    import transformers.utils as utils

    is_available = utils.is_natten_available
    utils.is_natten_available = lambda: False
    try:
        return importlib.import_module(MODELING)
    finally:
        utils.is_natten_available = is_available


def _check_version() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed; `pip install 'dinat-triton[transformers]'` brings it")
    import transformers

    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(f"transformers must be {oldest} or newer for DiNAT to be repaired, got {version}")


def check_recognised(modeling: ModuleType) -> None:
    """Refuses code that is not known: a blind repair could compute something else without a word."""
    import transformers

    attention = getattr(modeling, "NeighborhoodAttention", None)
    if attention is None or not hasattr(modeling, "requires_backends"):
        difference = "it has no NeighborhoodAttention, or no check for NATTEN"
    elif (found := tuple(inspect.signature(attention.__init__).parameters)) != _INIT:
        difference = f"NeighborhoodAttention takes {found}, not {_INIT}"
    elif (found := tuple(inspect.signature(attention.forward).parameters)) != _FORWARD:
        difference = f"its forward takes {found}, not {_FORWARD}"
    elif names := _NAMES.symmetric_difference(getattr(inspect.unwrap(attention.forward).__code__, "co_names", ())):
        difference = f"its forward differs in its use of {', '.join(sorted(names))}"
    else:
        return
    raise RuntimeError(
        f"the DiNAT of transformers {transformers.__version__} is not the code that dinat_triton knows how to repair: "
        f"{difference}. Nothing was changed. It may have been repaired there: try it without enable(); otherwise "
        f"install a newer dinat-triton, or an older transformers (5.14 to 5.24 are known to work)"
    )


def _forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """What NeighborhoodAttention.forward is meant to compute."""
    heads = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    if not output_attentions:
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        context = na2d(query, key, value, self.kernel_size, dilation=self.dilation, rpb=self.rpb, dropout_p=dropout_p)
        return (context.flatten(-2),)
    # The probabilities are an output here, so they have to exist.
    query, key, value = (x.movedim(-2, 1) for x in (query * self.attention_head_size**-0.5, key, value))
    logits = scores(query, key, self.kernel_size, self.dilation, rpb=self.rpb)
    probabilities = self.dropout(logits.softmax(-1))
    context = aggregate(probabilities, value, self.kernel_size, self.dilation)
    return context.movedim(1, -2).flatten(-2), probabilities
