"""From settings to a job: source listed, services described, policy read, everything that must agree checked first.

Then the connections of one process, closed together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field

from lookonce.core.errors import invalid
from lookonce.core.http_fetch.fetch_policy import FetchPolicy, parse_networks, parse_ports
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.rpc.tls import Tls
from lookonce.core.units import split_list
from lookonce.moderation.batch.judge import Judge, other_model
from lookonce.moderation.batch.parts import Output
from lookonce.moderation.batch.poison_isolation import PoisonIsolation
from lookonce.moderation.batch.run import Run
from lookonce.moderation.batch.run_identity import Identity, Manifest, Models, language_fingerprint
from lookonce.moderation.batch.service_pool import (
    LanguageConnection,
    Patience,
    ServicePool,
    VisionConnection,
    when_back,
)
from lookonce.moderation.batch.settings import ModerateSettings
from lookonce.moderation.batch.sources.items import Source, items
from lookonce.moderation.batch.sources.opening import SourceOptions, open_source
from lookonce.moderation.batch.sources.reader import Reader
from lookonce.moderation.batch.work_loop import Job, Tally
from lookonce.moderation.policy import Policy, read_policy


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


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know."""

    settings: ModerateSettings
    source: Source
    policy: Policy
    addresses: Addresses
    served: Served
    output: Output
    manifest: Manifest

    def reader(self) -> Reader:
        return open_reader(self.settings, self.served.max_image_bytes)


def plan(source_name: str, settings: ModerateSettings, addresses: Addresses) -> Plan:
    """Look at everything once. Raises what is wrong with any of it. Blocking."""
    policy = read_policy(settings.policy)
    if not policy.of("image"):
        raise invalid(f"the policy file {settings.policy} has no rule that applies to images", param="policy")
    output = Output.chosen(settings.out, settings.format)
    served = asyncio.run(describe(addresses, policy))
    options = SourceOptions(settings.column, settings.id_column, settings.root, served.max_image_bytes)
    source = open_source(source_name, options)
    extent = source.extent()
    identity = Identity(
        source.description,
        extent.digest,
        extent.count,
        policy.digest,
        served.models,
        output.form,
        settings.part_rows,
    )
    return Plan(settings, source, policy, addresses, served, output, Manifest(identity, policy, asdict(options)))


def open_reader(settings: ModerateSettings, max_bytes: int) -> Reader:
    """A reader within the settings. Raises INVALID_ARGUMENT for networks or ports that are none."""
    try:
        networks = parse_networks(split_list(settings.fetch_networks))
        ports = parse_ports(split_list(settings.fetch_ports))
    except ValueError as error:
        raise invalid(f"--fetch-networks or --fetch-ports: {error}", param="fetch_networks") from None
    policy = FetchPolicy(ports=ports, networks=tuple(networks), concurrency=settings.read_threads)
    return Reader(threads=settings.read_threads, max_bytes=max_bytes, policy=policy)


@asynccontextmanager
async def working(
    made: Plan, run: Run, report: Callable[[Tally], None], stopped: Callable[[], bool]
) -> AsyncIterator[Job]:
    """The job of this process, its connections open while the block runs."""
    reader = made.reader()
    try:
        async with connected(made.addresses, made.policy, made.served) as judge:
            yield Job(
                run,
                items(made.source),
                reader,
                judge,
                stopped,
                under_way=made.settings.under_way or made.served.under_way,
                max_bytes=made.settings.memory_bytes,
                on_progress=report,
            )
    finally:
        reader.close()
