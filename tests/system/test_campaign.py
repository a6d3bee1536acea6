"""Two gateways, two services of each kind and one Valkey behind a proxy, under load, broken in every way at once.

LOOKONCE_CAMPAIGN_SECONDS (90) is how long faults go on; LOOKONCE_CAMPAIGN_SEED (1) says which and in what order.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter

import psutil
import pytest

from tests.faulty_proxy import FaultyProxy
from tests.processes import ROOT
from tests.system.campaign.faults import Faults
from tests.system.campaign.images import OPEN, prepare
from tests.system.campaign.load import Client
from tests.system.campaign.verdicts import Verdicts
from tests.system.cluster import System
from tests.unsplit import Unsplit
from tests.valkey import ValkeyServer
from vision_service.images import Decoder, ImageLimits

MODEL = ROOT / "lookonce/data/shapes"
SECONDS = float(os.environ.get("LOOKONCE_CAMPAIGN_SECONDS", "90"))
SEED = os.environ.get("LOOKONCE_CAMPAIGN_SEED", "1")
IMAGES, CLIENTS = 18, 8
SETTLED_SECONDS = 60.0  # after the last fault, until everything answers again
GATEWAY_BYTES, SERVICE_BYTES = 512 << 20, 2 << 30  # resident, at most
# Small caches, so that answers come from the store again and again.
VISION = ("--l1-bytes", "65536", "--lease-seconds", "5")
LANGUAGE = ("--l1-bytes", "128KiB", "--prefix-bytes", "4MiB", "--kv-bytes", "64MiB", "--max-timeout", "40")
GATEWAY = ("--request-timeout", "40", "--encode-timeout", "20", "--model-name", "lookonce", "--drain-grace", "10")


class Memory:
    """The most that each process has held, looked at twice a second."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.peaks: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            for kind in ("gateways", "visions", "languages"):
                for process in getattr(self._system, kind):
                    try:
                        resident = psutil.Process(process.process.pid).memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
                    self.peaks[kind] = max(self.peaks[kind], resident)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


async def under_load(clients, work):
    """What `work`, which blocks, is done to while all clients ask."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(stop))
        await asyncio.to_thread(work)
        stop.set()


async def everything(client, system, images, verdicts):
    """Upload what may be gone, then ask all about all, of every gateway: nothing may fail."""
    for image in images:
        if not image.certain_from <= time.monotonic():
            await client.once(client.upload, system.gateways[0].url, image)
    await asyncio.sleep(2)  # every gateway knows of it
    for gateway in system.gateways:
        for image in images:
            for operation in (client.look, client.ask_all, client.chat_streaming, client.chat_inline):
                outcome = await client.once(operation, gateway.url, image)
                if outcome != "right":
                    verdicts.accuse("not whole without a fault", operation=operation.__name__, outcome=outcome)


def check_logs(system, verdicts, folder):
    """What the processes say of themselves: no answer 500, no exception that nobody foresaw. Logs go to `folder`."""
    for number, process in enumerate((*system.gateways, *system.visions, *system.languages)):
        name = getattr(process, "module", "gateway")
        (folder / f"{number}-{name}.log").write_text(process.log)
        for line in process.log.splitlines():
            entry = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if entry.get("status") == 500:
                verdicts.accuse("a logged 500", process=name, line=line[:300])
            if "Traceback (most recent call last)" in line or "exception" in entry:
                told = str(entry.get("exception", line)).strip().splitlines()[-1]
                event = str(entry.get("event", "")).partition("\n")[0]
                verdicts.accuse(f"traceback in the log of a {name}: {event}", told=told[:300])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 900)
def test_no_fault_makes_an_answer_wrong_or_loses_what_is_kept(tmp_path):
    verdicts = Verdicts()
    with (
        ValkeyServer() as valkey,
        FaultyProxy(valkey.port) as proxy,
        System(
            MODEL, tmp_path, visions=2, languages=2, gateways=2, store=proxy.url,
            vision_args=VISION, language_args=LANGUAGE, gateway_args=GATEWAY,
        ) as system,
        Memory(system) as memory,
    ):  # fmt: skip
        images = prepare(system, IMAGES)
        unsplit, decoder = Unsplit(MODEL), Decoder(ImageLimits())
        for image in images[:6]:
            for question in OPEN:
                true = unsplit.answer([("user", [decoder.decode(image.data), question])], 40)
                assert image.texts[question] == true, "the quiet system itself is wrong"
        gateways = [gateway.url for gateway in system.gateways]

        async def campaign() -> None:
            last = Client("last", gateways, images, verdicts)
            await everything(last, system, images, verdicts)
            assert not verdicts.violations, "before any fault:\n" + verdicts.report()
            clients = [Client(f"{SEED}/{number}", gateways, images, verdicts) for number in range(CLIENTS)]
            faults = Faults(SEED, system, valkey, proxy, images, verdicts)
            await under_load(clients, lambda: faults.run(SECONDS))
            await asyncio.to_thread(system.wait_whole, SETTLED_SECONDS)
            await asyncio.sleep(10)  # what went on in the background has had its time
            await everything(last, system, images, verdicts)
            await last.close()

        asyncio.run(campaign())
        check_logs(system, verdicts, tmp_path)
        if memory.peaks["gateways"] > GATEWAY_BYTES:
            verdicts.accuse("a gateway's memory", bytes=memory.peaks["gateways"])
        for kind in ("visions", "languages"):
            if memory.peaks[kind] > SERVICE_BYTES:
                verdicts.accuse(f"memory of {kind}", bytes=memory.peaks[kind])
        peaks = ", ".join(f"{kind} {peak >> 20} MiB" for kind, peak in sorted(memory.peaks.items()))
        print(f"\n{verdicts.report()}\nmemory at most: {peaks}\nlogs: {tmp_path}")
    assert len({window.kind for window in verdicts.windows}) == 16
    assert dict(verdicts.violations) == {}, verdicts.report()
