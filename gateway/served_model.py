"""The one model that is served, as the language services describe it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from gateway.routing.variants import Variants
from lookonce.core.errors import ErrorKind, LookonceError
from protos.lookonce.v1 import language_pb2

FRESH = 30.0  # seconds a description is good
FALLBACK_NAME = "lookonce"


@dataclass(frozen=True)
class ModelCard:
    """What the API tells of a model."""

    names: tuple[str, ...]  # the first is the one that receipts show
    description: language_pb2.LanguageDescription

    @property
    def name(self) -> str:
        """The name that receipts show."""
        return self.names[0]

    def is_named(self, name: str) -> bool:
        """Whether a request that says `name` means this model; "lookonce" always does."""
        return name in self.names or name == FALLBACK_NAME

    def to_openai(self, name: str) -> dict[str, Any]:
        """OpenAI's model object under one of the names, with the context length beside it."""
        return {
            "id": name,
            "object": "model",
            "created": int(self.description.model.started_at),
            "owned_by": "lookonce",
            "context_length": self.description.context_length,
            "max_tokens": self.description.max_tokens,
        }


class ServedModel:
    """Caches the description; `names`, if any, stand in place of the checkpoint's."""

    def __init__(
        self, variants: Variants, *, names: tuple[str, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._variants = variants
        self._names = names
        self._clock = clock
        self._card: ModelCard | None = None
        self._until = 0.0

    @property
    def name(self) -> str:
        """The public name, as last known."""
        return self._card.name if self._card else next(iter(self._names), FALLBACK_NAME)

    async def card(self) -> ModelCard:
        """The card; the last known one while no language service answers.

        Raises UNAVAILABLE when there never was one."""
        if self._card is not None and self._clock() < self._until:
            return self._card
        for endpoint in sorted(self._variants.main.language.endpoints, key=lambda item: item.down_until):
            try:
                description = await endpoint.client.describe(timeout=2.0)
            except LookonceError:
                continue
            self._card = ModelCard(self._names or (public_name(description.model),), description)
            break
        if self._card is None:
            raise LookonceError(ErrorKind.UNAVAILABLE, "no language service can be reached", retry_after=1.0)
        self._until = self._clock() + FRESH
        return self._card

    async def check(self, requested: str | None) -> None:
        """Raise NOT_FOUND when a request names another model."""
        try:
            card = await self.card()
        except LookonceError:
            if requested is None:
                return  # answering will tell
            raise
        if requested is not None and not card.is_named(requested):
            raise no_such_model(card)


def no_such_model(card: ModelCard) -> LookonceError:
    """What is said of another model than the one there is."""
    names = " or ".join(map(repr, card.names))
    return LookonceError(ErrorKind.NOT_FOUND, f"no such model; this server has {names}", param="model")


def public_name(model: Any) -> str:
    """A hub id as it is; of a local directory only its name (paths are not shown)."""
    if model.checkpoint.startswith("hub:"):
        return str(model.checkpoint.removeprefix("hub:").partition("@")[0])
    return PurePath(model.name).name or FALLBACK_NAME
