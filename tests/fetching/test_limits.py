"""Servers that mean harm: endless, slow, lying, compressed, broken. The fetch ends, and says why in our words."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from dataclasses import replace

import pytest

from lookonce.core.errors import ErrorKind
from lookonce.core.http_fetch.fetcher import Wanted
from lookonce.core.http_fetch.target import FetchError, Reason
from tests.fetching.servers import PNG, ImageServer, Names, answer, redirect
from tests.fetching.test_fetching import refused
from tests.ports import free_port

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"


class Endless:
    """Sends a start and then the same piece for ever; counts its bytes."""

    def __init__(self, start: bytes, piece: bytes = b"x" * 65536, pause: float = 0.0) -> None:
        self.start, self.piece, self.pause = start, piece, pause
        self.sent = 0
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def __call__(self, connection: socket.socket) -> None:
        connection.sendall(self.start)
        while not self._stop.wait(self.pause):
            connection.sendall(self.piece)
            self.sent += len(self.piece)


ENDLESS = {
    "until closed": HEAD + b"\r\n",
    "chunks": HEAD + b"transfer-encoding: chunked\r\n\r\n",
    "a length of an exabyte": HEAD + b"content-length: 1000000000000000000\r\n\r\n",
}


@pytest.mark.parametrize("start", ENDLESS.values(), ids=ENDLESS)
async def test_endless_bodies_end_at_the_limit(start, make_fetcher):
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n" if b"chunked" in start else b"x" * 65536
    endless = Endless(start, piece)
    with ImageServer({"/a": endless}) as server:
        error = await refused(make_fetcher(server), f"{server.url}/a", 1 << 20)
    assert (error.reason, error.kind) == (Reason.TOO_LARGE, ErrorKind.IMAGE_TOO_LARGE)
    assert error.message == "the image at 'url' has more than 1.0 MiB"
    assert endless.sent < 32 << 20  # what sockets buffer


ENDLESS_HEADS = {
    "header": b"HTTP/1.1 200 OK\r\nx: ",
    "headers": b"HTTP/1.1 200 OK\r\n",
    "interim answers": b"",
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "status": b"HTTP/1.1 ",
}


@pytest.mark.parametrize("kind", ENDLESS_HEADS)
async def test_endless_heads_end(kind, make_fetcher):
    pieces = {"headers": b"a: b\r\n" * 999, "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 99}
    with ImageServer({"/a": Endless(ENDLESS_HEADS[kind], pieces.get(kind, b"x" * 999))}) as server:
        error = await refused(make_fetcher(server, timeout=2.0), f"{server.url}/a")
    assert error.reason in (Reason.BROKEN, Reason.TIMEOUT)


@pytest.mark.parametrize("start", [b"", HEAD, HEAD + b"content-length: 99\r\n\r\n"], ids=["first", "head", "body"])
async def test_a_server_that_drips_runs_out_of_time(start, make_fetcher):
    with ImageServer({"/a": Endless(start, b"H" if not start else b"x", pause=0.02)}) as server:
        error = await refused(make_fetcher(server, timeout=0.7), f"{server.url}/a")
    assert error.reason in (Reason.TIMEOUT, Reason.BROKEN)
    assert (error.reason is Reason.TIMEOUT) or not start


@pytest.mark.parametrize("start", [b"", HEAD, HEAD + b"content-length: 99\r\n\r\nx"], ids=["first", "head", "body"])
async def test_a_silent_server_runs_out_of_patience(start, make_fetcher):
    with ImageServer({"/a": Endless(start, b"", pause=15)}) as server:
        error = await refused(make_fetcher(server, read_timeout=0.3), f"{server.url}/a")
    assert (error.reason, error.message) == (Reason.TIMEOUT, "the server of 'url' took too long")


async def test_a_server_that_never_shakes_hands(make_fetcher):
    with ImageServer({}) as server:
        error = await refused(make_fetcher(server, connect_timeout=0.3), f"https://127.0.0.1:{server.port}/a")
    assert error.reason in (Reason.TIMEOUT, Reason.UNREACHABLE)


async def test_a_slow_name_server(make_fetcher):
    release = threading.Event()

    def slow(host, port):
        release.wait(20)
        return ["127.0.0.1"]

    error = await refused(make_fetcher(names=slow, ports=frozenset({80}), connect_timeout=0.2), "http://slow.example/")
    release.set()
    assert error.reason is Reason.UNRESOLVED


async def test_time_runs_over_redirects_too(make_fetcher):
    def late(connection):
        threading.Event().wait(0.4)
        connection.sendall(redirect("/late"))

    with ImageServer({"/late": late}) as server:
        error = await refused(make_fetcher(server, timeout=1.0, max_redirects=10), f"{server.url}/late")
    assert error.reason is Reason.TIMEOUT and len(server.requests) < 8


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (HEAD + b"content-length: 99999\r\n\r\nshort", Reason.BROKEN),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nff\r\nshort", Reason.BROKEN),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n", Reason.BROKEN),
        (HEAD + b"content-length: -5\r\n\r\nx", Reason.BROKEN),
        (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nxxxxxx", Reason.BROKEN),
        (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", Reason.BROKEN),
        (b"", Reason.BROKEN),
        (b"\r\n\r\n", Reason.BROKEN),
        (b"HTTP/9 200 OK\r\n\r\n", Reason.BROKEN),
        (b"not http at all\r\n\r\n", Reason.BROKEN),
        (b"\x16\x03\x01\x02\x00\x01", Reason.BROKEN),
        (HEAD + b"bad header\r\n\r\nx", Reason.BROKEN),
        (HEAD + b"content-length: 0\r\n\r\n", Reason.EMPTY),
        (answer(content_encoding="gzip"), Reason.ENCODED),
        (answer(gzip.compress(bytes(1 << 22)), content_encoding="GZip"), Reason.ENCODED),
        (answer(content_encoding="identity, br"), Reason.ENCODED),
        (answer(content_encoding="zstd"), Reason.ENCODED),
        (answer(content_type="text/html"), Reason.NOT_AN_IMAGE),
        (answer(content_type="application/json"), Reason.NOT_AN_IMAGE),
        *((answer(status=f"{status} Whatever"), Reason.STATUS) for status in (201, 206, 400, 401, 403, 404, 500, 503)),
        (b"HTTP/1.1 204 None\r\n\r\n", Reason.STATUS),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", Reason.BROKEN),
        (answer(status="300 Many"), Reason.STATUS),
        (b"HTTP/1.1 304 Same\r\n\r\n", Reason.STATUS),
        (answer(b"", "302 Found"), Reason.MALFORMED),
        (redirect("/a\r\nlocation: /b"), Reason.MALFORMED),
    ],
)  # fmt: skip
async def test_answers_that_are_no_image(raw, reason, make_fetcher):
    with ImageServer({"/a": raw}) as server:
        error = await refused(make_fetcher(server, read_timeout=5.0), f"{server.url}/a")
    assert error.reason is reason
    assert (error.kind, error.code) == (ErrorKind.INVALID_ARGUMENT, "invalid_image_url")


async def test_a_length_over_the_limit_is_refused_before_the_body(make_fetcher):
    start = HEAD + b"content-length: 1001\r\n\r\n"
    with ImageServer({"/a": Endless(start, b"", pause=20)}) as server:
        assert (await refused(make_fetcher(server), f"{server.url}/a", 1000)).reason is Reason.TOO_LARGE


async def test_more_than_was_announced_is_not_read(make_fetcher):
    with ImageServer({"/a": answer(b"12345678", content_length="4")}) as server:
        assert await make_fetcher(server).fetch(f"{server.url}/a", param="url", max_bytes=4) == b"1234"


@pytest.mark.parametrize("declared", ["", None])
async def test_one_byte_over_the_limit(declared, make_fetcher):
    head = {} if declared is None else {"content_length": declared}
    with ImageServer({"/a": answer(**head)}) as server:
        assert await make_fetcher(server).fetch(f"{server.url}/a", param="url", max_bytes=len(PNG)) == PNG
        assert (await refused(make_fetcher(server), f"{server.url}/a", len(PNG) - 1)).reason is Reason.TOO_LARGE


async def test_files_of_one_request_share_their_bytes(make_fetcher):
    with ImageServer({f"/{n}": answer(b"x" * 400) for n in range(3)}) as server:
        wanted = [Wanted(f"{server.url}/{n}", f"p{n}") for n in range(3)]
        assert len(await make_fetcher(server).fetch_all(wanted, max_bytes=400, total_bytes=1200)) == 3
        with pytest.raises(FetchError) as caught:
            await make_fetcher(server).fetch_all(wanted, max_bytes=400, total_bytes=1199)
    assert caught.value.reason is Reason.TOO_LARGE


async def test_nobody_listens(make_fetcher):
    port = free_port()
    error = await refused(make_fetcher(ports=frozenset({port})), f"http://127.0.0.1:{port}/")
    assert (error.reason, error.message) == (Reason.UNREACHABLE, "the host of 'url' could not be reached")


async def test_the_first_failure_ends_the_other_fetches(make_fetcher):
    with ImageServer({"/hangs": Endless(HEAD, b"", pause=20)}) as server:
        wanted = [Wanted(f"{server.url}/hangs", "first"), Wanted(f"{server.url}/missing", "second")]
        with pytest.raises(FetchError) as caught:
            await make_fetcher(server, timeout=60, read_timeout=60).fetch_all(wanted, max_bytes=9, total_bytes=99)
    assert (caught.value.param, caught.value.reason) == ("second", Reason.STATUS)


async def test_a_full_house_turns_away(make_fetcher):
    with ImageServer({"/hangs": Endless(HEAD, b"", pause=20)}) as server:
        fetcher = make_fetcher(server, timeout=60, read_timeout=60, concurrency=1)
        first = asyncio.create_task(fetcher.fetch(f"{server.url}/hangs", param="url", max_bytes=9))
        await asyncio.to_thread(server.asked.wait, 60)
        fetcher._policy = replace(fetcher._policy, timeout=0.3)  # so that the first outlasts those that wait for it
        others = [fetcher.fetch(f"{server.url}/hangs", param="url", max_bytes=9) for _ in range(2)]
        errors = await asyncio.gather(*others, return_exceptions=True)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert {(error.reason, error.kind) for error in errors} == {(Reason.BUSY, ErrorKind.OVERLOADED)}
    assert server.connections == 1


async def test_a_fetch_that_is_given_up_frees_its_place(make_fetcher):
    with ImageServer({"/hangs": Endless(HEAD, b"", pause=20), "/a.png": answer()}) as server:
        fetcher = make_fetcher(server, concurrency=1)
        task = asyncio.create_task(fetcher.fetch(f"{server.url}/hangs", param="url", max_bytes=9))
        await asyncio.to_thread(server.asked.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await fetcher.fetch(f"{server.url}/a.png", param="url", max_bytes=1000) == PNG


async def test_one_owner_gets_no_more_than_its_share(make_fetcher):
    hanging = Endless(HEAD, b"", pause=20)
    with ImageServer({"/hangs": hanging, "/a.png": answer()}) as server:
        fetcher = make_fetcher(server, concurrency=2, per_owner=1)
        greedy = [
            asyncio.create_task(fetcher.fetch(f"{server.url}/hangs", param="url", max_bytes=9, owner="red"))
            for _ in range(5)
        ]
        await asyncio.to_thread(server.asked.wait, 20)
        for _ in range(3):
            other = fetcher.fetch(f"{server.url}/a.png", param="url", max_bytes=1000, owner="blue")
            assert await other == PNG
        assert server.most_at_once == 2
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)


async def test_failures_free_their_place(make_fetcher):
    with ImageServer() as server:
        fetcher = make_fetcher(server, concurrency=1, names=Names())
        for path in ("missing", "a.png", "missing"):
            await asyncio.gather(
                fetcher.fetch(f"{server.url}/{path}", param="url", max_bytes=99), return_exceptions=True
            )
        assert await fetcher.fetch(f"{server.url}/a.png", param="url", max_bytes=99) == PNG
