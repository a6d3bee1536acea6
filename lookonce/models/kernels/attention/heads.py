"""What the kernels are written for: the model's heads and the CPU's vectors."""

from __future__ import annotations

from dataclasses import dataclass

from lookonce.models.kernels.code import LOG2_E

PIECE = 4  # tokens of one piece of storing; tokens' heads of one piece of `finish`


@dataclass(frozen=True)
class Heads:
    """`group` query heads of `size` places on each of `kv_heads`; `lanes` float32 make a vector, of which one piece of
    `look` has up to `vectors` side by side."""

    size: int
    group: int
    kv_heads: int
    lanes: int
    vectors: int

    @property
    def block(self) -> int:
        """Rows of a piece of `look`."""
        return self.lanes * self.vectors

    @property
    def scale(self) -> float:
        """Of scores, whose weights are powers of two."""
        return float(self.size**-0.5) * LOG2_E
