"""Engines by name. Each is imported when it is chosen: a process knows the libraries of its own engine only.

Ours stand here. Others come with an installed package whose entry point in the group `lookonce.engines` leads to a
class or function that takes the service's settings and returns an `EngineBuilder`.
"""

from __future__ import annotations

from typing import Protocol

from lm_service.engine.answer import TokenTable
from lm_service.engine.types import Engine, VectorEngine
from lm_service.settings import LanguageSettings
from lookonce.core import plugins
from lookonce.core.errors import invalid
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.vector_layout import VectorLayout

GROUP = "lookonce.engines"
BUILTIN = {
    "auto": "lm_service.engine.auto:AutoBuilder",
    "packed": "lm_service.engine.packed.build:PackedBuilder",
    "plain": "lm_service.engine.plain.build:PlainBuilder",
    "vllm": "lm_service.engine.vllm.build:VllmBuilder",
}


class EngineBuilder(Protocol):
    """An engine that was chosen. What the settings ask of this machine was checked when it was made: before a hub is
    asked for a checkpoint."""

    def build(self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int) -> Engine:
        """The engine over a checkpoint's language half, whose weights it reads itself if it needs them. Blocking.

        `table` holds the vocabulary's text, `end_ids` the tokens that end an answer; `context_length` is the most
        tokens of prompt and answer. Raises CheckpointError or INVALID_ARGUMENT.
        """
        ...


VECTORS = "lm_service.engine.vectors.build:VectorBuilder"


class VectorEngineBuilder(Protocol):
    """An `EngineBuilder` for embedding models."""

    def build_vectors(self, checkpoint: Checkpoint, layout: VectorLayout, context_length: int) -> VectorEngine:
        """As `EngineBuilder.build`."""
        ...


def vector_builder_of(settings: LanguageSettings) -> VectorEngineBuilder:
    """That of the one engine for embedding models. Raises INVALID_ARGUMENT for the settings' choice of another."""
    if settings.engine not in ("auto", "packed"):
        raise invalid(f"engine {settings.engine!r} makes no vectors; leave --engine at auto", param="engine")
    builder: VectorEngineBuilder = plugins.load(GROUP, "vectors", {"vectors": VECTORS})(settings)  # type: ignore[misc]
    return builder


def builder_of(settings: LanguageSettings) -> EngineBuilder:
    """That of the engine the settings name. Raises INVALID_ARGUMENT for one that is not installed, or whatever it
    refuses of the settings."""
    name = settings.engine
    try:
        found = plugins.load(GROUP, name, BUILTIN)
    except (ImportError, AttributeError) as error:
        if name == "vllm" and getattr(error, "name", "").partition(".")[0] == "vllm":
            text = "vLLM is not in this environment; scripts/setup_vllm.sh makes one, and `lookonce up` uses it"
            raise invalid(text, param="engine") from error
        text = f"engine {name!r} is installed, but can't be imported ({error}); install its package again"
        raise invalid(text, param="engine") from error
    if found is None:
        raise invalid(f"engine {name!r} is not one of {', '.join(plugins.names(GROUP, BUILTIN))}", param="engine")
    builder: EngineBuilder = found(settings)
    return builder
