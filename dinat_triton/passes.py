"""The passes of the Triton kernels over a plan, and what each computes and moves in its forms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pass(StrEnum):
    """A pass over a plan, by its kernel. A backward is the closed one, or one of queries and one of keys."""

    FORWARD = "forward"
    CLOSED_BACKWARD = "closed_backward"
    QUERY_BACKWARD = "query_backward"
    KEY_BACKWARD = "key_backward"

    @property
    def is_backward(self) -> bool:
        return self is not Pass.FORWARD

    @property
    def over_keys(self) -> bool:
        """Whether its tiles are of keys, and their columns the queries that see these."""
        return self is Pass.KEY_BACKWARD


@dataclass(frozen=True)
class Traffic:
    """Tensors of rows and of columns that a pass moves, float32 numbers per row, and its matrix products per score.

    Attributes:
        products: Over the channels of keys, and of values.
    """

    rows: int
    columns: int
    numbers: int
    products: tuple[int, int]


# The gradient of the bias takes a pass over queries of its own where a tile has several chunks of columns.
CHUNKS, BIAS = f"{Pass.QUERY_BACKWARD} chunks", f"{Pass.QUERY_BACKWARD} bias"
TRAFFIC: dict[str, Traffic] = {
    Pass.FORWARD: Traffic(2, 2, 1, (1, 1)),
    Pass.CLOSED_BACKWARD: Traffic(3, 4, 1, (3, 2)),
    Pass.QUERY_BACKWARD: Traffic(3, 2, 3, (2, 1)),
    CHUNKS: Traffic(4, 2, 3, (2, 1)),
    BIAS: Traffic(2, 2, 2, (1, 1)),
    Pass.KEY_BACKWARD: Traffic(4, 2, 2, (2, 2)),
}
