"""vLLM's engine for tests that each want one of their own: its processes are started once and shared."""

from __future__ import annotations

import atexit
from typing import Any

_STARTED: dict[tuple[str, int], Any] = {}


class VllmBuilder:
    """An `EngineBuilder` whose engines leave vLLM's processes running when they are closed."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def build(self, checkpoint: Any, table: Any, end_ids: frozenset[int], context_length: int) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        from lm_service.engine.vllm import build

        class Shared:
            """Stands for AsyncLLM where engines are built."""

            @staticmethod
            def from_engine_args(args: Any, stat_loggers: Any) -> Any:
                key = str(checkpoint.path), context_length
                if key not in _STARTED:
                    llm = AsyncLLM.from_engine_args(args, stat_loggers=stat_loggers)
                    atexit.register(llm.shutdown)
                    _STARTED[key] = llm
                return Lasting(_STARTED[key])

        build.AsyncLLM = Shared  # type: ignore[misc, assignment]
        return build.VllmBuilder(self._settings).build(checkpoint, table, end_ids, context_length)


class Lasting:
    """An AsyncLLM that is not shut down."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def shutdown(self) -> None:
        """Later, when the tests have ended."""
