"""Certificates and keys in PEM files, checked before a library is given them: neither gRPC nor uvicorn says which file
is at fault."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import invalid


@dataclass(frozen=True)
class Tls:
    """PEM files. A server needs certificate and key; `ca` makes it ask for client certificates (mTLS)."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def enabled(self) -> bool:
        return bool(self.certificate or self.key or self.ca)


def read_pem(path: Path) -> bytes:
    """The file's bytes. Raises INVALID_ARGUMENT, naming the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise invalid(f"TLS: {path} cannot be read ({error.strerror})", param="tls") from error


def read_pair(certificate: Path | None, key: Path | None) -> tuple[bytes, bytes]:
    """Key and certificate, which belong together. Raises INVALID_ARGUMENT, naming the files."""
    if certificate is None or key is None:
        raise invalid("TLS needs both a certificate and a key", param="tls")
    pair = read_pem(key), read_pem(certificate)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise invalid(f"TLS: {certificate} and {key} are not a certificate and its key in PEM", param="tls") from error
    return pair


def read_authorities(path: Path) -> bytes:
    """Certificates of authorities. Raises INVALID_ARGUMENT, naming the file."""
    data = read_pem(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise invalid(f"TLS: {path} holds no certificate in PEM", param="tls") from error
    return data
