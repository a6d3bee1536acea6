"""What needs no process: the HTTP table, keys, replica choice, settings, the import rule."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from pydantic import SecretStr, ValidationError

from gateway.auth import Keyring, read_keys
from gateway.http.error_bodies import HTTP_ERRORS, error_response
from gateway.routing.replicas import LOAD_FLOOR, Replicas
from gateway.schemas.body import to_sampling
from gateway.schemas.requests import QuestionsRequest
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.process import PERMANENT_EXIT, USAGE_EXIT

KEY = "correct-horse-battery"


def test_http_table_is_total() -> None:
    assert set(HTTP_ERRORS) == set(ErrorKind)
    assert all(400 <= shape.status < 600 for shape in HTTP_ERRORS.values())


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_429_and_503_say_when_to_come_back(kind: ErrorKind) -> None:
    response = error_response(LookonceError(kind, "text", retry_after=0.2))
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))


def test_importing_the_gateway_loads_no_model_library() -> None:
    code = "import gateway.app, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class StandIn:
    """An address; replica choice needs no more of a client."""

    def __init__(self, address: str) -> None:
        self.address = address

    serving = True

    async def healthy(self, timeout: float = 2.0) -> bool:
        return self.serving

    async def close(self) -> None:
        pass


def replicas(count: int, now: list[float]) -> Replicas[StandIn]:
    return Replicas([StandIn(f"host{number}:1") for number in range(count)], clock=lambda: now[0])


async def test_one_image_goes_to_one_replica_and_only_a_dead_ones_images_move() -> None:
    now = [0.0]
    pool = replicas(4, now)
    keys = [bytes([number]) * 32 for number in range(200)]
    homes = {key: pool.choose(key) for key in keys}
    assert {pool.choose(key) is homes[key] for key in keys} == {True}
    assert all(sum(home is endpoint for home in homes.values()) > 20 for endpoint in pool.endpoints)
    dead = pool.endpoints[0]
    pool.failed(dead)
    moved = {key for key in keys if pool.choose(key) is not homes[key]}
    assert moved == {key for key in keys if homes[key] is dead}
    dead.client.serving = False
    for _ in range(3):  # it is looked at, and no request is put at stake for it
        now[0] += 10
        assert all(pool.choose(key) is not dead for key in keys)
        await asyncio.sleep(0.01)
    dead.client.serving = True
    now[0] += 10
    pool.choose(keys[0])
    await asyncio.sleep(0.01)
    assert all(pool.choose(key) is homes[key] for key in keys)


def test_an_overloaded_replica_is_escaped_and_back_off_grows_to_a_bound() -> None:
    now = [0.0]
    pool = replicas(2, now)
    key = b"k" * 32
    home = pool.choose(key)
    home.active = LOAD_FLOOR + 1
    assert pool.choose(key) is not home
    pauses = []
    for _ in range(8):
        pool.failed(home)
        pauses.append(home.down_until - now[0])
    assert pauses == sorted(pauses) and pauses[0] < 1 and pauses[-1] == 5.0
    pool.succeeded(home)
    assert home.down_until == 0.0


def test_the_smallest_numbers_above_0_arrive_as_such() -> None:
    asked = QuestionsRequest(questions=["?"], top_p=5e-324, repetition_penalty=1e-200)
    sent = to_sampling(asked, max_tokens=None, stop=[])
    assert 0 < sent.top_p < 1e-30 and 0 < sent.repetition_penalty < 1e-30


def test_a_public_address_needs_keys() -> None:
    with pytest.raises(ValidationError, match="reachable from outside"):
        GatewaySettings(host="0.0.0.0")
    GatewaySettings(host="0.0.0.0", api_keys=SecretStr(KEY))
    for host in ("127.0.0.1", "localhost", "::1"):
        GatewaySettings(host=host)


def test_a_bad_start_is_one_line_and_a_permanent_status() -> None:
    for arguments, words in (
        (["--host", "0.0.0.0"], "LOOKONCE_GATEWAY_API_KEYS"),
        (["--store", "nowhere://x"], "store"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gateway", *arguments], capture_output=True, text=True, timeout=180
        )
        assert done.returncode in (USAGE_EXIT, PERMANENT_EXIT) and "Traceback" not in done.stderr
        assert words in " ".join(done.stderr.replace("│", " ").split()), done.stderr


def test_bad_keys_are_refused_without_showing_them() -> None:
    for lines, words in ((["a=short"], "shorter than 16"), ([f"a={KEY}", f"b={KEY}2"], "LOOKONCE_GATEWAY_SECRET")):
        with pytest.raises(LookonceError, match=words) as caught:
            Keyring(lines)
        assert 'short"' not in caught.value.message and KEY not in caught.value.message


def test_keys_plain_or_hashed_from_setting_or_file(tmp_path) -> None:
    import hashlib

    path = tmp_path / "keys"
    path.write_text(f"# team\nblue=sha256:{hashlib.sha256(b'the blue key').hexdigest()}\n\n")
    ring = Keyring(read_keys(f"red={KEY}", path), secret="s")
    assert ring.identify(KEY).tenant.name == "red"
    assert ring.identify("the blue key").tenant.name == "blue"
    assert ring.identify(KEY).tenant.digest_key != ring.identify("the blue key").tenant.digest_key
    assert ring.identify(KEY).tenant.embedding_key != ring.identify("the blue key").tenant.embedding_key
    red, blue = ring.identify(KEY).tenant, ring.identify("the blue key").tenant
    known = {red.digest_key, red.embedding_key, blue.digest_key, blue.embedding_key}
    assert len({red.cache_salt, blue.cache_salt} - known) == 2 and len(red.cache_salt) == len(blue.cache_salt) == 32
    open_to_all = Keyring(read_keys(f"red={KEY}", path), secret="s", share_prefixes=True)
    assert open_to_all.identify(KEY).tenant.cache_salt == open_to_all.identify("the blue key").tenant.cache_salt == b""
    assert Keyring([KEY]).identify(KEY).tenant.cache_salt == Keyring([]).identify(None).tenant.cache_salt == b""
    shared = Keyring(read_keys(f"red={KEY}", path), secret="s", share_embeddings=True)
    assert shared.identify(KEY).tenant.embedding_key == shared.identify("the blue key").tenant.embedding_key
    for presented in (None, "", "red", KEY + "x", f"red={KEY}"):
        with pytest.raises(LookonceError) as caught:
            ring.identify(presented)
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED and KEY not in caught.value.message
