"""An erasure takes what was there when it was asked for, however long it takes, and nothing that came after it."""

from __future__ import annotations

import time

import httpx2
import pytest

from tests.images import photograph, save

RETRIES_SECONDS = 4.0
"""The background's first two tries have been made by then."""


@pytest.fixture
def gateways(double):
    clients = [httpx2.Client(base_url=gateway.url, timeout=120) for gateway in double.gateways]
    yield clients
    for client in clients:
        client.close()


def eventually(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def upload(http, data, **fields):
    reply = http.post("/v1/images", files={"file": ("a.png", data)}, data=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


def embeddings(valkey):
    with valkey.client() as client:
        return set(client.scan_iter("lookonce:embeddings:*", count=1000))


@pytest.mark.parametrize(
    "elsewhere", [pytest.param(0, id="same gateway", marks=pytest.mark.slow), pytest.param(1, id="other gateway")]
)
def test_what_is_uploaded_again_outlives_the_erasure_before_it(double, gateways, valkey, elsewhere):
    before = embeddings(valkey)
    first, second = gateways[0], gateways[elsewhere]
    data, name = save(photograph("coffee", (90 + elsewhere, 60)), "PNG"), f"kept-{elsewhere}"
    image = upload(first, data, alias="gone")
    low = {"questions": ["What?"], "max_tokens": 1, "detail": "low"}
    assert first.post(f"/v1/images/{image}/questions", json=low).status_code == 200  # a second embedding
    double.visions[1].kill()
    assert first.delete(f"/v1/images/{image}").json()["complete"] is False
    assert upload(second, data, pinned="true", alias=name) == image
    time.sleep(RETRIES_SECONDS)
    for http in gateways:
        kept = http.get(f"/v1/images/{image}").json()
        assert (kept.get("pinned"), kept.get("aliases")) == (True, [name]), kept
        assert http.get(f"/v1/images/{name}").json()["id"] == image
        assert http.get("/v1/images/gone").status_code == 404
        assert image in [one["id"] for one in http.get("/v1/images").json()["data"]]
        answer = http.post(f"/v1/images/{name}/questions", json={"questions": ["What?"], "max_tokens": 1})
        assert "text" in answer.json()["answers"][0], answer.text
    # A second erasure, beside what is left of the first: complete once the service is back, and nothing stays.
    assert second.delete(f"/v1/images/{image}").json()["complete"] is False
    double.visions[1].restart()
    eventually(lambda: second.delete(f"/v1/images/{image}").status_code == 404)
    for http in gateways:
        eventually(lambda http=http: http.get(f"/v1/images/{image}").status_code == 404)
        assert http.get(f"/v1/images/{name}").status_code == 404
    assert embeddings(valkey) <= before
    with valkey.client() as client:
        left = [key for key in client.scan_iter("lookonce:images*", count=1000) if b"lease" not in key]
        values = [client.get(key) for key in left]
        assert not any(data in value for value in values), "the file is gone"
    double.wait_whole()
