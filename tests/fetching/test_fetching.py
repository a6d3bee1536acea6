"""Fetching from real servers on loopback, named and secured as on the internet."""

from __future__ import annotations

import asyncio
import ssl
import threading

import pytest

import lookonce
from lookonce.core.http_fetch.fetcher import Fetcher, Wanted
from lookonce.core.http_fetch.target import FetchError, Reason
from tests.fetching.conftest import local_policy
from tests.fetching.servers import PNG, ImageServer, Names, answer, make_certificates, redirect

HERE = Names({"images.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]})


async def refused(fetcher, url, max_bytes=1 << 20):
    with pytest.raises(FetchError) as caught:
        await fetcher.fetch(url, param="url", max_bytes=max_bytes)
    assert caught.value.param == "url"
    for leak in ("127.0.0.1", "Errno", "Error", "httpcore", "certificate", "ssl"):
        assert leak not in caught.value.message
    return caught.value


async def test_the_request_says_no_more_than_it_must(server, make_fetcher):
    fetcher = make_fetcher(server, names=HERE)
    url = f"http://Images.EXAMPLE:{server.port}/a.png?size=2&x=%20#part"
    assert await fetcher.fetch(url, param="url", max_bytes=len(PNG)) == PNG
    assert server.requests[0].target == "/a.png?size=2&x=%20"
    assert server.requests[0].headers == {
        "host": f"images.example:{server.port}",
        "user-agent": f"lookonce/{lookonce.__version__}",
        "accept": "image/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


async def test_https_verifies_the_name_at_the_checked_address(certificates, make_fetcher):
    with ImageServer(certificates=certificates) as server:
        fetcher = make_fetcher(server, names=HERE)
        url = f"https://images.example:{server.port}/a.png"
        assert await fetcher.fetch(url, param="url", max_bytes=1000) == PNG
        assert server.server_names == ["images.example"]
        assert server.requests[0].headers["host"] == f"images.example:{server.port}"


async def test_https_to_an_address_verifies_the_address(certificates, make_fetcher):
    with ImageServer(certificates=certificates) as server:
        assert await make_fetcher(server).fetch(f"{server.url}/a.png", param="url", max_bytes=1000) == PNG


async def test_a_certificate_of_another_name_is_refused(certificates, make_fetcher):
    with ImageServer(certificates=certificates) as server:
        error = await refused(make_fetcher(server, names=HERE), f"https://other.example:{server.port}/a.png")
        assert error.reason is Reason.UNREACHABLE and server.requests == []


async def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path, make_fetcher):
    with ImageServer(certificates=make_certificates(tmp_path, "images.example")) as server:
        error = await refused(make_fetcher(server, names=HERE), f"https://images.example:{server.port}/a.png")
        assert error.reason is Reason.UNREACHABLE and server.requests == []


async def test_the_operator_s_roots_are_trusted(tmp_path):
    certificates = make_certificates(tmp_path, "images.example")
    with ImageServer(certificates=certificates) as server:
        fetcher = Fetcher(local_policy(server, ca=certificates.ca), look_up=HERE)
        assert await fetcher.fetch(f"https://images.example:{server.port}/a.png", param="url", max_bytes=1000) == PNG
        fetcher.close()


async def test_old_tls_is_refused(roots):
    assert roots.verify_mode is ssl.CERT_REQUIRED and roots.check_hostname
    assert roots.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_ipv6(make_fetcher):
    with ImageServer(host="::1") as server:
        fetcher = make_fetcher(server, names=Names({"six.example": [["::1"]]}))
        assert await fetcher.fetch(f"{server.url}/a.png", param="url", max_bytes=1000) == PNG
        assert await fetcher.fetch(f"http://six.example:{server.port}/a.png", param="url", max_bytes=1000) == PNG
        assert [seen.headers["host"] for seen in server.requests] == [
            f"[::1]:{server.port}",
            f"six.example:{server.port}",
        ]


async def test_the_next_address_is_tried_when_one_does_not_answer(server, make_fetcher):
    names = Names({"many.example": [["127.0.0.9", "::1", "127.0.0.1"]]})
    fetcher = make_fetcher(server, names=names)
    assert await fetcher.fetch(f"http://many.example:{server.port}/a.png", param="url", max_bytes=1000) == PNG


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status, make_fetcher):
    routes = {
        "/start": redirect("/two?x=1", status, set_cookie="session=1; path=/"),
        "/two": redirect("three#part", status),
        "/three": redirect("//other.example:{port}/a.png", status),
        "/a.png": answer(),
    }
    with ImageServer(routes) as server:
        routes["/three"] = redirect(f"//other.example:{server.port}/a.png", status)
        fetcher = make_fetcher(server, names=HERE)
        url = f"http://images.example:{server.port}/start"
        assert await fetcher.fetch(url, param="url", max_bytes=1000) == PNG
        assert server.targets == ["/start", "/two?x=1", "/three", "/a.png"]
        assert server.requests[3].headers["host"] == f"other.example:{server.port}"
        for seen in server.requests:
            assert not {"cookie", "referer", "authorization"} & set(seen.headers)


async def test_redirects_are_bounded(make_fetcher):
    with ImageServer({"/loop": redirect("/loop")}) as server:
        error = await refused(make_fetcher(server), f"{server.url}/loop")
        assert (error.reason, len(server.requests)) == (Reason.REDIRECTS, 4)
        assert (await refused(make_fetcher(server, max_redirects=0), f"{server.url}/loop")).reason is Reason.REDIRECTS
        assert len(server.requests) == 5


async def test_a_redirect_from_https_to_http_is_refused(certificates, server, make_fetcher):
    with ImageServer({"/go": redirect(f"{server.url}/a.png")}, certificates=certificates) as secure:
        error = await refused(make_fetcher(server, secure), f"{secure.url}/go")
    assert error.reason is Reason.DOWNGRADE and server.connections == 0


async def test_a_redirect_from_http_to_https_is_followed(certificates, make_fetcher):
    with (
        ImageServer(certificates=certificates) as secure,
        ImageServer({"/go": redirect(f"https://images.example:{secure.port}/a.png")}) as plain,
    ):
        fetcher = make_fetcher(secure, plain, names=HERE)
        assert await fetcher.fetch(f"{plain.url}/go", param="url", max_bytes=1000) == PNG


async def test_the_allowlist_holds_for_every_hop(server, make_fetcher):
    server.routes["/go"] = redirect(f"http://other.example:{server.port}/a.png")
    hosts = frozenset({"images.example", ".cdn.example"})
    fetcher = make_fetcher(server, names=HERE, mode="allowlist", hosts=hosts)
    assert await fetcher.fetch(f"http://images.example:{server.port}/a.png", param="url", max_bytes=1000) == PNG
    for host in ("other.example", "cdn.example", "evilcdn.example", "images.example.evil", "127.0.0.1"):
        error = await refused(fetcher, f"http://{host}:{server.port}/a.png")
        assert error.reason is Reason.HOST_NOT_ALLOWED
    assert (await refused(fetcher, f"http://images.example:{server.port}/go")).reason is Reason.HOST_NOT_ALLOWED
    assert (await refused(fetcher, f"http://a.cdn.example:{server.port}/")).reason is Reason.UNRESOLVED
    assert server.targets == ["/a.png", "/go"]


async def test_off_is_off(server, make_fetcher):
    error = await refused(make_fetcher(server, mode="off"), f"{server.url}/a.png")
    assert error.reason is Reason.OFF and server.connections == 0


@pytest.mark.parametrize(
    "head",
    [
        {"content_type": ""}, {"content_type": "IMAGE/JPEG; x=y"}, {"content_type": "application/octet-stream"},
        {"content_encoding": "identity"}, {"content_length": ""}, {"x": "y" * 8000},
    ],
)  # fmt: skip
async def test_heads_that_are_taken(head, make_fetcher):
    with ImageServer({"/a": answer(**head)}) as server:
        assert await make_fetcher(server).fetch(f"{server.url}/a", param="url", max_bytes=1000) == PNG


async def test_chunked_bodies(make_fetcher):
    body = (
        b"".join(b"%x\r\n%s\r\n" % (len(PNG[i : i + 9]), PNG[i : i + 9]) for i in range(0, len(PNG), 9)) + b"0\r\n\r\n"
    )
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n" + body
    with ImageServer({"/a": raw}) as server:
        assert await make_fetcher(server).fetch(f"{server.url}/a", param="url", max_bytes=len(PNG)) == PNG
        assert (await refused(make_fetcher(server), f"{server.url}/a", len(PNG) - 1)).reason is Reason.TOO_LARGE


async def test_a_path_outside_ascii_is_encoded(server, make_fetcher):
    server.routes["/%C3%A9%E2%82%AC.png"] = answer()
    assert await make_fetcher(server).fetch(f"{server.url}/é€.png", param="url", max_bytes=1000) == PNG


async def test_many_files_come_in_order_and_equal_urls_once(make_fetcher):
    with ImageServer({f"/{n}": answer(b"%d" % n) for n in range(6)}) as server:
        wanted = [Wanted(f"{server.url}/{n}", f"p{n}") for n in (3, 0, 3, 5, 1, 3)]
        files = await make_fetcher(server).fetch_all(wanted, max_bytes=9, total_bytes=99)
        assert files == [b"3", b"0", b"3", b"5", b"1", b"3"]
        assert sorted(server.targets) == ["/0", "/1", "/3", "/5"]


async def test_fetches_run_together_but_bounded(make_fetcher):
    both = asyncio.Event()
    loop = asyncio.get_running_loop()
    lock, under_way, seen = threading.Lock(), 0, []

    def wait_for_another(connection):
        nonlocal under_way
        with lock:
            under_way += 1
            seen.append(under_way)
        if max(seen) >= 2:
            loop.call_soon_threadsafe(both.set)
        asyncio.run_coroutine_threadsafe(both.wait(), loop).result(20)
        with lock:  # before the answer: the next request may come as soon as it is read
            under_way -= 1
        connection.sendall(answer())

    with ImageServer({f"/{n}": wait_for_another for n in range(8)}) as server:
        wanted = [Wanted(f"{server.url}/{n}", "url") for n in range(8)]
        await make_fetcher(server, per_request=2).fetch_all(wanted, max_bytes=1000, total_bytes=10000)
    assert max(seen) == 2
