"""Matrices laid out for the compiled products (lookonce/models/kernels/products.py), and their products with rows.

Float32 on the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lookonce.models.kernels.compiling import FUSED, LANES, Compiled, Task, compiled_or_none
from lookonce.models.kernels.products import WIDTH, Product, write_products
from lookonce.models.kernels.program import Kernel, run, threads
from lookonce.models.kernels.structs import address

_SINGLE_THREADED = 1 << 19  # multiplications up to which other threads don't pay


def panels_serve(weight: torch.Tensor) -> bool:
    """Whether there are compiled products for a matrix [out, in], on all threads that torch has."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[0] % LANES:
        return False
    return FUSED and threads() == torch.get_num_threads() and _compiled() is not None


class Panels:
    """Matrices [out, in] side by side, copied: what a product is told of them."""

    def __init__(self, *weights: torch.Tensor) -> None:
        (self.columns, self.depth), width = weights[0].shape, WIDTH // len(weights)
        self._laid_out = weights[0].new_zeros((-(-self.columns // width), self.depth, WIDTH))  # zeros: missing columns
        whole = self.columns // width
        for place, weight in zip(self._laid_out.chunk(len(weights), dim=2), weights, strict=True):
            place[:whole] = weight[: whole * width].view(whole, width, self.depth).transpose(1, 2)
            place[whole:, :, : self.columns - whole * width] = weight[whole * width :].t()
        self.struct = Product.fill(
            Product.one(),
            depth=self.depth,
            columns=self.columns,
            panels=len(self._laid_out),
            weight=self._laid_out,
        )
        """The fields that are the same for all rows."""

    def kernel(self, name: str, x: torch.Tensor, out: torch.Tensor, other: torch.Tensor | None = None) -> Kernel:
        """One of the products of x [T, in] to `out` [T, out], for once."""
        sizes = {"depth": self.depth, "columns": self.columns}
        values = {"source": x, "out": out} if other is None else {"source": x, "out": out, "other": other}
        return product_address(name), Product.fill(self.struct[:], sizes, rows=x.shape[0], **values)

    def product(self, name: str, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """One of the products, computed."""
        x = x.contiguous()
        out = x.new_empty((x.shape[0], self.columns))
        _, struct = self.kernel(name, x, out, other)
        small = x.shape[0] * self.columns * self.depth <= _SINGLE_THREADED
        run(_task(name), address(struct), single_threaded=small)
        return out


class PanelLinear(Panels):
    """A `Linear` by compiled products."""

    per_row_count = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is copied, `bias` [out] is not."""
        super().__init__(weight)
        self._bias = weight.new_zeros(self.columns) if bias is None else bias.contiguous()
        Product.fill(self.struct, bias=self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return self.product("product", x)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return self.product("product_plus", x, residual.contiguous())


class PanelGatedUnit(Panels):
    """A `GatedUnit` by compiled products."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in], copied."""
        super().__init__(gate, up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        return self.product("product_gated", x)


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
