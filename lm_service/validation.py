"""What a record must be before its rows reach a model: this reference's, of this model's width, and finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lookonce.core.errors import ErrorKind, LookonceError, RecordError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import EMBEDDING, EmbeddingRecord
from lookonce.models.tensors import tensor_of


class DamagedRecord(RecordError):
    """A record no reference could make use of: not worth keeping."""


@dataclass(frozen=True)
class RecordRules:
    """What this model takes in."""

    hidden_size: int
    merge_size: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, record: EmbeddingRecord, reference: EmbeddingReference) -> torch.Tensor:
        """The embedding [tokens, hidden] in the model's dtype on its device, in memory of its own.

        Raises DamagedRecord, EMBEDDING_INVALID when it is not the one referred to, FINGERPRINT_MISMATCH.
        """
        self._check_agreement(record, reference)
        t, h, w = record.grid_thw
        view = record.tensors[EMBEDDING]
        if view.shape[0] * self.merge_size**2 != t * h * w:
            raise DamagedRecord(f"embedding has {view.shape[0]} rows, its grid {t}x{h}x{w} makes another number")
        if view.shape[1] != self.hidden_size:
            raise DamagedRecord(f"embedding has width {view.shape[1]}, the model takes {self.hidden_size}")
        rows = tensor_of(view).to(device=self.device, dtype=self.dtype, copy=True)
        if not bool(torch.isfinite(rows).all()):  # after the cast: float16 may overflow
            raise DamagedRecord("embedding holds numbers that are not finite")
        return rows

    def _check_agreement(self, record: EmbeddingRecord, reference: EmbeddingReference) -> None:
        if record.fingerprint != reference.fingerprint:
            raise LookonceError(
                ErrorKind.FINGERPRINT_MISMATCH,
                f"the embedding was made by encoder {record.fingerprint[:64]}, "
                f"the reference names {reference.fingerprint}",
                param="image.fingerprint",
            )
        if record.image_digest != reference.image_digest:
            raise RecordError("the embedding under this key is of another image")
        if record.grid_thw != reference.grid_thw or record.tokens != reference.tokens:
            raise RecordError("the embedding's grid or token count differs from the reference's")
