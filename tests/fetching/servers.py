"""Servers on loopback for tests: canaries that count connections, and image servers that behave as they are told."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
Behaviour = Callable[[socket.socket], None]


def answer(body: bytes = PNG, status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP answer; headers with _ for -."""
    lines = {"content-type": "image/png", "content-length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(location: str, status: int = 302, **headers: str) -> bytes:
    return answer(b"", f"{status} Found", location=location, **headers)


@dataclass
class Seen:
    """A request as the server got it."""

    target: str
    headers: dict[str, str]


class LoopbackServer:
    """Accepts on a free port of `host` in threads; what it does with a connection is `handle`."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, 0), family=family, backlog=128, dualstack_ipv6=host == "::")
        self.host = host
        self.port: int = self.socket.getsockname()[1]
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def handle(self, connection: socket.socket) -> None:
        """Nothing: the connection is closed."""

    def stop(self) -> None:
        """End what `handle` is doing."""

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(120)
            self.handle(connection)
        self._open.discard(connection)

    def __enter__(self):
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.stop()
        self._accepting.join(60)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)


class Canary(LoopbackServer):
    """On every address of the machine; nobody should ever connect."""

    def __init__(self) -> None:
        super().__init__("::")


@dataclass
class Certificates:
    """A private authority, and a server certificate of the names it signed."""

    ca: Path
    chain: Path
    key: Path


class ImageServer(LoopbackServer):
    """HTTP/1.1 by the book of `routes`: path to a whole answer, or to what to do with the socket after the request."""

    def __init__(
        self,
        routes: dict[str, bytes | Behaviour] | None = None,
        *,
        host: str = "127.0.0.1",
        certificates: Certificates | None = None,
    ) -> None:
        super().__init__(host)
        self.routes = routes if routes is not None else {"/a.png": answer()}
        self.requests: list[Seen] = []
        self.server_names: list[str | None] = []
        self.at_once = 0
        self.most_at_once = 0
        self.asked = threading.Event()
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        if certificates is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificates.chain, certificates.key)
            self._tls.sni_callback = lambda _socket, name, _context: self.server_names.append(name)

    def stop(self) -> None:
        for route in self.routes.values():
            if hasattr(route, "stop"):
                route.stop()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    @property
    def targets(self) -> list[str]:
        return [seen.target for seen in self.requests]

    def handle(self, connection: socket.socket) -> None:
        if self._tls is None:
            self._one(connection)
            return
        with self._tls.wrap_socket(connection, server_side=True) as secure:
            self._one(secure)

    def _one(self, connection: socket.socket) -> None:
        raw = b""
        while b"\r\n\r\n" not in raw:
            piece = connection.recv(65536)
            if not piece:
                return
            raw += piece
        first, *lines = raw.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        with self._lock:
            self.requests.append(Seen(first.split(" ")[1], {name.lower(): value for name, value in headers.items()}))
            self.asked.set()
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            route = self.routes.get(first.split(" ")[1].partition("?")[0], answer(b"no", "404 Not Found"))
            if callable(route):
                route(connection)
        finally:
            with self._lock:
                self.at_once -= 1
        if not callable(route):  # only now: who has the answer may ask again at once
            connection.sendall(route)


@dataclass
class Names:
    """A name server: names and their addresses, a list for each look-up in turn (the last one stays)."""

    table: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.table.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name in the canary zone 10.9.8.7")
        return answers.pop(0) if len(answers) > 1 else answers[0]


def make_certificates(directory: Path, *names: str) -> Certificates:
    """A new authority, and a certificate of it for these names and addresses."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lookonce test authority")])
    ca = _sign(ca_name, ca_name, ca_key, ca_key, [], is_ca=True)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    leaf = _sign(subject, ca_name, key, ca_key, list(names), is_ca=False)
    paths = Certificates(directory / "ca.pem", directory / "chain.pem", directory / "key.pem")
    paths.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    paths.chain.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    paths.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def _sign(subject, issuer, key, issuer_key, names, *, is_ca):
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if is_ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
