"""A Qwen2-VL checkpoint opened for one half or both: its files, identity and settings, without reading a weight.

Importing this package loads no torch; `weights` and `lean`, which build real modules, do.
"""

from __future__ import annotations

from lookonce.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lookonce.models.registry import Half

__all__ = ["Checkpoint", "Half", "open_checkpoint"]
