"""Mutual TLS between three real processes, with certificates as the chart mounts them, and its health command."""

from __future__ import annotations

import asyncio
import time

import httpx2
import pytest

from lookonce.cli import health
from lookonce.core.rpc.tls import Tls
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.fetching.servers import make_certificates
from tests.images import photograph, save
from tests.ports import free_port
from tests.processes import START_SECONDS, ServiceProcess
from tests.system.cluster import GatewayProcess

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tls")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An authority and one certificate for "localhost", which every process here uses as its own."""
    return make_certificates(tmp_path_factory.mktemp("tls"), "localhost")


def wait_ready(process: ServiceProcess, tls: Tls) -> None:
    deadline = time.monotonic() + START_SECONDS
    while asyncio.run(health.check_once(process.address, tls, server_name="localhost")) is not health.Health.READY:
        assert process.process.poll() is None and time.monotonic() < deadline, process.log
        time.sleep(0.1)


def test_a_system_over_mutual_tls(files, tmp_path, capsys):
    model = make_random_checkpoint(tmp_path / "model", size="tiny", max_pixels=100 * 28 * 28)
    shown = Tls(files.chain, files.key, files.ca)
    own = ("--tls-certificate", str(files.chain), "--tls-key", str(files.key), "--tls-ca", str(files.ca))
    ports = {name: free_port() for name in ("vision", "language", "metrics")}
    common = ("--model", str(model), "--device", "cpu", "--dtype", "float32", *own)
    vision = ServiceProcess(
        "vision_service", *common, "--store", f"file://{tmp_path}/eyes", listen=f"127.0.0.1:{ports['vision']}"
    )
    # a store of its own: what was encoded must be fetched from the vision service, which asks for a certificate
    store = ("--store", f"file://{tmp_path}/words")
    calls = ("--vision", f"localhost:{ports['vision']}", "--vision-tls-ca", str(files.ca))
    watched = ("--metrics-listen", f"127.0.0.1:{ports['metrics']}")
    language = ServiceProcess("lm_service", *common, *store, *calls, *watched, listen=f"127.0.0.1:{ports['language']}")
    gateway = None
    try:
        wait_ready(vision, shown)
        wait_ready(language, shown)
        door = ("--vision", f"localhost:{ports['vision']}", "--lm", f"localhost:{ports['language']}")
        trust = ("--rpc-tls-ca", str(files.ca), "--rpc-tls-certificate", str(files.chain))
        gateway = GatewayProcess(*door, *trust, "--rpc-tls-key", str(files.key)).wait_ready()
        with httpx2.Client(base_url=gateway.url, timeout=120) as http:
            data = save(photograph("coffee", (150, 100)), "PNG")
            image = http.post("/v1/images", files={"file": ("image", data)}).json()["id"]
            reply = http.post(f"/v1/images/{image}/questions", json={"questions": ["What is it?"], "max_tokens": 4})
        (answer,) = reply.json()["answers"]
        assert answer["text"], answer
        series = httpx2.get(f"http://127.0.0.1:{ports['metrics']}/metrics", timeout=60).text
        assert 'lookonce_lm_embedding_loads_total{source="fetched"} 1.0' in series
        asks_the_health_command(language, files, capsys)
    finally:
        for process in (gateway, language, vision):
            if process is not None:
                process.close()


def asks_the_health_command(service, files, capsys):
    """As the chart's probes do: by the pod's own address, with the name that the certificate is for."""
    trust, name = f"--tls-ca={files.ca}", "--tls-name=localhost"
    pair = (f"--tls-certificate={files.chain}", f"--tls-key={files.key}")
    assert health.main([service.address, trust, name, *pair]) == 0
    assert health.main([service.address, trust, name]) == 1, "it demands a certificate"
    assert health.main([service.address, trust, *pair]) == 1, "the certificate is not for the address"
    assert health.main([service.address]) == 1, "it speaks TLS only"
    assert capsys.readouterr().out.split() == ["ready", "silent", "silent", "silent"]
