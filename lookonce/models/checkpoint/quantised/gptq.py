"""GPTQ (arXiv:2210.17323) as AutoGPTQ, GPTQModel and transformers store it.

Of a matrix of so many outputs and inputs: `qweight` int32 [inputs * bits / 32, outputs], `scales` [groups, outputs],
`qzeros` int32 [groups, outputs * bits / 32], `g_idx` int32 [inputs], the group of each input. The lowest bits of a word
come first; of 3 bits, 32 lie in a run of three words. A value is scale * (q - zero). The older form stores zeros less
one (checkpoint_format "gptq"), the newer as they are ("gptq_v2"). Bits follow from the shapes, as settings may differ
between modules ("dynamic").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.quantised.matrix import Parts, require

if TYPE_CHECKING:
    import torch

_BITS = (2, 3, 4, 8)
ENDINGS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
_FLOATS = ("F16", "BF16", "F32")
_TAKEN = {3: (0x24924924, 0x92492492, 0x49249249)}
"""What GPTQModel took from zeros' words in turn, where it is not one of each field."""
_FIELDS = 7
"""GPTQModel's first version that takes one from each 3-bit field by itself."""


@dataclass(frozen=True)
class GptqMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    bits: int
    groups: int
    size: int  # inputs of a group, where `g_idx` doesn't say
    zeros: str  # how zeros are stored: "as they are", "less one", or "less one, whole words"

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import groups_of, unpacked

        group = groups_of(parts.get("g_idx"), self.shape[1], self.groups, self.size)
        words = slice(start * self.bits // 32, -(-stop * self.bits // 32))
        values = unpacked(parts["qweight"][:, start:stop], self.bits, 0)
        zeros = self._zeros(parts["qzeros"][:, words])[:, : stop - start]
        scales = parts["scales"][:, start:stop].float()
        return (values.sub_(zeros[group]).float().mul_(scales[group])).t()

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import unpacked

        if self.zeros == "as they are":
            return unpacked(words, self.bits, 1)
        if self.zeros == "less one":  # AutoGPTQ: each field by itself
            return unpacked(words, self.bits, 1).add_(1).bitwise_and_((1 << self.bits) - 1)
        import torch

        ones = torch.tensor(_TAKEN.get(self.bits) or [sum(1 << shift for shift in range(0, 32, self.bits))])
        added = ones.repeat(-(-words.shape[1] // len(ones)))[: words.shape[1]]
        return unpacked((words.long() + added).to(words.dtype), self.bits, 1)


@dataclass(frozen=True)
class Gptq:
    """See `Format`."""

    size: int
    zeros: str
    by_field: bool = False  # "less one" of 3 bits, whatever `zeros` says
    bits: tuple[int, ...] = _BITS  # those that a matrix may have
    name: str = "GPTQ"
    endings = ENDINGS
    unused = frozenset[str]()

    def matrix(self, parts: Parts) -> GptqMatrix:
        words, outputs = require(parts, "qweight", ("I32",), 2).shape
        groups, scaled = require(parts, "scales", _FLOATS, 2).shape
        zeros = require(parts, "qzeros", ("I32",), 2).shape
        if "g_idx" in parts:
            inputs = require(parts, "g_idx", ("I32", "I64"), 1).shape[0]
            bits = 32 * words // inputs if inputs else 0
        else:
            bits = 32 * zeros[1] // outputs if outputs else 0
            inputs = 32 * words // bits if bits else 0
        if bits not in self.bits or inputs * bits != 32 * words or outputs * bits % 32:
            raise ValueError(f"of shape {[words, outputs]} holds no {', '.join(map(str, self.bits))}-bit integers")
        for ending, found, shape in (
            ("qzeros", zeros, (groups, outputs * bits // 32)),
            ("scales", (groups, scaled), (max(1, groups), outputs)),
        ):
            if found != shape:
                raise ValueError(f"has {ending} of shape {list(found)}, not {list(shape)}")
        size = self.size if self.size > 0 and groups == -(-inputs // self.size) else -(-inputs // groups)
        return GptqMatrix(
            (outputs, inputs), bits, groups, size, "less one" if self.by_field and bits == 3 else self.zeros
        )


def format_of(settings: Mapping[str, Any]) -> Gptq:
    """See `formats`."""
    bits = settings.get("bits")
    if bits not in _BITS and not settings.get("dynamic"):
        raise ValueError(f"bits {bits!r} is not supported ({', '.join(map(str, _BITS))})")
    stored = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    size = int(settings.get("group_size") or -1)
    if stored == "gptq_v2":
        return Gptq(size, "as they are")
    if stored != "gptq":
        raise ValueError(f"checkpoint_format {stored!r} is not supported (gptq, gptq_v2)")
    meta = settings.get("meta")
    quantizer = str(meta.get("quantizer") if isinstance(meta, dict) else "").lower()
    if "gptqmodel" not in quantizer:
        return Gptq(size, "less one")
    # It takes one from every field by taking it from the word: a zero of 0 borrows from the next field
    version = re.search(r"gptqmodel:([0-9]+)", quantizer)
    return Gptq(size, "less one, whole words", by_field=version is not None and int(version[1]) >= _FIELDS)
