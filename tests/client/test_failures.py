"""What the client does when things fail: kinds of errors, retries, broken streams."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

import lookonce
from gateway.http.error_bodies import HTTP_ERRORS
from lookonce.client import exceptions as errors
from lookonce.client.exceptions import KIND_OF_CODE, refusal
from lookonce.core.errors import ErrorKind, LookonceError
from tests.client.conftest import KEY
from tests.client.cutter import Cutter
from tests.ports import free_port
from tests.processes import ROOT, START_SECONDS


def test_refusals_are_raised_by_kind(client, file):
    with pytest.raises(errors.ImageError) as caught:
        client.image(b"no image at all")
    error = caught.value
    assert (error.status, error.code, error.kind, error.param) == (
        400,
        "invalid_image",
        ErrorKind.IMAGE_INVALID,
        "file",
    )
    assert error.request_id.startswith("req_")
    assert error.request_id in str(error)
    image = client.image(file)
    with pytest.raises(errors.BadRequestError, match="max_tokens") as caught:
        image.ask("?", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(errors.ContextLengthError):
        image.ask("word " * 20_000)
    with pytest.raises(errors.ContextLengthError):
        image.ask("word " * 20_000, stream=True)
    with pytest.raises(errors.BadRequestError) as caught:
        image.ask("?", colour="red")
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "colour")
    with pytest.raises(errors.NotFoundError):
        client.image("img_" + "a" * 52)
    with pytest.raises(errors.NotFoundError):
        client.chat("Hello", model="another")


def test_what_is_wrong_here_is_said_before_anything_is_sent(client, file, tmp_path):
    for wrong in (tmp_path / "absent.png", str(tmp_path), 7, None, "a\0b"):
        with pytest.raises(LookonceError) as caught:
            client.image(wrong)
        assert caught.value.param == "image"
    image = client.image(file)
    for call in (lambda: image.ask(7), lambda: image.ask_many(["ok?", 7]), lambda: image.ask_many("one string")):
        with pytest.raises(LookonceError) as caught:
            call()
        assert caught.value.param == "questions"
    with pytest.raises(LookonceError) as caught:
        client.chat([{"role": "user", "content": [7]}])
    assert caught.value.param == "messages"
    for url in ("nonsense", "ftp://host", "http://", "http://[::1"):
        with pytest.raises(LookonceError) as caught:
            lookonce.Client(url)
        assert caught.value.param == "base_url"


def test_keys(another_gateway):
    gateway = another_gateway(env={"LOOKONCE_GATEWAY_API_KEYS": KEY}).wait_ready()
    for key in (None, "a-wrong-key-0123456789"):
        with lookonce.Client(gateway.url, key) as client, pytest.raises(errors.AuthenticationError) as caught:
            client.models()
        assert caught.value.status == 401
    with lookonce.Client(gateway.url, KEY) as client:
        assert len(client.models()) == 1


def test_a_full_gateway_is_asked_again_after_the_pause_it_wants(another_gateway, new_image, system):
    gateway = another_gateway("--max-concurrency", "1").wait_ready()
    refused = []

    def make_room(response):
        if response.status_code == 429:
            refused.append(time.monotonic())
            stream.close()

    hooked = httpx2.Client(timeout=60, event_hooks={"response": [make_room]})
    with (
        lookonce.Client(gateway.url, retries=0) as once,
        lookonce.Client(gateway.url, retries=8, http_client=hooked) as patient,
    ):
        image = once.image(new_image())
        with once.chat("Hello", stream=True, max_tokens=4000, temperature=1.5, seed=3, ignore_eos=True) as stream:
            next(iter(stream))
            with system.languages[0].frozen():  # the stream takes the only place until it is closed
                with pytest.raises(errors.RateLimitError) as caught:
                    once.image(image.id)
                assert caught.value.retry_after >= 1
                assert patient.image(image.id).id == image.id
    assert time.monotonic() - refused[0] >= caught.value.retry_after  # it came back no sooner than told


def test_a_gateway_that_starts_late_is_waited_for(another_gateway):
    port = free_port()
    with lookonce.Client(f"http://127.0.0.1:{port}", retries=0) as client, pytest.raises(errors.ConnectionFailed):
        client.models()
    with lookonce.Client(f"http://127.0.0.1:{port}", retries=60) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.models)
        another_gateway("--port", str(port))
        assert len(waiting.result(START_SECONDS)) == 1


CALLS = """
import asyncio, logging, sys, lookonce
if sys.argv[2:]: logging.basicConfig(level=logging.INFO)
async def ask():
    async with lookonce.AsyncClient(sys.argv[1], retries=1) as client: await client.models()
def ask_blocking():
    with lookonce.Client(sys.argv[1], retries=1) as client: client.models()
for call in (ask_blocking, lambda: asyncio.run(ask())):
    try: call()
    except lookonce.client.ConnectionFailed: pass
"""


def test_a_client_that_tries_again_writes_nothing_into_its_programs_output():
    command = [sys.executable, "-c", CALLS, f"http://127.0.0.1:{free_port()}"]
    quiet, told = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        for more in ([], ["told"])
    )
    assert (quiet.stdout, quiet.stderr) == ("", "")
    assert told.stdout == "" and told.stderr.count("INFO:lookonce.client:attempt 1 failed") == 2


def test_a_connection_lost_before_the_answer_is_made_again(url, file):
    with Cutter(url, 0, None) as cutter, lookonce.Client(cutter.url) as client:
        assert client.image(file).width == 84
    assert cutter.requests == [b"POST /v1/images", b"POST /v1/images"]


def test_erasing_is_not_repeated_blindly(url, client, file):
    image = client.image(file)
    with Cutter(url, None, 0) as cutter, lookonce.Client(cutter.url) as shaky:
        again = shaky.image(image.id)
        shaky._http.close()
        shaky._http = httpx2.Client()
        with pytest.raises(errors.ConnectionFailed):
            again.delete()
    assert [line.split()[0] for line in cutter.requests] == [b"GET", b"DELETE"]


@pytest.mark.parametrize("cut", [400, 900])
def test_a_stream_that_broke_is_told_and_never_begun_again(url, client, file, cut):
    image_id = client.image(file).id
    whole = client.image(image_id).ask("Tell all.", max_tokens=200, temperature=1.2, seed=5).text
    with Cutter(url, None, cut) as cutter, lookonce.Client(cutter.url) as shaky:
        image = shaky.image(image_id)
        shaky._http.close()
        shaky._http = httpx2.Client()
        stream = image.ask("Tell all.", stream=True, max_tokens=200, temperature=1.2, seed=5)
        with pytest.raises(errors.StreamInterrupted) as caught:
            list(stream)
    assert whole.startswith(caught.value.text)
    assert len(caught.value.text) < len(whole)
    assert len(cutter.requests) == 2


def test_many_answers_cut_short_are_not_lost(url, client, file):
    image_id = client.image(file).id
    with Cutter(url, None, 2500) as cutter, lookonce.Client(cutter.url) as shaky:
        image = shaky.image(image_id)
        shaky._http.close()
        shaky._http = httpx2.Client()
        with pytest.raises(errors.StreamInterrupted) as caught:
            image.ask_many([f"{number}?" for number in range(30)], max_tokens=3)
    assert 0 < len(caught.value.answers) < 30
    assert all(answer.ok for answer in caught.value.answers)
    assert len(cutter.requests) == 2


def test_silence_ends_in_a_timeout():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with lookonce.Client(url, timeout=0.2) as client, pytest.raises(errors.RequestTimeout) as caught:
            client.models()
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED


def test_the_table_of_codes_is_that_of_the_gateway():
    ours = {**KIND_OF_CODE}
    assert ours.pop("unknown_parameter") is ErrorKind.INVALID_ARGUMENT  # the one code beside the table
    assert ours == {shape.code: kind for kind, shape in HTTP_ERRORS.items()}


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_refusal_has_its_class(kind):
    shape = HTTP_ERRORS[kind]
    error = refusal(shape.status, {}, b'{"error": {"message": "m", "code": "%s"}}' % shape.code.encode())
    assert error.kind is kind
    expected = {401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError", 409: "ConflictError"}
    expected |= {429: "RateLimitError", 503: "UnavailableError", 500: "ServerError", 504: "ServerError"}
    name = type(error).__name__
    assert name == expected.get(shape.status, name)
    assert isinstance(error, errors.BadRequestError) == (shape.status in (400, 413, 499))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {}}'])
def test_a_refusal_by_something_else_is_told_by_its_status(body):
    assert isinstance(refusal(502, {}, body), errors.UnavailableError)
    assert isinstance(refusal(404, {}, body), errors.NotFoundError)
    assert isinstance(refusal(302, {"retry-after": "Wed, 21 Oct"}, body), errors.BadRequestError)
    assert "HTTP 502" in str(refusal(502, {}, body))
