"""Attributes of other packages, replaced until they are given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MISSING = object()


class Replacements:
    """Things that one integration replaced, as they were. False while nothing is replaced."""

    def __init__(self) -> None:
        self._originals: dict[tuple[Any, str], Any] = {}

    def __bool__(self) -> bool:
        return bool(self._originals)

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Sets an attribute, which may be missing."""
        self._originals[owner, name] = vars(owner).get(name, MISSING)
        setattr(owner, name, new)

    def restore(self) -> None:
        """Gives everything back."""
        for (owner, name), original in self._originals.items():
            delattr(owner, name) if original is MISSING else setattr(owner, name, original)
        self._originals.clear()


class Enabled:
    """Result of an `enable`: a context manager that ends what its `enable` began, and nothing from before."""

    def __init__(self, disable: Callable[[], None] | None) -> None:
        self._disable = disable

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._disable is not None:
            self._disable()
