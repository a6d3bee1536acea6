"""AWQ (arXiv:2306.00978) as AutoAWQ stores it in its layout "gemm".

Of a matrix of so many outputs and inputs: `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8],
`scales` [groups, outputs]. The fields of a word, lowest bits first, are outputs 0, 2, 4, 6, 1, 3, 5, 7. A value is
scale * (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.quantised.matrix import Parts, require

if TYPE_CHECKING:
    import torch

ENDINGS = frozenset({"qweight", "qzeros", "scales"})
_PER_WORD = 8
_FIELD_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word an output is in."""
_SAME_LAYOUT = ("gemm", "exllama", "ipex")
"""Versions that differ in the kernel only."""


@dataclass(frozen=True)
class AwqMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    groups: int
    label = "int4"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import groups_of

        words = slice(start // _PER_WORD, -(-stop // _PER_WORD))
        group = groups_of(None, self.shape[1], self.groups, -(-self.shape[1] // self.groups))
        values, zeros = _in_order(parts["qweight"][:, words]), _in_order(parts["qzeros"][:, words])
        scales = parts["scales"][:, start:stop].float()
        return (values.sub_(zeros[group]).float().mul_(scales[group])).t()


class Awq:
    """See `Format`."""

    name = "AWQ"
    endings = ENDINGS
    unused = frozenset[str]()

    def matrix(self, parts: Parts) -> AwqMatrix:
        inputs, words = require(parts, "qweight", ("I32",), 2).shape
        groups, outputs = require(parts, "scales", ("F16", "BF16", "F32"), 2).shape
        zeros = require(parts, "qzeros", ("I32",), 2).shape
        if outputs != words * _PER_WORD or zeros != (groups, words) or not groups or inputs % groups:
            raise ValueError(
                f"of shape {[inputs, words]} has scales of shape {[groups, outputs]} and qzeros of {list(zeros)}"
            )
        return AwqMatrix((outputs, inputs), groups)


def format_of(settings: Mapping[str, Any]) -> Awq:
    """See `formats`."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"bits {bits!r} is not supported (4)")
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in _SAME_LAYOUT:
        raise ValueError(f"version {version!r} is not supported ({', '.join(_SAME_LAYOUT)})")
    return Awq()


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Int32 [n, outputs] of words [n, outputs / 8]."""
    import torch

    shifts = torch.tensor([4 * field for field in _FIELD_OF], dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts).bitwise_and_(15)).reshape(words.shape[0], -1)
