"""`python -m tests.cli.supervise GRACE DIRECTORY NAME:FLAGS...`: the product's Supervisor over small services.

GRACE: seconds; the supervisor adds three of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from pathlib import Path

from lookonce.cli.health import HttpProbe
from lookonce.cli.supervisor import RestartPolicy, Service, ServiceFailed, ServicePlan, Supervisor
from tests.ports import free_port


def service(directory: Path, text: str) -> Service:
    name, _, flags = text.partition(":")
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = ["--port", str(port), "--name", name, "--starts", str(directory / f"{name}.starts")]
    arguments += ["--ended", str(directory / "ended"), *shlex.split(flags)]
    plan = ServicePlan(name, "tests.cli.health_service", arguments, os.environ, url, lambda: HttpProbe(url))
    policy = RestartPolicy(first_delay=0.05, max_delay=0.2, healthy_after=0.3)

    def changed(name: str, text: str) -> None:
        print(f"{name}: {text}", flush=True)

    return Service(plan, directory / f"{name}.log", changed, changed, policy=policy)


async def main() -> int:
    grace, directory, *texts = sys.argv[1:]
    services = [service(Path(directory), text) for text in texts]
    supervisor = Supervisor(services, grace=float(grace), on_ready=lambda: print("all ready", flush=True))
    try:
        return await supervisor.run()
    except ServiceFailed as error:
        print(f"failed: {error.message} {error.lines}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
