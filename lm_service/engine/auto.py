"""What `--engine auto` stands for: the packed engine where the model can be run packed, else the plain one; it says so
when it is the plain one."""

from __future__ import annotations

from dataclasses import replace

import structlog

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.build import PackedBuilder
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.plain.build import PlainBuilder
from lm_service.engine.plain.engine import PlainEngine
from lm_service.settings import LanguageSettings
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.family import served_plain, unpacked_reason
from lookonce.models.self_check import SelfCheckFailed

_log = structlog.get_logger(__name__)


class AutoBuilder:
    """An `EngineBuilder` (see lm_service.engine.factory)."""

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises INVALID_ARGUMENT as `PackedBuilder` does."""
        self._settings, self._packed = settings, PackedBuilder(settings)

    def build(
        self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int
    ) -> PackedEngine | PlainEngine:
        """Where a packed step differs from the class's own forward, the plain engine serves, whose steps are compared
        with it too. Raises SelfCheckFailed when both differ, or there is no plain engine for this family."""
        reason = unpacked_reason(checkpoint.family, checkpoint.config)
        if reason is None:
            try:
                return self._packed.build(checkpoint, table, end_ids, context_length)
            except SelfCheckFailed as error:
                if not hasattr(checkpoint.family, "load_unbatched"):
                    raise
                reason = error.message
        engine = PlainBuilder(self._settings).build(checkpoint, table, end_ids, context_length)
        engine.facts = replace(engine.facts, engine_note=reason)
        _log.warning(served_plain(reason))
        return engine
