"""GPTQ (arXiv:2210.17323) as AutoGPTQ, GPTQModel and transformers store it.

Of a matrix of so many outputs and inputs: `qweight` int32 [inputs * bits / 32, outputs], `scales` [groups, outputs],
`qzeros` int32 [groups, outputs * bits / 32], `g_idx` int32 [inputs], the group of each input. The lowest bits of a word
come first. A value is scale * (q - zero). The older form stores zeros less one (checkpoint_format "gptq"), the newer as
they are ("gptq_v2"). Bits follow from the shapes, as settings may differ between modules ("dynamic").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.quantised.matrix import Parts, require

if TYPE_CHECKING:
    import torch

_BITS = (2, 4, 8)
ENDINGS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
_FLOATS = ("F16", "BF16", "F32")


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
        per_word = 32 // self.bits
        values = unpacked(parts["qweight"][:, start:stop], self.bits, 0)
        zeros = self._zeros(parts["qzeros"][:, start // per_word : -(-stop // per_word)])[:, : stop - start]
        scales = parts["scales"][:, start:stop].float()
        return (values.sub_(zeros[group]).float().mul_(scales[group])).t()

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import unpacked

        if self.zeros == "as they are":
            return unpacked(words, self.bits, 1)
        if self.zeros == "less one":  # AutoGPTQ: each field by itself
            return unpacked(words, self.bits, 1).add_(1).bitwise_and_((1 << self.bits) - 1)
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return unpacked((words.long() + ones).to(words.dtype), self.bits, 1)


@dataclass(frozen=True)
class Gptq:
    """See `Format`."""

    bits: int
    size: int
    zeros: str
    name = "GPTQ"
    endings = ENDINGS
    unused = frozenset[str]()

    def matrix(self, parts: Parts) -> GptqMatrix:
        words, outputs = require(parts, "qweight", ("I32",), 2).shape
        groups = max(1, require(parts, "scales", _FLOATS, 2).shape[0])
        bits = self.bits
        if "g_idx" in parts:
            inputs = require(parts, "g_idx", ("I32", "I64"), 1).shape[0]
            bits = 32 * words // inputs if inputs else bits
        inputs = 32 * words // bits if bits in _BITS else 0
        if bits not in _BITS or inputs * bits != 32 * words or outputs * bits % 32:
            raise ValueError(f"of shape {[words, outputs]} holds no {', '.join(map(str, _BITS))}-bit integers")
        expected = {"qzeros": (groups, outputs * bits // 32), "scales": (groups, outputs)}
        require(parts, "qzeros", ("I32",), 2)
        for ending, shape in expected.items():
            if parts[ending].shape != shape:
                raise ValueError(f"has {ending} of shape {list(parts[ending].shape)}, not {list(shape)}")
        size = self.size if self.size > 0 and groups == -(-inputs // self.size) else -(-inputs // groups)
        return GptqMatrix((outputs, inputs), bits, groups, size, self.zeros)


def format_of(settings: Mapping[str, Any]) -> Gptq:
    """See `formats`."""
    bits = settings.get("bits")
    if bits not in _BITS and not settings.get("dynamic"):
        raise ValueError(f"bits {bits!r} is not supported ({', '.join(map(str, _BITS))})")
    stored = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    known = int(bits or 4), int(settings.get("group_size") or -1)
    if stored == "gptq_v2":
        return Gptq(*known, "as they are")
    if stored != "gptq":
        raise ValueError(f"checkpoint_format {stored!r} is not supported (gptq, gptq_v2)")
    meta = settings.get("meta")
    # GPTQModel takes one from every field by taking it from the word: a zero of 0 borrows from the next field
    whole = "gptqmodel" in str(meta.get("quantizer") if isinstance(meta, dict) else "").lower()
    return Gptq(*known, "less one, whole words" if whole else "less one")
