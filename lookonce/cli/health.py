"""How far a service has come, asked through its own door: gRPC health of the model services, the gateway's /readyz.

`python -m lookonce.cli.health ADDRESS` (host:port, unix:/path or http://host:port) asks once: exit status 0 when ready.
"""

from __future__ import annotations

import argparse
import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio
import httpx2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookonce.core.rpc.client import open_channel
from lookonce.core.rpc.tls import Tls

PROBE_TIMEOUT = 2.0


class Health(StrEnum):
    """What a probe found."""

    SILENT = "silent"  # nobody answers yet
    LOADING = "loading"  # answers, but not ready for requests
    READY = "ready"


class Probe(Protocol):
    """Asks one service."""

    async def check(self) -> Health:
        """Ask once; never raises for a service that doesn't answer."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class GrpcProbe:
    """grpc.health.v1 of one address."""

    def __init__(self, address: str, tls: Tls | None = None, *, server_name: str | None = None) -> None:
        self._channel = open_channel(address, tls, server_name=server_name)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def check(self) -> Health:
        try:
            reply = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT)
        except grpc.aio.AioRpcError:
            return Health.SILENT
        serving = reply.status == health_pb2.HealthCheckResponse.SERVING
        return Health.READY if serving else Health.LOADING

    async def close(self) -> None:
        await self._channel.close()


class HttpProbe:
    """/readyz below a base URL."""

    def __init__(self, url: str) -> None:
        # Our own process on this machine: its certificate needn't name the loopback address.
        self._client = httpx2.AsyncClient(base_url=url, timeout=PROBE_TIMEOUT, trust_env=False, verify=False)

    async def check(self) -> Health:
        try:
            reply = await self._client.get("/readyz")
        except httpx2.HTTPError:
            return Health.SILENT
        return Health.READY if reply.status_code == 200 else Health.LOADING

    async def close(self) -> None:
        await self._client.aclose()


async def check_once(address: str, tls: Tls | None = None, *, server_name: str | None = None) -> Health:
    """Ask the service at an address; `server_name` is what its certificate is for, when that is not the host."""
    over_http = address.startswith(("http://", "https://"))
    probe: Probe = HttpProbe(address) if over_http else GrpcProbe(address, tls, server_name=server_name)
    try:
        return await probe.check()
    finally:
        await probe.close()


def main(arguments: list[str] | None = None) -> int:
    """For a container's health check; says what it found."""
    parser = argparse.ArgumentParser(prog="lookonce.cli.health", description="Ask a service whether it is ready.")
    parser.add_argument("address", help="host:port or unix:/path of a model service, http://host:port of a gateway")
    for name in ("ca", "certificate", "key"):
        parser.add_argument(f"--tls-{name}", type=Path, help=f"PEM {name} for a service behind TLS")
    parser.add_argument("--tls-name", help="what its certificate is for, when that is not the address asked")
    given = parser.parse_args(arguments)
    tls = Tls(given.tls_certificate, given.tls_key, given.tls_ca)
    health = asyncio.run(check_once(given.address, tls, server_name=given.tls_name))
    print(health.value)
    return 0 if health is Health.READY else 1


if __name__ == "__main__":
    raise SystemExit(main())
