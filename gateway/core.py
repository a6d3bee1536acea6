"""The gateway without its door: what the routes use."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.answers import Answers
from gateway.batches.worker import Batches
from gateway.images.library import ImageLibrary
from gateway.routing.variants import EMBED, ServedModel, Variants
from gateway.settings import GatewaySettings
from gateway.vectors import VectorMaker
from lookonce.core.http_fetch.fetcher import Fetcher
from lookonce.moderation.policy import Policy


@dataclass(frozen=True)
class Gateway:
    """All collaborators, built in `app`."""

    settings: GatewaySettings
    variants: Variants
    images: ImageLibrary
    answers: Answers
    model: ServedModel
    fetcher: Fetcher
    vectors: VectorMaker
    separate_embedding_model: ServedModel  # where there is one beside `model`
    policy: Policy | None = None  # without one there are no moderations
    batches: Batches | None = None  # without a data directory there are none

    @property
    def embedding_model(self) -> ServedModel:
        """The model that is asked for vectors: `model` itself unless there is one beside it."""
        return self.separate_embedding_model if self.variants.has(EMBED) else self.model

    async def close(self) -> None:
        """Stop background work, close channels and stores."""
        if self.batches is not None:
            await self.batches.close()
        self.fetcher.close()
        await self.images.close()
        await self.variants.close()
