"""Faults in a seeded order: of processes on one thread, of the store on another."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.faulty_proxy import FaultyProxy
from tests.processes import ServiceProcess
from tests.system.campaign.images import Sample
from tests.system.campaign.verdicts import Verdicts
from tests.system.cluster import GatewayProcess, System
from tests.valkey import ValkeyServer

REFUSALS = frozenset({429, 503, 504})
STORE_SLACK = 8.0
"""Seconds until a breaker that was opened by a fault of at most 4 seconds has closed again."""
SERVICE_SLACK = 5.0  # seconds until the gateways' channels and health checks have noticed
PAUSES = (0.5, 2.5)  # seconds between two faults of one thread


class Faults:
    """Breaks one thing of each sort at a time, and mends it."""

    def __init__(
        self,
        seed: str,
        system: System,
        valkey: ValkeyServer,
        proxy: FaultyProxy,
        images: list[Sample],
        verdicts: Verdicts,
    ) -> None:
        self._seed = seed
        self._system = system
        self._valkey = valkey
        self._proxy = proxy
        self._images = images
        self._verdicts = verdicts
        self._failed: list[BaseException] = []

    def run(self, seconds: float) -> None:
        """Break and mend for so long, and everything once; all is whole afterwards. Blocking."""
        deadline = time.monotonic() + seconds
        groups = (self._of_processes(), self._of_the_store())
        threads = [
            threading.Thread(target=self._run, args=(f"{self._seed}/{number}", faults, deadline))
            for number, faults in enumerate(groups)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _run(self, seed: str, faults: list[Callable[[random.Random], None]], deadline: float) -> None:
        rng = random.Random(seed)
        try:
            for number, fault in enumerate(_shuffled(faults, rng)):
                if time.monotonic() > deadline and number >= len(faults):  # each of them once, however slow the machine
                    return
                fault(rng)
                time.sleep(rng.uniform(*PAUSES))
        except BaseException as error:
            self._failed.append(error)

    def _of_processes(self) -> list[Callable[[random.Random], None]]:
        services = (("vision", self._system.visions), ("language", self._system.languages))
        return [
            lambda rng, n=name, ps=processes, b=break_it: b(n, rng.choice(ps), rng)  # type: ignore[misc]
            for name, processes in (*services, ("gateway", self._system.gateways))
            for break_it in (self._kill, self._terminate, self._stop)
        ]

    def _of_the_store(self) -> list[Callable[[random.Random], None]]:
        proxied = [lambda rng, mode=mode: self._proxied(mode, rng) for mode in ("away", "reset", "hang", "half")]
        swaps = [lambda rng, part=part: self._swap(part, rng) for part in ("embeddings", "images")]
        return [*proxied, *swaps, lambda rng: self._flush()]  # type: ignore[list-item]

    def _kill(self, name: str, process: ServiceProcess | GatewayProcess, rng: random.Random) -> None:
        with self._process_fault(f"kill {name}", process, REFUSALS):
            process.kill()
            time.sleep(rng.choice((0.0, 1.0)))
            process.restart()

    def _terminate(self, name: str, process: ServiceProcess | GatewayProcess, rng: random.Random) -> None:
        """One of two that is stopped as an orchestrator does it: no request may fail for it. A gateway's own clients
        find it gone."""
        with self._process_fault(f"terminate {name}", process, frozenset()) as gateway:
            if gateway:
                self._verdicts.windows[-1].statuses = frozenset({503})
            process.process.terminate()
            process.process.wait(60)
            process.restart()

    def _stop(self, name: str, process: ServiceProcess | GatewayProcess, rng: random.Random) -> None:
        with self._process_fault(f"stop {name}", process, REFUSALS):
            process.process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(1.0, 4.0))
            process.process.send_signal(signal.SIGCONT)

    @contextmanager
    def _process_fault(
        self, kind: str, process: ServiceProcess | GatewayProcess, statuses: frozenset[int]
    ) -> Iterator[bool]:
        gateway = process.url if isinstance(process, GatewayProcess) else None
        with self._verdicts.fault(kind, statuses=statuses, cuts=gateway, slack=SERVICE_SLACK):
            yield gateway is not None

    def _proxied(self, mode: str, rng: random.Random) -> None:
        """Nothing but an image that no gateway has at hand may be refused for it."""
        with self._verdicts.fault(f"store: {mode}", statuses=frozenset({503}), store=True, slack=STORE_SLACK):
            self._proxy.set(mode)
            time.sleep(rng.uniform(1.0, 4.0))
            self._proxy.set("none")

    def _flush(self) -> None:
        with self._verdicts.fault("store: FLUSHALL"), self._losing_everything(), self._valkey.client() as client:
            client.flushall()

    def _swap(self, part: str, rng: random.Random) -> None:
        """Each value of a kind under the key of another."""
        with self._verdicts.fault(f"store: swapped {part}"), self._valkey.client() as client:
            kinds: dict[str, list[bytes]] = defaultdict(list)
            for key in client.scan_iter(match=f"lookonce:{part}*", count=1000):
                kinds[_kind(key)].append(key)
            if part == "embeddings":
                _rotate(client, kinds, rng)
            else:
                with self._losing_everything():
                    _rotate(client, kinds, rng)

    @contextmanager
    def _losing_everything(self) -> Iterator[None]:
        for image in self._images:
            image.may_be_gone(float("inf"))
        try:
            yield
        finally:
            for image in self._images:
                image.may_be_gone(time.monotonic())


def _shuffled(
    faults: list[Callable[[random.Random], None]], rng: random.Random
) -> Iterator[Callable[[random.Random], None]]:
    """All of them in some order, again and again."""
    while True:
        yield from rng.sample(faults, len(faults))


def _kind(key: bytes) -> str:
    """ "embeddings", "images:record", "images-pinned:file" ... of lookonce:NAMESPACE:HEX."""
    _, namespace, digits = key.decode().split(":", 2)
    if namespace == "embeddings" or digits.startswith("lease"):
        return f"{namespace}:{digits[:5] if digits.startswith('lease') else ''}"
    return f"{namespace}:{bytes.fromhex(digits).split(b':', 1)[0].decode(errors='replace')}"


def _rotate(client: object, kinds: dict[str, list[bytes]], rng: random.Random) -> None:
    for kind, keys in kinds.items():
        if kind.endswith("lease") or len(keys) < 2:
            continue
        rng.shuffle(keys)
        values = [client.get(key) for key in keys]  # type: ignore[attr-defined]
        for key, value in zip(keys, values[1:] + values[:1], strict=True):
            if value is not None:
                client.set(key, value, keepttl=True)  # type: ignore[attr-defined]
