"""What the user sees when something fails (DESIGN 10), with real processes killed."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx2
import pytest

from gateway.images.library import parse_id
from protos.lookonce.v1 import common_pb2, language_pb2_grpc, vision_pb2_grpc
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import START_SECONDS

ImageFile = Callable[..., bytes]
LONG = {
    "messages": [{"role": "user", "content": "Go on and on."}],
    "max_tokens": 8000,  # seconds of work, however late the test looks
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(autouse=True)
def whole(services: Services) -> Iterator[None]:
    """Leave both services running, whatever the test did to them."""
    yield
    for process in (services.vision, services.language):
        if not process.healthy():
            process.restart()


def upload(http: httpx2.Client, data: bytes) -> str:
    response = http.post("/v1/images", files={"file": data})
    assert response.status_code == 200, response.text
    return response.json()["id"]


def ask(http: httpx2.Client, identifier: str, text: str = "What?") -> httpx2.Response:
    return http.post(f"/v1/images/{identifier}/questions", json={"questions": [text], "max_tokens": 2})


def eventually(condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def lose_everything(services: Services, identifier: str) -> None:
    """Drop an image's embedding and KV from the services and their store, behind the gateway's back."""
    request = common_pb2.ForgetRequest(image_digests=[parse_id(identifier)])
    options = [("grpc.enable_http_proxy", 0)]
    for address, stub in (
        (services.vision.address, vision_pb2_grpc.VisionEncoderStub),
        (services.language.address, language_pb2_grpc.LanguageModelStub),
    ):
        with grpc.insecure_channel(address, options=options) as channel:
            assert stub(channel).Forget(request, timeout=60).complete


def test_a_lost_embedding_is_made_again_in_silence(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    identifier = upload(http, image_file())
    first = ask(http, identifier).json()["answers"][0]
    before = services.encodes()
    lose_everything(services, identifier)
    again = ask(http, identifier).json()["answers"][0]
    assert again["text"] == first["text"]
    assert again["receipt"]["embedding"] == "miss" and services.encodes() == before + 1
    lose_everything(services, identifier)
    body = {"questions": [{"text": "Day?", "choices": ["yes", "no"]}]}
    chosen = http.post(f"/v1/images/{identifier}/questions", json=body).json()["answers"][0]
    assert chosen["receipt"]["embedding"] == "miss" and services.encodes() == before + 2


def test_a_hundred_first_requests_of_one_image_encode_once(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    url, before = "data:image/png;base64," + base64.b64encode(image_file()).decode(), services.encodes()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(lambda _: http.post("/v1/chat/completions", json=body), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert services.encodes() == before + 1
    outcomes = [answer.json()["receipt"]["embedding"] for answer in answers]
    assert outcomes.count("miss") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(gateway: GatewayProcess, services: Services, stream: bool) -> None:
    with gateway.client() as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=LONG) as response:
                lines = response.iter_lines()
                assert next(lines)
                assert eventually(lambda: services.describe_language().running == 1)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/chat/completions", json=LONG | {"stream": False}, timeout=httpx2.Timeout(60, read=0.5))
    assert eventually(lambda: services.describe_language().running == 0)


def test_without_a_vision_service_known_images_answer_and_new_ones_wait(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    identifier = upload(http, image_file())
    services.vision.kill()
    assert ask(http, identifier).status_code == 200
    new = http.post("/v1/images", files={"file": image_file()})
    assert new.status_code == 503 and int(new.headers["retry-after"]) >= 1
    ready = http.get("/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "degraded"
    erased = http.delete(f"/v1/images/{identifier}").json()
    assert erased["deleted"] is True and erased["complete"] is False
    assert http.get(f"/v1/images/{identifier}").status_code == 404
    services.vision.restart()
    assert eventually(lambda: http.delete(f"/v1/images/{identifier}").json().get("complete", True))
    assert http.delete(f"/v1/images/{identifier}").status_code == 404
    assert eventually(lambda: http.get("/readyz").json()["status"] == "ready")
    assert upload(http, image_file())


def test_a_language_service_that_dies_ends_the_stream_with_an_error_event(
    gateway: GatewayProcess, services: Services
) -> None:
    with gateway.client() as http:
        with http.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines)
            services.language.kill()
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "unavailable"
        refused = http.post("/v1/chat/completions", json=LONG)  # nothing sent yet: a status, not an event
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert http.get("/readyz").status_code == 503
        services.language.restart()
        assert eventually(lambda: http.get("/readyz").status_code == 200)
        body = LONG | {"stream": False, "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
