"""Between torch tensors and the views of an embedding record. Imports torch: for the two model services only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from lookonce.core.record import TensorView

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def view_of(tensor: torch.Tensor) -> TensorView:
    """The raw bytes of a tensor (moved to the CPU, made contiguous; shares memory where it already is both)."""
    flat = tensor.detach().to("cpu").contiguous()
    data = flat.view(torch.uint8).numpy().data.cast("B") if flat.numel() else memoryview(b"")
    return TensorView(NAMES[flat.dtype], tuple(flat.shape), data)


def views_of(rows: torch.Tensor, names: Sequence[str]) -> dict[str, TensorView]:
    """A record's tensors by name: rows [tokens, hidden] are one, [n, tokens, hidden] are n. Raises ValueError for other
    numbers than that of the names."""
    parts = rows.unbind() if rows.dim() == 3 else (rows,)
    return {name: view_of(part) for name, part in zip(names, parts, strict=True)}


def tensor_of(view: TensorView) -> torch.Tensor:
    """A CPU tensor over the view's memory, without copying. Treat it as read-only; it keeps the memory alive."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view.data, dtype=DTYPES[view.dtype]).view(view.shape)
