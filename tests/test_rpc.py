"""The plumbing between processes, over real sockets: errors keep their kind, deadlines are demanded, TLS is checked."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import subprocess
import sys

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import VisionClient
from lookonce.core.rpc.messages import CHUNK_BYTES, GRPC_CODES, chunks, from_proto, join, to_proto
from lookonce.core.rpc.server import Server, ServerOptions
from lookonce.core.rpc.tls import Tls
from protos.lookonce.v1 import common_pb2, vision_pb2, vision_pb2_grpc


def test_the_grpc_table_is_total():
    assert set(GRPC_CODES) == set(ErrorKind)
    assert grpc.StatusCode.OK not in GRPC_CODES.values()


def test_the_contract_names_the_same_kinds():
    assert {name for name, _ in common_pb2.ErrorKind.items() if name != "ERROR_KIND_UNSPECIFIED"} == {
        k.name for k in ErrorKind
    }


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_an_error_survives_its_message(kind):
    error = from_proto(to_proto(LookonceError(kind, "text", param="field", retry_after=2.5)))
    assert (error.kind, error.message, error.param, error.retry_after) == (kind, "text", "field", 2.5)


class Echo(vision_pb2_grpc.VisionEncoderServicer):
    """Fails as it is told."""

    slow = asyncio.Event()

    async def Encode(self, request, context):
        if request.image == b"caught":  # as calls end that grpc's shutdown catches before they begin
            await context.abort(grpc.StatusCode.CANCELLED, "")
        if request.image == b"slow":
            self.slow.set()
            await asyncio.sleep(60)
        raise NotImplementedError
        yield

    async def Describe(self, request, context):
        raise LookonceError(ErrorKind.FINGERPRINT_MISMATCH, "a is not b", param="fingerprint")

    async def Forget(self, request, context):
        raise RuntimeError("secret /etc/path")

    async def Fetch(self, request, context):
        for piece in chunks(request.key):
            yield piece
        if request.key.startswith(b"fail"):
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, "gone", retry_after=3)


async def serving(tmp_path, tls=None, listen=None, **options):
    server = Server(ServerOptions(listen or f"unix:{tmp_path}/s.sock", tls=tls or Tls(), **options))
    server.add("lookonce.v1.VisionEncoder", lambda s: vision_pb2_grpc.add_VisionEncoderServicer_to_server(Echo(), s))
    address = await server.start()
    await server.set_serving(True)
    return server, address


async def test_errors_cross_with_kind_text_and_param(tmp_path):
    server, address = await serving(tmp_path)
    client = VisionClient(address)
    with pytest.raises(LookonceError) as caught:
        await client.describe()
    assert (caught.value.kind, caught.value.message, caught.value.param) == (
        ErrorKind.FINGERPRINT_MISMATCH,
        "a is not b",
        "fingerprint",
    )
    with pytest.raises(LookonceError) as caught:
        await client.fetch(b"fail")
    assert (caught.value.kind, caught.value.retry_after) == (ErrorKind.EMBEDDING_MISSING, 3)
    await client.close()
    await server.grpc.stop(None)


async def test_foreign_exceptions_never_leak(tmp_path):
    server, address = await serving(tmp_path)
    client = VisionClient(address)
    with pytest.raises(LookonceError) as caught:
        await client.forget()
    assert (caught.value.kind, caught.value.message) == (ErrorKind.INTERNAL, "internal error")
    await client.close()
    await server.grpc.stop(None)


async def test_a_call_without_deadline_is_refused_but_health_is_not(tmp_path):
    server, address = await serving(tmp_path)
    client = VisionClient(address)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.Describe(common_pb2.DescribeRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await client.healthy()
    await client.close()
    await server.grpc.stop(None)


async def test_an_unreachable_service_is_unavailable_with_retry_after(tmp_path):
    client = VisionClient(f"unix:{tmp_path}/nobody.sock")
    with pytest.raises(LookonceError) as caught:
        await client.describe(timeout=60)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert caught.value.retry_after
    await client.close()


async def test_a_method_the_server_lacks_is_internal_not_a_crash(tmp_path):
    server, address = await serving(tmp_path)
    client = VisionClient(address)
    with pytest.raises(LookonceError) as caught:
        await client.encode(vision_pb2.EncodeRequest(image=b"x"))
    assert caught.value.kind is ErrorKind.INTERNAL
    await client.close()
    await server.grpc.stop(None)


async def test_a_cancelled_that_nobody_here_asked_for_is_unavailable(tmp_path):
    server, address = await serving(tmp_path)
    client = VisionClient(address)
    with pytest.raises(LookonceError) as caught:
        await client.encode(vision_pb2.EncodeRequest(image=b"caught"))
    assert (caught.value.kind, bool(caught.value.retry_after)) == (ErrorKind.UNAVAILABLE, True)
    await client.close()
    await server.grpc.stop(None)


async def test_what_a_shutdown_cuts_off_is_unavailable_not_cancelled(tmp_path):
    server, address = await serving(tmp_path, grace=0.2, linger=0.0)
    client = VisionClient(address)
    cut = asyncio.create_task(client.encode(vision_pb2.EncodeRequest(image=b"slow")))
    await Echo.slow.wait()
    server.stop()
    await server.wait()
    with pytest.raises(LookonceError) as caught:
        await cut
    assert (caught.value.kind, bool(caught.value.retry_after)) == (ErrorKind.UNAVAILABLE, True)
    await client.close()


async def test_a_server_that_drains_says_so_before_it_refuses_anything(tmp_path):
    server, address = await serving(tmp_path, linger=2.0)
    client = VisionClient(address)
    draining = asyncio.create_task(server.wait())
    server.stop()
    for _ in range(100):
        if not await client.healthy():
            break
        await asyncio.sleep(0.01)
    assert not await client.healthy()
    assert await client.fetch(b"taken still") == b"taken still"
    await draining
    await client.close()


async def test_a_port_in_use_is_said_plainly(tmp_path):
    server, address = await serving(tmp_path, listen="127.0.0.1:0")
    with pytest.raises(LookonceError, match="address in use"):
        await serving(tmp_path, listen=address)
    await server.grpc.stop(None)


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1", "127.0.0.1:http", ":50051"])
async def test_an_address_that_is_none_is_refused(tmp_path, listen):
    with pytest.raises(LookonceError, match="listen must be host:port"):
        await serving(tmp_path, listen=listen)


@given(st.binary(max_size=3 * CHUNK_BYTES // 1000).map(lambda data: data * 1000).filter(len))
def test_chunks_join_to_the_same_bytes(data):
    async def pieces():
        for piece in chunks(data):
            yield piece

    assert asyncio.run(join(pieces(), max_bytes=len(data))) == data


@pytest.mark.parametrize("fault", ["gap", "short", "long", "nothing"])
async def test_broken_chunk_streams_are_refused(fault):
    data = bytes(2 * CHUNK_BYTES + 5)

    async def pieces():
        for i, piece in enumerate(chunks(data)):
            if fault == "nothing" or (fault == "gap" and i == 1) or (fault == "short" and i == 2):
                continue
            yield piece
            if fault == "long" and i == 2:
                yield piece

    with pytest.raises(LookonceError) as caught:
        await join(pieces(), max_bytes=len(data))
    assert caught.value.kind is ErrorKind.EMBEDDING_INVALID


def make_certificates(folder):
    """A CA, and a server and a client certificate signed by it."""
    now = datetime.datetime.now(datetime.UTC)

    def build(name, issuer, issuer_key, key, ca):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    ca_key = ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.pem").write_bytes(
        build(named("ca"), named("ca"), ca_key, ca_key, True).public_bytes(serialization.Encoding.PEM)
    )
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = build(named(who), named("ca"), ca_key, key, False)
        (folder / f"{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{who}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


async def test_mutual_tls_admits_only_known_clients(tmp_path):
    make_certificates(tmp_path)
    tls = Tls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    server, address = await serving(tmp_path, tls, "127.0.0.1:0")
    known = VisionClient(address, tls=Tls(tmp_path / "client.pem", tmp_path / "client.key", tmp_path / "ca.pem"))
    stranger = VisionClient(address, tls=Tls(ca=tmp_path / "ca.pem"))
    plain = VisionClient(address)
    assert await known.healthy(60)
    assert not await stranger.healthy(2)
    assert not await plain.healthy(2)
    for client in (known, stranger, plain):
        await client.close()
    await server.grpc.stop(None)


def test_stubs_are_what_protos_generate():
    done = subprocess.run([sys.executable, "scripts/protos.py", "--check"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
