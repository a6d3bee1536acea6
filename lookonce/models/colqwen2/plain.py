"""ColQwen2's halves in their plain form (ColPali, arXiv:2407.01449): those of the model within, and the projection."""

from __future__ import annotations

import torch

from lookonce.models.colqwen2.config import PROJECTION
from lookonce.models.plain import Weights
from lookonce.models.qwen2_5_vl.plain import PlainQwen25VL
from lookonce.models.qwen2_vl.plain import PlainQwen2VL


class PlainColQwen2(PlainQwen2VL):
    """A `PlainVectors`."""

    def projected_rows(self, weights: Weights, rows: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, width]."""
        return weights.linear(PROJECTION, rows)


class PlainColQwen25(PlainQwen25VL):
    """A `PlainVectors`."""

    projected_rows = PlainColQwen2.projected_rows
