"""Choice of the implementation that runs, and what each needs.

(Not named backends.py: torch.compile skips every path that contains `triton/backends`.)
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

# In order of preference: a call that names no backend takes the first that can run it.
NAMES = ("triton", "tiled", "reference")
ENVIRONMENT = "DINAT_TRITON_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("use_backend", default=os.environ.get(ENVIRONMENT) or None)


class use_backend:
    """Chooses the backend of every call that names none: as a statement, or for the length of a `with` block.

    A choice holds in its own thread or asyncio task, and in tasks that this starts. Every other thread runs what the
    environment variable DINAT_TRITON_BACKEND chose: new ones too, and those in which torch runs a backward on a GPU,
    which matters to gradient checkpointing. Where torch.compile takes a whole function, calls in it name their backend.

    Args:
        name: "triton", "tiled" or "reference"; None goes back to the best that can run each call.
    """

    def __init__(self, name: str | None):
        if name is not None:
            _check_name(name, "backend")
        self._previous = _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        _chosen.set(self._previous)


def current_backend() -> str | None:
    """The choice of `use_backend` or the environment, or None."""
    name = _chosen.get()
    if name is not None:
        _check_name(name, ENVIRONMENT)
    return name


if torch.__version__ < "2.14":  # it cannot trace context variables: a graph keeps what it was compiled with
    current_backend = torch.compiler.assume_constant_result(current_backend)


def resolve(name: str | None, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> str:
    """The backend for a call. One that was named or chosen either runs or says why it cannot."""
    name = current_backend() if name is None else name
    if name is None:
        return next(n for n in NAMES if why_not(n, query, key, value, scale) is None)
    _check_name(name, "backend")
    reason = why_not(name, query, key, value, scale)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return name


def why_not(name: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> str | None:
    """Why a backend cannot run this call, or None if it can."""
    if name != "triton":
        return None
    support = _support()
    return support.why_not(query, key, value, scale) if support else "the package triton is not installed"


@cache
def _support() -> ModuleType | None:
    """The module that says why the kernels cannot run a call, if there is Triton."""
    if find_spec("triton") is None:
        return None
    from dinat_triton.kernels import support

    return support


def _check_name(name: str, argument: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
