"""A checkpoint opened for one half or both: its files, identity and settings, without reading a weight.

Importing this package loads no torch; `weights`, which fills real modules, does.
"""

from __future__ import annotations

from lookonce.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lookonce.models.registry import Half

__all__ = ["Checkpoint", "Half", "open_checkpoint"]
