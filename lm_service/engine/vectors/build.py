"""From settings to an engine over an embedding model's language half."""

from __future__ import annotations

from lm_service.engine.packed.build import PackedBuilder
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.vectors.engine import PooledEngine
from lm_service.engine.vectors.self_check import check_vectors
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.vector_layout import VectorLayout


class VectorBuilder(PackedBuilder):
    """Reads the language half as the packed engine does, with the head that `layout` needs."""

    loader = "load_vectors"

    def build_vectors(self, checkpoint: Checkpoint, layout: VectorLayout, context_length: int) -> PooledEngine:
        """The engine. Blocking. Raises CheckpointError or INVALID_ARGUMENT."""
        settings = self._settings
        adapter, facts = self.load(checkpoint, context_length)
        if settings.self_check == "on":
            check_vectors(checkpoint, adapter, layout.pooling, settings.quantization)
        options = PackedOptions(max_waiting=settings.max_waiting, step_seconds=settings.step_seconds)
        return PooledEngine(adapter, layout.pooling, options, facts)
