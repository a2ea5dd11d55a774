"""DiNAT in transformers, on this package's attention: after `enable()`, whatever transformers builds from it works.

transformers takes its attention from functions that NATTEN dropped in 0.17.5, so no installed NATTEN helps: without one
its constructors raise, with a newer one the import does. And since 4.54 its own forward moves the wrong axis, so that
no operator alone can repair it. `enable()` replaces, in `transformers.models.dinat.modeling_dinat`, the check of its
constructors for NATTEN, what its models tell a Trainer about themselves, and the parts in `dinat.py` beside this file.
Parameters and checkpoints stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

from dinat_triton.integrations.replacements import Enabled, Replacements

OLDEST = (5, 14)
MODELING = "transformers.models.dinat.modeling_dinat"

# What is replaced is recognised by its parameters and by the names that its code uses: all that the replacement relies
# on, and what it leaves out. Unlike a hash of the source this survives comments, annotations and new formatting, and it
# needs no source file. A forward that was repaired or does anything else names other things, and is refused.
_USED = ("requires_backends", "NeighborhoodAttention", "DinatLayer", "DinatPatchEmbeddings", "DinatPreTrainedModel")
_INIT = ("self", "config", "dim", "num_heads", "kernel_size", "dilation")
_FORWARD = ("self", "hidden_states", "output_attentions")
_NAMES = {
    *("shape", "attention_head_size", "all_head_size", "query", "key", "value", "rpb", "kernel_size", "dilation"),
    *("view", "transpose", "permute", "contiguous", "size", "math", "sqrt"),
    *("natten2dqkrpb", "nn", "functional", "softmax", "dropout", "natten2dav"),
}

# What `enable` replaced. Empty while it is not in force.
_replaced = Replacements()


def enable() -> Enabled:
    """Makes transformers' DiNAT run on this package's attention, with any NATTEN installed or none, until `disable`.

    Models made from then on are repaired for good: they work after `disable`, and in other processes. Those that exist
    already run until `disable`. The model type `nat`, which transformers dropped, returns too. Enabling twice changes
    nothing. As a context manager it disables again, unless it had been enabled before.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: It is too old, or its code is not what this knows how to repair.
    """
    if _replaced:
        return Enabled(None)
    modeling = load_modeling()
    check_recognised(modeling)
    from dinat_triton.integrations import dinat, nat

    nat.register()  # the only thing here that can fail still: the name may be taken
    requires_backends = modeling.requires_backends

    def requires_other_backends(obj: Any, backends: Any) -> None:
        """Called by every constructor."""
        named = backends if isinstance(backends, (list, tuple)) else [backends]
        requires_backends(obj, [name for name in named if name != "natten"])
        if isinstance(obj, modeling.DinatPreTrainedModel):
            vars(obj).update(dinat.FLAGS)  # its class has them only while enabled

    _replaced.replace(modeling, "requires_backends", requires_other_backends)
    _replaced.replace(modeling.NeighborhoodAttention, "forward", dinat.NeighborhoodAttention.forward)
    for part in dinat.PARTS:
        _replaced.replace(modeling, part.__name__, part)
    for name, value in (dinat.FLAGS | {"__reduce_ex__": dinat.reduce}).items():
        _replaced.replace(modeling.DinatPreTrainedModel, name, value)
    for name in nat.__all__:
        _replaced.replace(sys.modules["transformers"], name, getattr(nat, name))
    return Enabled(disable)


def disable() -> None:
    """Gives transformers back its own code, which does not run. Does nothing where `enable` is not in force."""
    if not _replaced:
        return
    _replaced.restore()
    from dinat_triton.integrations import nat

    nat.unregister()


def is_enabled() -> bool:
    """Whether `enable` is in force."""
    return bool(_replaced)


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

    attention: Any = vars(modeling).get("NeighborhoodAttention")
    if missing := [name for name in _USED if not hasattr(modeling, name)]:
        difference = f"it has no {', '.join(missing)}"
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
