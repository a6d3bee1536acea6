"""All layers of a step as one program of kernels: Python has nothing to do, and no lock to wait for, in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lookonce.models.kernels.panels import PanelGatedUnit, PanelLinear, Panels, product_address
from lookonce.models.kernels.products import Product
from lookonce.models.kernels.program import run_program
from lookonce.models.kernels.structs import (
    FLOAT32,
    INT64,
    Call,
    Field,
    Ints,
    Struct,
    Words,
    address,
    integer,
    joined,
    pointer,
)
from lookonce.models.kernels.text_rows import Gather, Norm, Rotation, TextRows
from lookonce.models.linear import GatedMlp, LayerWeights
from lookonce.models.text_adapter import AttentionCalls, ModelShape

_SINGLE_THREADED = 1 << 22  # multiplications of a step up to which other threads don't pay
_KEPT_TOKENS = 64  # of a step whose buffers are kept for the next


class Step(Struct):
    """What differs from step to step in the kernels' structs: `wanted` of the step's tokens are asked for."""

    nothing = integer()
    tokens = integer()
    wanted = integer()
    rows = pointer(INT64, "wanted")  # which
    cos = pointer(FLOAT32, "tokens", "half")
    sin = pointer(FLOAT32, "tokens", "half")
    hidden = pointer(FLOAT32, "tokens", "hidden")
    normed = pointer(FLOAT32, "tokens", "hidden")
    projected = pointer(FLOAT32, "tokens", "projected")
    mixed = pointer(FLOAT32, "tokens", "hidden")
    inner = pointer(FLOAT32, "tokens", "inner")
    last = pointer(FLOAT32, "wanted", "hidden")
    last_mixed = pointer(FLOAT32, "wanted", "hidden")
    out = pointer(FLOAT32, "wanted", "hidden")


@dataclass(frozen=True)
class _Kernel:
    """A kernel, its struct with what is always the same, and what a step says."""

    function: int
    kind: type[Struct]
    struct: Words
    step: Mapping[str, Field]  # of a field of the struct: the field of `Step`

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where the struct would point to less than it declares."""
        known: dict[str | int, str | int] = {"tokens": "tokens", "wanted": "wanted"}
        known |= dict(zip(self.kind.fields, self.struct, strict=True))
        known |= dict(sizes.items())
        known |= {name: field.name for name, field in self.step.items() if field.element is None}
        for name, held in self.step.items():
            field = self.kind.fields[name]
            if field.element is None:
                continue
            wanted, found = ([known.get(size, size) for size in one.shape] for one in (field, held))
            if field.step is not None:
                wanted[1:] = [known[field.step]]
            rows_fit = wanted[0] == found[0] or (wanted[0], found[0]) == ("wanted", "tokens")
            if field.element is not held.element or not rows_fit or wanted[1:] != found[1:]:
                raise ValueError(f"{self.kind.__name__}.{name} is {wanted}, Step.{held.name} {found}")


class TextLayers:
    """The layers of a model, and the norm behind them. Called from one thread at a time."""

    def __init__(self, layers: Sequence[LayerWeights], norm: torch.Tensor, rows: TextRows, shape: ModelShape) -> None:
        """`norm` [hidden] is the one behind the last layer. All matrices are laid out in panels."""
        self._held, self._rows, self._norm, self._shape = list(layers), rows, norm, shape
        self._heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        self._sizes = {
            **rows.sizes,
            "projected": sum(self._heads) * shape.head_dim,
            "inner": _panels(layers[0].mlp.matrices[0]).columns,
        }
        matrices = [_panels(matrix) for layer in layers for matrix in layer.matrices]
        self._work = sum(matrix.depth * matrix.columns for matrix in matrices)
        kernels: list[_Kernel] = []
        self._attentions: list[int] = []  # kernels before each layer's attention
        for number, layer in enumerate(layers):
            kernels += self._before(layer)
            self._attentions.append(len(kernels))
            kernels += self._behind(layer, last=number == len(layers) - 1)
        kernels.append(self._normed(norm, Step.wanted, Step.last, Step.out))
        for kernel in kernels:
            kernel.check(self._sizes)
        self._calls = Call.zeros(len(kernels))
        self._calls["function"] = [kernel.function for kernel in kernels]
        self._always: Ints = np.concatenate([np.array(kernel.struct) for kernel in kernels])
        self._step: Ints = np.concatenate([_places(kernel) for kernel in kernels])
        sizes = np.array([kernel.kind.dtype.itemsize for kernel in kernels])
        self._offsets: Ints = sizes.cumsum() - sizes
        self._orders: dict[int, Ints] = {}
        self._kept: tuple[tuple[int, int], Words, dict[str, torch.Tensor]] | None = None

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: AttentionCalls, rows: torch.Tensor
    ) -> torch.Tensor:
        """Normed [len(rows), hidden] of the rows asked for, until the next call; `hidden` [T, hidden], contiguous, is
        overwritten. Cosines and sines are [T, 1, d / 2], contiguous."""
        tokens, wanted = hidden.shape[0], rows.shape[0]
        if wanted > tokens:
            raise ValueError(f"{wanted} rows of {tokens} tokens")
        step, buffers = self._buffers(tokens, wanted)
        Step.fill(step, self._sizes, tokens=tokens, wanted=wanted, rows=rows, cos=cos, sin=sin, hidden=hidden)
        structs = self._always + np.frombuffer(step, dtype=np.int64)[self._step]
        own = joined([self._calls])
        own["struct"] = address(structs) + self._offsets
        q, k, v = buffers["projected"].view(tokens, -1, self._shape.head_dim).split_with_sizes(self._heads, dim=1)
        attended = attention(q, k, v, buffers["mixed"])
        program = joined([own, attended.reshape(-1)])[self._order(attended.shape[1])]
        run_program(program, single_threaded=tokens * self._work <= _SINGLE_THREADED)
        return buffers["out"]

    def _buffers(self, tokens: int, wanted: int) -> tuple[Words, dict[str, torch.Tensor]]:
        """What a step leaves between kernels, and a `Step` that points to it; those of few tokens are used again."""
        if self._kept is not None and (tokens, wanted) == self._kept[0]:
            return self._kept[1:]
        sizes = {**self._sizes, "tokens": tokens, "wanted": wanted}
        names = ("normed", "projected", "mixed", "inner", "last", "last_mixed", "out")
        buffers = {name: self._norm.new_empty([sizes[str(size)] for size in Step.fields[name].shape]) for name in names}
        step = Step.fill(Step.one(), sizes, tokens=tokens, wanted=wanted, **buffers)
        self._kept = ((tokens, wanted), step, buffers) if tokens <= _KEPT_TOKENS else None
        return step, buffers

    def _order(self, count: int) -> Ints:
        """Of calls: those of layers, with `count` of attention in each, which come behind all of them."""
        if count not in self._orders:
            own, attended = np.arange(len(self._calls)), np.arange(count * len(self._attentions))
            self._orders[count] = np.insert(own, np.repeat(self._attentions, count), len(own) + attended)
        return self._orders[count]

    def _before(self, layer: LayerWeights) -> Iterator[_Kernel]:
        yield self._normed(layer.input_norm, Step.tokens, Step.hidden, Step.normed)
        yield _product("product", layer.qkv, Step.tokens, Step.normed, Step.projected)
        struct = Rotation.fill(Rotation.one(), step=self._sizes["projected"])
        step = {"rows": Step.tokens, "heads": Step.projected, "cos": Step.cos, "sin": Step.sin}
        yield _Kernel(self._rows.code.address("rotate"), Rotation, struct, step)

    def _behind(self, layer: LayerWeights, *, last: bool) -> Iterator[_Kernel]:
        """What follows the last layer's attention runs for the rows asked for only."""
        rows, hidden, mixed = Step.tokens, Step.hidden, Step.mixed
        if last:
            for source, out in ((Step.hidden, Step.last), (Step.mixed, Step.last_mixed)):
                step = {"rows": Step.wanted, "source": source, "which": Step.rows, "out": out}
                yield _Kernel(self._rows.code.address("gather"), Gather, Gather.one(), step)
            rows, hidden, mixed = Step.wanted, Step.last, Step.last_mixed
        yield _product("product_plus", layer.output, rows, mixed, hidden)
        yield self._normed(layer.mlp_norm, rows, hidden, Step.normed)
        gate_up, down = layer.mlp.matrices
        yield _product("product_gated", gate_up, rows, Step.normed, Step.inner)
        yield _product("product_plus", down, rows, Step.inner, hidden)

    def _normed(self, weight: torch.Tensor, rows: Field, source: Field, out: Field) -> _Kernel:
        struct = Norm.fill(Norm.one(), self._sizes, weight=weight)
        return _Kernel(self._rows.code.address("norm"), Norm, struct, {"rows": rows, "source": source, "out": out})


def _product(name: str, matrix: object, rows: Field, source: Field, out: Field) -> _Kernel:
    """`product_plus` adds to its output."""
    step = {"rows": rows, "source": source, "out": out}
    if name == "product_plus":
        step["other"] = out
    return _Kernel(product_address(name), Product, _panels(matrix).struct, step)


def _places(kernel: _Kernel) -> Ints:
    """For each field of the struct the place of `Step` that is added to it."""
    return np.array([kernel.step.get(name, Step.nothing).place for name in kernel.kind.fields])


def _panels(matrix: Any) -> Panels:
    if not isinstance(matrix, Panels):
        raise TypeError("not laid out in panels")
    return matrix


def layers_for(
    layers: Sequence[LayerWeights], norm: torch.Tensor, rows: TextRows, shape: ModelShape
) -> TextLayers | None:
    """The layers by kernels, where there are some for all that they do."""
    laid_out = all(isinstance(matrix, PanelLinear | PanelGatedUnit) for layer in layers for matrix in layer.matrices)
    gated = all(isinstance(layer.mlp, GatedMlp) for layer in layers)
    if not laid_out or not gated or shape.heads * shape.head_dim != shape.hidden:
        return None
    return TextLayers(layers, norm, rows, shape)
