"""NATTEN in diffusers, on this package's attention: after `enable()`, the video decoder of LTX-2.5 runs on it.

That decoder computes its attention either with FlexAttention, whose mask outgrows a GPU's memory, or with a NATTEN that
it fetches from the hub, for some GPUs. `enable()` hands it this package's `na3d` in NATTEN's place, and makes that the
default. Parameters and checkpoints stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from dinat_triton.integrations.natten import na3d
from dinat_triton.integrations.replacements import Enabled, Replacements

MODULE = "diffusers.models.autoencoders.ltx2_diffusion_decoder"

# What `enable` replaced. Empty while it is not in force.
_replaced = Replacements()


def enable() -> Enabled:
    """Makes diffusers' LTX-2.5 decoder run on this package's attention, until `disable`.

    Decoders made from then on do, and keep to it after `disable`. One that exists already does once it is given a new
    `LTX2VideoVaeNeighborhoodNattenProcessor()`. Enabling twice changes nothing. As a context manager it disables again,
    unless it had been enabled before.

    Raises:
        ImportError: diffusers is not installed.
        RuntimeError: It has no such decoder, or one that this does not know.
    """
    if _replaced:
        return Enabled(None)
    decoder = _load()
    processor = decoder.LTX2VideoVaeNeighborhoodNattenProcessor
    _replaced.replace(processor, "__init__", _init)
    _replaced.replace(decoder.LTX2VideoVaeNeighborhoodAttention, "_default_processor_cls", processor)
    return Enabled(disable)


def disable() -> None:
    """Gives diffusers back its own code. Does nothing where `enable` is not in force."""
    _replaced.restore()


def is_enabled() -> bool:
    """Whether `enable` is in force."""
    return bool(_replaced)


def _init(self: Any, backend: str | None = None) -> None:
    """Does what the processor's constructor does, without fetching anything."""
    self._na3d = na3d
    self.backend = backend


def _load() -> Any:
    """diffusers' module of the decoder, if it asks for NATTEN as is known here."""
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError("diffusers is not installed; `pip install 'dinat-triton[diffusers]'` brings it")
    import diffusers

    if importlib.util.find_spec(MODULE) is None:
        raise RuntimeError(f"diffusers must be 0.42 or newer to have a decoder on NATTEN, got {diffusers.__version__}")
    module = importlib.import_module(MODULE)
    processor = getattr(module, "LTX2VideoVaeNeighborhoodNattenProcessor", None)
    code = getattr(getattr(processor, "__init__", None), "__code__", None)
    if code is None or not {"get_kernel", "na3d", "_na3d", "backend"} <= set(code.co_names):
        raise RuntimeError(
            f"the LTX-2.5 decoder of diffusers {diffusers.__version__} does not ask for NATTEN in the way that "
            f"dinat_triton knows. Nothing was changed. Install a newer dinat-triton, or diffusers 0.42"
        )
    return module
