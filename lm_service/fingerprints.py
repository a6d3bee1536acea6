"""Which encoders' embeddings this model takes: those of its own checkpoint, at the accepted compute dtypes."""

from __future__ import annotations

from collections.abc import Sequence

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.checkpoint.checkpoint import COMPUTE_DTYPES
from lookonce.models.quantization import SCHEMES


class AcceptedEncoders:
    """The accepted fingerprints, each 64 hexadecimal characters."""

    def __init__(self, fingerprints: Sequence[str]) -> None:
        self.fingerprints = tuple(fingerprints)

    @classmethod
    def of(cls, checkpoint: Checkpoint, encoder_dtype: str, encoder_quantization: str = "none") -> AcceptedEncoders:
        """Those derived from a checkpoint. `encoder_dtype` is a compute dtype, or "auto" for any;
        `encoder_quantization` is "none", or "int8" for weights in int8 on any device."""
        dtypes = COMPUTE_DTYPES if encoder_dtype == "auto" else (encoder_dtype,)
        ways = ("none",) if encoder_quantization == "none" else SCHEMES
        return cls([checkpoint.encoder_spec(dtype, way).fingerprint() for dtype in dtypes for way in ways])

    def accepts(self, fingerprint: str) -> bool:
        """Whether embeddings of this encoder are taken."""
        return fingerprint in self.fingerprints

    def check(self, fingerprint: str) -> None:
        """Raise FINGERPRINT_MISMATCH naming both sides unless the encoder is accepted."""
        if not self.accepts(fingerprint):
            raise LookonceError(
                ErrorKind.FINGERPRINT_MISMATCH,
                f"the image was encoded by {fingerprint[:64]!r}, this language model takes "
                f"{', '.join(self.fingerprints)}: the two services run different models or settings",
                param="image.fingerprint",
            )
