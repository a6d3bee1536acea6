"""From addresses to a judge: channels, models described and checked, all closed together."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lookonce.core.errors import invalid
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.rpc.tls import Tls
from lookonce.moderation.batch.judge import Judge, other_model
from lookonce.moderation.batch.poison_isolation import PoisonIsolation
from lookonce.moderation.batch.run_identity import Models, language_fingerprint
from lookonce.moderation.batch.service_pool import (
    LanguageConnection,
    Patience,
    ServicePool,
    VisionConnection,
    when_back,
)
from lookonce.moderation.policy import Policy


@dataclass(frozen=True)
class Addresses:
    """Where the services are, and how they are spoken to. Plain data: another machine may connect with it."""

    vision: tuple[str, ...]
    language: tuple[str, ...]
    tls: Tls | None = None
    connections: int = 2  # to each vision service
    scores: int = 16  # images a language service scores at once
    reproducible: bool = True
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Served:
    """What the services are and take."""

    models: Models
    max_image_bytes: int
    window: int  # images of one stream under way
    under_way: int  # images worth having under way in all


async def describe(addresses: Addresses, policy: Policy) -> Served:
    """Waits for the services to answer, as long as patience lasts. Raises UNAVAILABLE, FINGERPRINT_MISMATCH when they
    don't belong together or differ among themselves."""
    visions = [VisionClient(address, tls=addresses.tls) for address in addresses.vision]
    languages = [LanguageClient(address, tls=addresses.tls) for address in addresses.language]
    try:
        now, patience = time.monotonic(), addresses.patience
        seen = [await when_back(client, client.describe, patience, now) for client in visions]
        heard = [await when_back(client, client.describe, patience, now) for client in languages]
    finally:
        for client in (*visions, *languages):
            await client.close()
    models = {Models.of(vision, language, policy) for vision in seen for language in heard}
    if len(models) != 1:
        raise invalid("the services at these addresses don't all have the same model and bounds", param="vision")
    window = min(vision.stream_window for vision in seen)
    under_way = addresses.connections * len(visions) * window + addresses.scores * len(languages)
    return Served(models.pop(), min(vision.max_image_bytes for vision in seen), window, under_way)


@asynccontextmanager
async def connected(
    addresses: Addresses, policy: Policy, served: Served, *, trials: bool = True
) -> AsyncIterator[Judge]:
    """A judge, for as long as the block runs. Only one process of a run makes `trials`."""
    models, patience = served.models, addresses.patience

    async def check_vision(client: VisionClient) -> str:
        found = await client.describe()
        if found.fingerprint != models.vision:
            raise other_model(client.label, models.vision, found.fingerprint)
        return found.model.instance

    async def check_language(client: LanguageClient) -> str:
        described = await client.describe()
        found = language_fingerprint(described)
        if found != models.language:
            raise other_model(client.label, models.language, found)
        return described.model.instance

    def open_vision(address: str) -> VisionConnection:
        clients = [VisionClient(address, tls=addresses.tls) for _ in range(addresses.connections)]
        return VisionConnection(clients, served.window, patience, check_vision)

    def open_language(address: str) -> LanguageConnection:
        client = LanguageClient(address, tls=addresses.tls)
        return LanguageConnection(client, addresses.scores, patience, check_language, isolated=addresses.reproducible)

    visions = ServicePool([open_vision(address) for address in addresses.vision])
    languages = ServicePool([open_language(address) for address in addresses.language])
    try:
        yield Judge(policy, models, visions, languages, patience, PoisonIsolation(trials=trials))
    finally:
        await visions.close()
        await languages.close()
