"""All layers of a step as one program of kernels: Python has nothing to do, and no lock to wait for, in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from lookonce.models.kernels.panels import PanelGatedUnit, PanelLinear, product_address
from lookonce.models.kernels.products import Field as Product
from lookonce.models.kernels.program import Ints, row_addresses, run_program
from lookonce.models.kernels.text_rows import Field as Row
from lookonce.models.kernels.text_rows import RowKernels
from lookonce.models.linear import GatedUnit, LayerWeights, Linear
from lookonce.models.text_adapter import AttentionCalls, ModelShape

_ALONE = 1 << 22  # multiplications of a step up to which other threads don't pay
_FIELDS = max(len(Row), len(Product))


class _Of(IntEnum):
    """What differs from step to step: numbers of rows, and addresses."""

    NOTHING = 0
    TOKENS = 1
    WANTED = 2  # rows asked for
    ROWS = 3  # int64 [WANTED]: which
    COS = 4  # float32 [TOKENS, d / 2]
    SIN = 5
    HIDDEN = 6  # [TOKENS, hidden]
    NORMED = 7
    PROJECTED = 8  # [TOKENS, (heads + 2 kv_heads) * d]
    MIXED = 9  # [TOKENS, heads * d]
    INNER = 10  # [TOKENS, intermediate]
    LAST = 11  # [WANTED, hidden]
    LAST_MIXED = 12  # [WANTED, heads * d]
    OUT = 13  # [WANTED, hidden]


@dataclass(frozen=True)
class _Call:
    """A kernel, and its table: what a step says, what is always the same."""

    function: int
    step: Mapping[int, _Of]
    always: Mapping[int, int]


class NativeLayers:
    """The layers of a model, and the norm behind them. Called from one thread at a time."""

    def __init__(self, layers: Sequence[LayerWeights], norm: torch.Tensor, rows: RowKernels, shape: ModelShape) -> None:
        """`norm` [hidden] is the one behind the last layer. All matrices are laid out in panels."""
        self._held, self._rows, self._norm, self._shape = list(layers), rows, norm, shape
        self._inner = int(_table(layers[0].gate_up)[Product.COLUMNS])
        self._width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._work = sum(
            int(np.prod(_table(matrix)[[Product.DEPTH, Product.COLUMNS]]))
            for layer in layers
            for matrix in layer.matrices
        )
        calls: list[_Call] = []
        self._attentions: list[int] = []  # calls before each layer's attention
        for number, layer in enumerate(layers):
            calls += self._before(layer)
            self._attentions.append(len(calls))
            calls += self._behind(layer, last=number == len(layers) - 1)
        calls.append(self._normed(norm, _Of.WANTED, _Of.LAST, _Of.OUT))
        self._functions = np.array([call.function for call in calls])
        self._always, self._step = np.zeros((2, len(calls), _FIELDS), dtype=np.int64)
        for number, call in enumerate(calls):
            for table, fields in ((self._always, call.always), (self._step, call.step)):
                table[number, list(fields)] = list(fields.values())
        self._orders: dict[int, Ints] = {}

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: AttentionCalls, rows: torch.Tensor
    ) -> torch.Tensor:
        """Normed [len(rows), hidden] of the rows asked for; `hidden` [T, hidden], in one piece, is overwritten. Cosines
        and sines are [T, 1, d / 2], in one piece."""
        shape, tokens, wanted = self._shape, hidden.shape[0], rows.shape[0]
        mixed = hidden.new_empty((tokens, shape.heads * shape.head_dim))
        projected = hidden.new_empty((tokens, self._width))
        last, out = (hidden.new_empty((wanted, shape.hidden)) for _ in range(2))
        buffers = {
            _Of.ROWS: rows,
            _Of.COS: cos,
            _Of.SIN: sin,
            _Of.HIDDEN: hidden,
            _Of.NORMED: torch.empty_like(hidden),
            _Of.PROJECTED: projected,
            _Of.MIXED: mixed,
            _Of.INNER: hidden.new_empty((tokens, self._inner)),
            _Of.LAST: last,
            _Of.LAST_MIXED: mixed.new_empty((wanted, mixed.shape[1])),
            _Of.OUT: out,
        }
        values = np.array([buffers[of].data_ptr() if of in buffers else 0 for of in _Of])
        values[[_Of.TOKENS, _Of.WANTED]] = tokens, wanted
        tables = self._always + values[self._step]
        own = np.stack([self._functions, row_addresses(tables)], axis=1)
        heads = np.array([0, shape.heads, shape.heads + shape.kv_heads]) * (shape.head_dim * hidden.element_size())
        fields = [number for start in heads.tolist() for number in (projected.data_ptr() + start, self._width)]
        attended = attention(fields, mixed.data_ptr())
        program = np.concatenate([own, attended.reshape(-1, 2)])[self._order(attended.shape[1])]
        run_program(program, alone=tokens * self._work <= _ALONE)
        return out

    def _order(self, count: int) -> Ints:
        """Of calls: those of layers, with `count` of attention in each, which come behind all of them."""
        if count not in self._orders:
            own, attended = np.arange(len(self._functions)), np.arange(count * len(self._attentions))
            self._orders[count] = np.insert(own, np.repeat(self._attentions, count), len(own) + attended)
        return self._orders[count]

    def _before(self, layer: LayerWeights) -> Iterator[_Call]:
        yield self._normed(layer.input_norm, _Of.TOKENS, _Of.HIDDEN, _Of.NORMED)
        yield _product("product", layer.qkv, _Of.TOKENS, _Of.NORMED, _Of.PROJECTED)
        step: dict[int, _Of] = {Row.ROWS: _Of.TOKENS, Row.ROW: _Of.PROJECTED, Row.COS: _Of.COS, Row.SIN: _Of.SIN}
        yield _Call(self._rows.code.address("rotate"), step, {Row.STEP: self._width})

    def _behind(self, layer: LayerWeights, *, last: bool) -> Iterator[_Call]:
        """What follows the last layer's attention runs for the rows asked for only."""
        rows, hidden, mixed = (_Of.WANTED, _Of.LAST, _Of.LAST_MIXED) if last else (_Of.TOKENS, _Of.HIDDEN, _Of.MIXED)
        if last:
            for source, target in ((_Of.HIDDEN, hidden), (_Of.MIXED, mixed)):
                step: dict[int, _Of] = {Row.ROWS: rows, Row.ROW: source, Row.OUT: target, Row.WEIGHT: _Of.ROWS}
                yield _Call(self._rows.code.address("gather"), step, {})
        yield _product("product_plus", layer.output, rows, mixed, hidden)
        yield self._normed(layer.mlp_norm, rows, hidden, _Of.NORMED)
        yield _product("product_gated", layer.gate_up, rows, _Of.NORMED, _Of.INNER)
        yield _product("product_plus", layer.down, rows, _Of.INNER, hidden)

    def _normed(self, weight: torch.Tensor, rows: _Of, source: _Of, target: _Of) -> _Call:
        step: dict[int, _Of] = {Row.ROWS: rows, Row.ROW: source, Row.OUT: target}
        return _Call(self._rows.code.address("norm"), step, {Row.WEIGHT: weight.data_ptr()})


def _product(name: str, matrix: Linear | GatedUnit, rows: _Of, source: _Of, target: _Of) -> _Call:
    """`product_plus` adds to its target."""
    step: dict[int, _Of] = {Product.ROWS: rows, Product.SOURCE: source, Product.OUT: target}
    if name == "product_plus":
        step[Product.OTHER] = target
    return _Call(product_address(name), step, dict(enumerate(_table(matrix).tolist())))


def _table(matrix: Linear | GatedUnit) -> Ints:
    if not isinstance(matrix, PanelLinear | PanelGatedUnit):
        raise TypeError("not laid out in panels")
    return matrix.table


def layers_for(
    layers: Sequence[LayerWeights], norm: torch.Tensor, rows: RowKernels | None, shape: ModelShape
) -> NativeLayers | None:
    """The layers by kernels, where there are some for all that they do."""
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    laid_out = all(isinstance(matrix, PanelLinear | PanelGatedUnit) for matrix in matrices)
    if rows is None or not laid_out or shape.heads * shape.head_dim != shape.hidden:
        return None
    return NativeLayers(layers, norm, rows, shape)
