"""Gets from Redis over connections of their own: sizes, sharing, and servers that answer oddly or slowly."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from lookonce.core.stores import open_store
from tests.valkey import PATIENT, ValkeyServer

KEY = bytes(32)


@asynccontextmanager
async def scripted(*replies, pause=0.0, timeout=PATIENT, ended=None):
    """URL of a server that answers each command with the next of `replies`, in pieces `pause` seconds apart; b"" in
    place of a reply drops the connection. The last one is given again and again. Sets `ended` with the end of a
    connection."""
    left, tasks = list(replies), set()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            while await reader.read(1 << 16):
                reply = left.pop(0) if len(left) > 1 else left[0]
                for piece in [reply] if isinstance(reply, bytes) else reply:
                    if not piece:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
        finally:
            writer.close()
            if ended is not None:
                ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}?{timeout}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def opened(url):
    """A store that waits long for its server, unless the URL says otherwise."""
    store = open_store(url if "timeout" in url else f"{url}{'&' if '?' in url else '?'}{PATIENT}")
    try:
        yield store
    finally:
        await store.close()


def errors(store):
    return store.stats()[0].errors


async def test_values_around_the_size_of_a_first_read(valkey):
    async with opened(valkey.url) as store:
        for size in (0, 1, 500, 504, 505, 506, 507, 508, 512, 1024, 65_536, 3_000_000):
            value = os.urandom(size)
            await store.put(KEY, value)
            assert await store.get(KEY) == value, size


async def test_many_gets_of_several_sizes_do_not_mix(valkey):
    values = {bytes([n]) * 32: os.urandom(n * 20_011) for n in range(40)}
    async with opened(valkey.url + "?max_connections=4") as store:
        for key, value in values.items():
            await store.put(key, value)
        found = await asyncio.gather(*(store.get(key) for key in [*values, *values]))
    assert found == [*values.values(), *values.values()]


async def test_a_get_given_up_half_way_does_not_spoil_the_next(valkey):
    large, small = os.urandom(30_000_000), b"small"
    async with opened(valkey.url + "?max_connections=1") as store:
        await store.put(KEY, large)
        await store.put(b"small", small)
        for turns in range(12):
            task = asyncio.ensure_future(store.get(KEY))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await store.get(b"small") == small
        assert await store.get(KEY) == large
        assert errors(store) == 0


async def test_a_restart_between_two_gets_goes_unnoticed(own_valkey):
    async with opened(own_valkey.url) as store:
        await store.put(KEY, b"value")
        await asyncio.gather(*(store.get(KEY) for _ in range(8)))
        own_valkey.restart()
        await store.put(KEY, b"again")
        assert await asyncio.gather(*(store.get(KEY) for _ in range(8))) == [b"again"] * 8
        assert errors(store) == 0


async def test_the_database_of_the_url_is_read(valkey):
    for url in (f"{valkey.url}/3", f"{valkey.url}?db=3"):
        async with opened(url) as store, opened(valkey.url) as other:
            await store.put(b"in three", b"value")
            assert await store.get(b"in three") == b"value"
            assert await other.get(b"in three") is None


async def test_a_password_without_a_user():
    with ValkeyServer(requirepass="secret") as server:
        address = f"127.0.0.1:{server.port}"
        async with opened(f"redis://:secret@{address}") as store:
            await store.put(KEY, b"value")
            assert await store.get(KEY) == b"value"
        for wrong in (f"redis://:wrong@{address}", f"redis://{address}"):
            async with opened(wrong) as store:
                assert await store.get(KEY) is None
                assert errors(store) == 1


async def test_the_log_names_what_a_server_refuses_with_and_no_more():
    denied = b"-DENIED Valkey is running in protected mode. " + b"Do this or that. " * 60 + b"\r\n"
    with ValkeyServer(requirepass="secret", maxmemory="1", maxmemory_policy="noeviction") as server:
        with server.client(password="secret") as admin:
            admin.execute_command("ACL", "SETUSER", "anna", "on", ">pw", "~mine:*", "+@all")
        async with scripted(denied) as protected:
            causes = {
                protected: ("ResponseError: DENIED", None),
                f"redis://127.0.0.1:{server.port}": ("ResponseError: NOAUTH", "AuthenticationError: NOAUTH"),
                f"redis://:wrong@127.0.0.1:{server.port}": (
                    "ResponseError: WRONGPASS",
                    "AuthenticationError: WRONGPASS",
                ),
                f"redis://anna:pw@127.0.0.1:{server.port}": ("ResponseError: NOPERM", "NoPermissionError: NOPERM"),
                f"redis://:secret@127.0.0.1:{server.port}": (None, "OutOfMemoryError: OOM"),
            }
            for url, (get, put) in causes.items():
                with capture_logs() as lines:
                    async with opened(url) as store:
                        await store.get(KEY)
                        if put is not None:
                            await store.put(KEY, b"value")
                assert [line["cause"] for line in lines] == [cause for cause in (get, put) if cause is not None], lines
                assert "anna" not in str(lines) and "secret" not in str(lines)


async def test_closing_drops_connections_and_gets_under_way():
    with ValkeyServer() as server:
        store = open_store(f"{server.url}?{PATIENT}")
        await store.put(KEY, bytes(5_000_000))
        await asyncio.gather(*(store.get(KEY) for _ in range(10)))
        under_way = [asyncio.ensure_future(store.get(KEY)) for _ in range(10)]
        await asyncio.sleep(0)
        await store.close()
        assert await asyncio.gather(*under_way) == [None] * 10
        with server.client() as client:
            async with asyncio.timeout(60):
                while len(client.client_list()) > 1:  # noqa: ASYNC110  # the server notices a moment later
                    await asyncio.sleep(0.02)


async def test_a_value_over_the_limit_is_a_miss_and_not_a_failure(valkey, capsys):
    async with opened(valkey.url) as writer, opened(valkey.url + "?max_value_bytes=1KiB") as store:
        await writer.put(b"large", bytes(1025))
        await writer.put(b"fits", bytes(1024))
        assert await store.get(b"large") is None
        assert await store.get(b"fits") == bytes(1024)
        assert errors(store) == 0
    assert "over max_value_bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reply",
    [
        b"-LOADING the dataset is loading\r\n",
        b"-" + b"x" * 600 + b"\r\n",
        b"$5x\r\nvalue\r\n",
        b"$-7\r\n",
        b"$\r\n",
        b"*1\r\n$5\r\nvalue\r\n",
        b"$5\r\nvalue\r\n$5\r\nother\r\n",
        b"$5\r\nvalue!!",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        [b"$5\r\nval", b""],
        b"",
    ],
)
async def test_an_odd_answer_is_a_failure_and_the_next_question_gets_its_own_answer(reply):
    async with scripted(reply, b"$6\r\nproper\r\n") as url, opened(url) as store:
        assert await store.get(KEY) is None
        assert errors(store) == 1
        assert await store.get(KEY) == b"proper"
        assert not store.is_open


async def test_an_answer_in_small_pieces_is_whole():
    reply = b"$700\r\n" + bytes(range(100)) * 7 + b"\r\n"
    pieces = [reply[at : at + 7] for at in range(0, len(reply), 7)]
    async with scripted(pieces) as url, opened(url) as store:
        assert await store.get(KEY) == bytes(range(100)) * 7


async def test_a_value_that_keeps_coming_is_waited_for_and_one_that_stops_is_not():
    timeout = "connect_timeout=60s&socket_timeout={}s&operation_timeout=60s"
    pieces = [b"$10\r\n", *(b"%d" % n for n in range(10)), b"\r\n"]
    async with scripted(pieces, pause=0.12, timeout=timeout.format(1)) as url, opened(url) as store:
        assert await store.get(KEY) == b"0123456789", "longer in all than the time between two arrivals may be"
    async with scripted(pieces, pause=3600, timeout=timeout.format(0.3)) as url, opened(url) as store:
        assert await store.get(KEY) is None
        assert errors(store) == 1


async def test_what_nobody_asked_for_ends_the_connection():
    late, ended = [b"$5\r\nvalue\r\n", b"$5\r\nbogus\r\n"], asyncio.Event()
    async with scripted(late, b"$6\r\nproper\r\n", pause=0.05, ended=ended) as url, opened(url) as store:
        assert await store.get(KEY) == b"value"
        async with asyncio.timeout(60):
            await ended.wait()
        assert await store.get(KEY) == b"proper"
        assert errors(store) == 0
