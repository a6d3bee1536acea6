"""A Redis whose connections are reset, refused, halved and garbled: uploads, questions and deletes go on."""

from __future__ import annotations

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.faulty_proxy import FaultyProxy
from tests.images import photograph, save
from tests.system.cluster import System
from tests.valkey import ValkeyServer

QUICK = "connect_timeout=200ms&socket_timeout=200ms&operation_timeout=500ms"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["mixed", "reset", "half_reset", "garbage", "error"])
def test_no_request_fails_for_it(fault, tmp_path):
    model = make_random_checkpoint(tmp_path / "model", max_pixels=60 * 28 * 28)
    with (
        ValkeyServer() as valkey,
        FaultyProxy(valkey.port) as proxy,
        System(model, tmp_path, store=f"redis://127.0.0.1:{proxy.port}?{QUICK}") as system,
    ):
        proxy.fault = fault
        for number in range(8):
            image = system.upload(save(photograph("coffee", (60 + number, 60)), "PNG"))["id"]
            assert "text" in system.ask(image, ["What?"], max_tokens=1)[0]
            reply = system.http.delete(f"/v1/images/{image}")
            assert reply.status_code == 200 and reply.json()["deleted"], reply.text
        log = "".join(process.log for process in (*system.gateways, *system.visions, *system.languages))
        assert "Traceback" not in log and "unforeseen" not in log, log[-3000:]
