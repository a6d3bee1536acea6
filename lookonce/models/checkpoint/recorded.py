"""What a checkpoint's own classes compute on the image and the questions of the check at start, kept beside a half.

`lookonce verify --record` writes it, once the split model was found equal to the unsplit one. It holds for the weights
and settings that it names, and is passed over beside others. No torch.
"""

from __future__ import annotations

import array
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
from blake3 import blake3

from lookonce.core.atomic_files import write_durably
from lookonce.core.errors import CheckpointError
from lookonce.core.identity import canonical_json
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.family import Half

FILES = {half: f"lookonce-check-{half.value}.json" for half in Half}
_FORMAT = 1
_log = structlog.get_logger(__name__)


def read(checkpoint: Checkpoint, half: Half) -> list[float] | None:
    """The numbers recorded; None: there are none, or they are those of other weights. CheckpointError when the file is
    damaged."""
    file = checkpoint.path / FILES[half]
    if not file.is_file():
        return None
    stored = files.read_json(file)
    if stored.get("format") != _FORMAT or stored.get("of") != weights_of(checkpoint, half):
        _log.warning("a record for the self-check is of other weights or of another version", file=str(file))
        return None
    try:
        values = base64.b64decode(stored["values"], validate=True)
        whole = blake3(values).hexdigest() == stored["digest"]
        numbers = _floats(values)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file} is damaged; remove it, or write it again with `lookonce verify MODEL --record`")
    return numbers


def write(checkpoint: Checkpoint, half: Half, numbers: Sequence[float]) -> Path:
    """Record them, float32. Raises CheckpointError when the directory can't be written to."""
    values = array.array("f", numbers)
    if sys.byteorder == "big":
        values.byteswap()
    raw, file = values.tobytes(), checkpoint.path / FILES[half]
    content = {
        "format": _FORMAT,
        "half": half.value,
        "of": weights_of(checkpoint, half),
        "digest": blake3(raw).hexdigest(),
        "values": base64.b64encode(raw).decode("ascii"),
    }
    try:
        write_durably(file, lambda place: place.write_text(json.dumps(content) + "\n"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error.strerror}); check its permissions") from None
    return file


def weights_of(checkpoint: Checkpoint, half: Half) -> str:
    """What a record holds for: a half's tensors, and for the language half the checkpoint as a whole. An adapter that
    changes the half makes it another one."""
    if half is Half.VISION:
        settings = [checkpoint.family.vision_config(checkpoint.config), checkpoint.known_vision_weights()]
    else:
        changed = checkpoint.adapter.digest(half) if checkpoint.adapter is not None else None
        settings = [checkpoint.identity, *([changed] if changed is not None else [])]
    return blake3(canonical_json(settings), derive_key_context="lookonce 2026 self-check record").hexdigest()


def _floats(values: bytes) -> list[float]:
    numbers = array.array("f")
    numbers.frombytes(values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
