"""What keys may ask for, trace ids through every process, signs of life on quiet streams."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import ANY

import httpx2
import pytest

from gateway.auth import Keyring, Meter, Quota
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.telemetry import tracing
from lookonce.core.telemetry.tracing import Trace
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.images import photograph, save

SLOW, NARROW, FREE = "slow-0123456789abcdef", "narrow-0123456789abcdef", "free-0123456789abcdef"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def metered(services: Services) -> Iterator[GatewayProcess]:
    keys = f"{SLOW} rate=3,{NARROW} concurrency=1 rate=0,{FREE} rate=0"
    with GatewayProcess(
        *services.arguments(), "--key-rate", "2", "--heartbeat", "0.1", env={"LOOKONCE_GATEWAY_API_KEYS": keys}
    ) as process:
        yield process


@pytest.fixture
def free(metered: GatewayProcess) -> Iterator[httpx2.Client]:
    with metered.client(FREE) as client:
        yield client


def test_a_key_over_its_rate_is_told_when_to_come_again(metered: GatewayProcess, free: httpx2.Client) -> None:
    before = _refusals(free)
    with metered.client(SLOW) as slow:
        answers = [slow.get("/v1/models") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        error = answers[3].json()["error"]
        assert error["code"] == "rate_limit_exceeded" and error["type"] == "rate_limit_error"
        assert error["message"] == "more than 3 requests a minute with this API key"
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        assert slow.get("/healthz").status_code == 200
    assert free.get("/v1/models").status_code == 200
    assert _refusals(free) == before + 1


def test_a_key_has_so_many_requests_at_once(metered: GatewayProcess, services: Services, free: httpx2.Client) -> None:
    body = {"questions": ["Go on."], "stream": True, "max_tokens": 2}
    with metered.client(NARROW) as narrow:
        image = narrow.post("/v1/images", files={"file": _image_file()}).json()["id"]
        with ExitStack() as stack:
            with services.language.frozen():
                one = stack.enter_context(narrow.stream("POST", f"/v1/images/{image}/questions", json=body))
                lines = one.iter_lines()
                assert next(lines) == ": still here"
                full = narrow.get("/v1/images")
                assert full.status_code == 429 and full.headers["retry-after"] == "1"
                text = "this API key has 1 requests under way, the limit is 1"
                assert full.json()["error"]["message"] == text
                assert free.get("/v1/images").status_code == 200
            rest = [line for line in lines if line and not line.startswith(":")]
        assert len(rest) == 2 and "text" in json.loads(rest[0][6:]) and rest[1] == "data: [DONE]"
        assert narrow.get("/v1/images").status_code == 200


def test_log_lines_and_answers_name_the_trace(metered: GatewayProcess, free: httpx2.Client) -> None:
    answer = free.get("/v1/images/nowhere", headers={"traceparent": PARENT, "x-request-id": "traced-1"})
    _, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (trace, flags) == (PARENT.split("-")[1], "01") and span != PARENT.split("-")[2]
    fresh = free.get("/v1/images/nowhere", headers={"traceparent": PARENT.upper(), "x-request-id": "traced-2"})
    assert fresh.headers["traceparent"].split("-")[1] != trace
    assert metered.line("request", request_id="traced-1")["trace_id"] == trace
    assert metered.line("request", request_id="traced-2")["trace_id"] == fresh.headers["traceparent"].split("-")[1]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        PARENT + "-more",
        PARENT[:-1],
        "é" + PARENT[1:],
    ],
)
def test_a_malformed_parent_begins_a_new_trace(header: str | None) -> None:
    trace = tracing.begin(header).trace
    known = PARENT.split("-")[1]
    assert trace is not None and trace.trace_id != known
    assert tracing.begin(trace.header).trace == Trace(trace.trace_id, ANY, trace.flags)
    step = tracing.begin("01" + PARENT[2:] + "-later")
    assert step.trace == Trace(known, ANY) and step.outgoing[0][1].split("-")[1] == known


def test_the_bucket_fills_at_the_rate_and_no_further_than_a_minute() -> None:
    now = [0.0]
    meter = Meter(Quota(rate=60), clock=lambda: now[0])
    for _ in range(60):
        _use(meter)
    assert _refused(meter).retry_after == pytest.approx(1.0)
    now[0] = 2.5
    _use(meter)
    _use(meter)
    assert _refused(meter).retry_after == pytest.approx(0.5)
    now[0] = 10_000.0
    for _ in range(60):
        _use(meter)
    assert _refused(meter).kind is ErrorKind.RATE_LIMITED


def test_a_refused_request_takes_no_place() -> None:
    meter = Meter(Quota(concurrency=2))
    with meter.request(), meter.request():
        for _ in range(3):
            assert _refused(meter).retry_after == 1.0
    assert meter.active == 0
    with pytest.raises(ZeroDivisionError), meter.request():
        _ = 1 / 0
    assert meter.active == 0


def test_limits_stand_after_the_key_of_any_form() -> None:
    hashed = "sha256:" + "ab" * 32
    ring = Keyring(
        [f"red={SLOW}  rate=5\tconcurrency=7", NARROW, f"{hashed} rate=9", f"red={FREE} concurrency=0"],
        secret="s",
        quota=Quota(rate=2, concurrency=3),
    )
    assert ring.identify(SLOW).tenant.name == "red" and ring.identify(SLOW).meter.quota == Quota(5, 7)
    assert ring.identify(NARROW).meter.quota == Quota(2, 3)
    assert ring.identify(FREE).meter.quota == Quota(2, 0)
    assert ring.identify(SLOW).meter is ring.identify(SLOW).meter
    assert Keyring([], quota=Quota(rate=4)).identify(None).meter.quota == Quota(rate=4)


def test_no_tenant_takes_every_place() -> None:
    def ring(*lines: str, **settings: int) -> Keyring:
        return Keyring(
            list(lines), secret="s", tenant_quota=GatewaySettings(max_concurrency=5, **settings).tenant_quota
        )

    several = ring(f"red={SLOW}", f"red={NARROW}", f"blue={FREE}")
    with several.identify(SLOW).request(), several.identify(NARROW).request():
        for key in (SLOW, NARROW):
            with pytest.raises(LookonceError, match="this tenant has 2 requests under way, the limit is 2") as refused:
                several.identify(key).request().__enter__()
            assert refused.value.kind is ErrorKind.RATE_LIMITED
        with several.identify(FREE).request():
            pass
    with several.identify(SLOW).request(), several.identify(SLOW).request():
        pass
    for free in (ring(f"red={SLOW}"), ring(f"red={SLOW}", f"blue={FREE}", tenant_concurrency=0), ring()):
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(free.identify(SLOW).request())


def _refusals(http: httpx2.Client) -> float:
    found = re.search(r"^lookonce_gateway_rate_limited_total (.+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _use(meter: Meter) -> None:
    with meter.request():
        pass


def _refused(meter: Meter) -> LookonceError:
    with pytest.raises(LookonceError) as caught:
        _use(meter)
    return caught.value


def _image_file() -> bytes:
    return save(photograph("coffee", (84, 56)), "PNG")
