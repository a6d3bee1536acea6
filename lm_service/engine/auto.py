"""What `--engine auto` stands for: on CUDA vLLM, where it is installed and serves the family; else the packed engine
where the model can be run packed, else the plain one; it says so when it is the plain one."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.build import PackedBuilder
from lm_service.engine.plain.build import PlainBuilder
from lm_service.engine.types import Engine
from lm_service.settings import LanguageSettings
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.devices import choose_device
from lookonce.models.family import served_plain, unpacked_reason
from lookonce.models.self_check import SelfCheckFailed

if TYPE_CHECKING:
    from lm_service.engine.vllm.build import VllmBuilder

_log = structlog.get_logger(__name__)


class AutoBuilder:
    """An `EngineBuilder` (see lm_service.engine.factory)."""

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises INVALID_ARGUMENT as `PackedBuilder` does."""
        self._settings, self._packed = settings, PackedBuilder(settings)
        self._vllm = _vllm_builder(settings)

    def build(self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int) -> Engine:
        """Where a packed step differs from the class's own forward, the plain engine serves, whose steps are compared
        with it too. Raises SelfCheckFailed when both differ, or there is no plain engine for this family."""
        if self._vllm is not None and self._vllm.refusal(checkpoint) is None:
            return self._vllm.build(checkpoint, table, end_ids, context_length)
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


def _vllm_builder(settings: LanguageSettings) -> VllmBuilder | None:
    """Where it is the faster one, there, and nothing is asked of it that it doesn't have."""
    ours_only = settings.device_map is not None or settings.quantization != "none"
    if ours_only or find_spec("vllm") is None or choose_device(settings.device).type != "cuda":
        return None
    from lm_service.engine.vllm.build import VllmBuilder

    return VllmBuilder(settings)
