"""From settings to a job: source listed, services described, policy read, everything that must agree checked first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from lookonce.core.errors import invalid
from lookonce.core.http_fetch.fetch_policy import FetchPolicy, parse_networks, parse_ports
from lookonce.core.units import split_list
from lookonce.moderation.batch.connect import Addresses, Served, connected, describe
from lookonce.moderation.batch.parts import Output
from lookonce.moderation.batch.run import Run
from lookonce.moderation.batch.run_identity import Identity, Manifest
from lookonce.moderation.batch.settings import ModerateSettings
from lookonce.moderation.batch.sources.items import Source, items
from lookonce.moderation.batch.sources.opening import SourceOptions, open_source
from lookonce.moderation.batch.sources.reader import Reader
from lookonce.moderation.batch.work_loop import Job, Tally
from lookonce.moderation.policy import Policy, read_policy


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
async def working(made: Plan, run: Run, report: Callable[[Tally], None]) -> AsyncIterator[Job]:
    """The job of this process, its connections open while the block runs."""
    reader = made.reader()
    try:
        async with connected(made.addresses, made.policy, made.served) as judge:
            yield Job(
                run,
                items(made.source),
                reader,
                judge,
                under_way=made.settings.under_way or made.served.under_way,
                max_bytes=made.settings.memory_bytes,
                on_progress=report,
            )
    finally:
        reader.close()
