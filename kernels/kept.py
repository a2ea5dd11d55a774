"""A cache with a bound in bytes: what it keeps are index arrays on a device, small for most maps and large for some."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """A function whose results are kept: the newest, and as many before it as there is room for.

    Args:
        function: Of hashable positional arguments.
        size: Bytes of a result.
        most: Results at most.
        most_bytes: Bytes of all of them at most, unless the newest alone takes more.
    """

    def __init__(self, function: Callable[..., T], size: Callable[[T], int], most: int, most_bytes: int):
        self._function, self._size, self._most, self._most_bytes = function, size, most, most_bytes
        self._lock = Lock()
        self.cache_clear()

    def __call__(self, *arguments: Hashable) -> T:
        result = self._results.get(arguments)
        return self._add(arguments) if result is None else result

    def _add(self, arguments: tuple[Hashable, ...]) -> T:
        result = self._function(*arguments)
        with self._lock:
            self._results.setdefault(arguments, result)
            self._bytes[arguments] = self._size(result)
            while len(self._results) > 1 and (len(self._results) > self._most or self.bytes > self._most_bytes):
                oldest = next(iter(self._results))
                del self._results[oldest], self._bytes[oldest]
        return result

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(self._bytes.values())

    def cache_clear(self) -> None:
        self._results: dict[tuple[Hashable, ...], T] = {}
        self._bytes: dict[tuple[Hashable, ...], int] = {}
