"""Weights from the hub."""

from __future__ import annotations

from typing import Any

import timm


def from_hub(name: str, **kwargs: Any) -> Any:
    """Downloads a model's weights, or takes cached ones. Where there is no network it says so within seconds."""
    import huggingface_hub

    constants = huggingface_hub.constants
    was_offline = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"no weights of {name} from the hub ({reason})") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline
