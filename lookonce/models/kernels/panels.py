"""Matrices laid out for the compiled products (lookonce/models/kernels/products.py), and their products with rows.

Imports torch: for the two model services only. Float32 on the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from lookonce.models.kernels.compiling import FUSED, LANES, Compiled, Task, compiled_or_none
from lookonce.models.kernels.omp_team import run, threads
from lookonce.models.kernels.products import WIDTH, Field, write_products
from lookonce.models.kernels.program import Call, Ints

_ALONE = 1 << 19  # multiplications up to which other threads don't pay


def panels_serve(weight: torch.Tensor) -> bool:
    """Whether there are compiled products for a matrix [out, in], on all threads that torch has."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[0] % LANES:
        return False
    return FUSED and threads() == torch.get_num_threads() and _compiled() is not None


class PanelLinear:
    """x [T, in] -> x W^T + b [T, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is copied, `bias` [out] is not."""
        columns, depth = weight.shape
        self._panels = _panels(weight)
        self._bias = weight.new_zeros(columns) if bias is None else bias.contiguous()
        self._product, self._plus = _task("product"), _task("product_plus")
        self.table = _table(self._panels, columns, depth)
        """The fields that are the same for all rows, int64 [len(Field)]."""
        self.table[Field.BIAS] = self._bias.data_ptr()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return _run(self._product, self.table, x, 0)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The product and a residual [T, out]."""
        residual = residual.contiguous()
        return _run(self._plus, self.table, x, residual.data_ptr())

    def call(self, name: str, x: int, rows: int, out: int) -> Call:
        """Function and table of one of the products for so many rows at an address; `product_plus` adds to `out`."""
        table = self.table.copy()
        table[Field.ROWS], table[Field.SOURCE], table[Field.OTHER], table[Field.OUT] = rows, x, out, out
        return product_address(name), table


class PanelGatedUnit:
    """x [T, in] -> SiLU(x G^T) * (x U^T) [T, out]: the first half of SwiGLU (arXiv:2002.05202)."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in], copied."""
        self._panels = _panels(gate, up)
        self._product = _task("product_gated")
        self.table = _table(self._panels, *gate.shape)
        """The fields that are the same for all rows, int64 [len(Field)]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return _run(self._product, self.table, x, 0)


class PanelModule(nn.Module):
    """Stands in for a Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = PanelLinear(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return self.linear(x)


def _panels(*weights: torch.Tensor) -> torch.Tensor:
    """Matrices [out, in] side by side -> [panels, in, WIDTH], zeros in columns that there aren't."""
    (columns, depth), width = weights[0].shape, WIDTH // len(weights)
    laid = weights[0].new_zeros((-(-columns // width), depth, WIDTH))
    whole = columns // width
    for place, weight in zip(laid.chunk(len(weights), dim=2), weights, strict=True):
        place[:whole] = weight[: whole * width].view(whole, width, depth).transpose(1, 2)
        place[whole:, :, : columns - whole * width] = weight[whole * width :].t()
    return laid


def _table(panels: torch.Tensor, columns: int, depth: int) -> Ints:
    table = np.zeros(len(Field), dtype=np.int64)
    table[Field.DEPTH], table[Field.COLUMNS], table[Field.PANELS] = depth, columns, len(panels)
    table[Field.WEIGHT] = panels.data_ptr()
    return table


def _run(task: Any, fields: Ints, x: torch.Tensor, other: int) -> torch.Tensor:
    x, table = x.contiguous(), fields.copy()
    rows, columns, depth = x.shape[0], int(fields[Field.COLUMNS]), int(fields[Field.DEPTH])
    out = x.new_empty((rows, columns))
    table[Field.ROWS], table[Field.SOURCE] = rows, x.data_ptr()
    table[Field.OTHER], table[Field.OUT] = other, out.data_ptr()
    run(task, table.ctypes.data, alone=rows * columns * depth <= _ALONE)
    return out


@lru_cache
def _compiled() -> Compiled | None:
    return compiled_or_none(lambda: Compiled(write_products))


@lru_cache
def product_address(name: str) -> int:
    """Of one of the functions that `write_products` writes."""
    code = _compiled()
    if code is None:
        raise RuntimeError("no compiled products on this machine")
    return code.address(name)


@lru_cache
def _task(name: str) -> Any:
    return Task(product_address(name))
