"""Who is asking: API keys, kept hashed, the tenant that each belongs to, and how much either may ask for (requests a
minute and at once). Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hmac import compare_digest
from pathlib import Path

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import SHARED_TENANT_KEY, cache_salt, tenant_key

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HASHED = re.compile(r"sha256:[0-9a-fA-F]{64}")
_LIMIT = re.compile(r"[ \t]+(rate|concurrency)=([0-9]{1,9})(?=[ \t]|$)")
DEFAULT_TENANT = "default"
MIN_KEY_CHARS = 16
MINUTE = 60.0


@dataclass(frozen=True)
class Quota:
    """0: no limit."""

    rate: int = 0  # requests a minute
    concurrency: int = 0  # requests at once


class Meter:
    """Holds one key or tenant to its quota. The rate is a token bucket: a minute's requests may come at once after a
    quiet minute, then they come in at the rate."""

    def __init__(self, quota: Quota, *, who: str = "API key", clock: Callable[[], float] = time.monotonic) -> None:
        self.quota = quota
        self._who = who
        self.active = 0
        self._clock = clock
        self._tokens = float(quota.rate)
        self._filled = clock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it lasts. Raises RATE_LIMITED, with the time to wait."""
        if 0 < self.quota.concurrency <= self.active:
            text = f"this {self._who} has {self.active} requests under way, the limit is {self.quota.concurrency}"
            raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=1.0)
        self._take()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def _take(self) -> None:
        rate = self.quota.rate
        if rate <= 0:
            return
        now = self._clock()
        self._tokens = min(float(rate), self._tokens + (now - self._filled) * rate / MINUTE)
        self._filled = now
        if self._tokens < 1.0:
            wait = (1.0 - self._tokens) * MINUTE / rate
            text = f"more than {rate} requests a minute with this API key"
            raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=wait)
        self._tokens -= 1.0


@dataclass(frozen=True)
class Tenant:
    """An owner of images. `digest_key` keys the ids of its images, `embedding_key` the digests of its embeddings;
    `cache_salt` keeps the KV of its prompts apart."""

    name: str
    digest_key: bytes  # 32 bytes
    embedding_key: bytes  # 32 bytes; equal among tenants that share embeddings
    cache_salt: bytes = b""  # 32 bytes; empty among tenants that share prefixes


@dataclass(frozen=True)
class KeyOwner:
    """Whose key it is, and what holds it to its limits."""

    tenant: Tenant
    meter: Meter
    shared: Meter  # of all the tenant's keys together

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it lasts. Raises RATE_LIMITED, with the time to wait."""
        with self.shared.request(), self.meter.request():
            yield


NO_LIMITS = Quota()


class Keyring:
    """The configured keys. Without any, everyone is the one tenant "default" (the gateway is then on loopback only)."""

    def __init__(
        self,
        lines: list[str],
        *,
        secret: str = "",
        share_embeddings: bool = False,
        share_prefixes: bool = False,
        quota: Quota = NO_LIMITS,
        tenant_quota: Callable[[int], Quota] = lambda tenants: NO_LIMITS,
    ) -> None:
        """`quota` is that of keys which say nothing of their own, and of everyone together when there are no keys;
        `tenant_quota` that of each of so many tenants.

        Raises INVALID_ARGUMENT on a malformed line (never showing it), and on several tenants without a secret."""
        entries = [_parse(line, number, quota) for number, line in enumerate(lines, 1)]
        names = {name for name, _, _ in entries} or {DEFAULT_TENANT}
        if len(names) > 1 and not secret:
            raise invalid(
                "several tenants need LOOKONCE_GATEWAY_SECRET: their image ids are derived from it", param="secret"
            )
        self._tenants = {name: _tenant(name, secret, share_embeddings, share_prefixes) for name in names}
        shared = {name: Meter(tenant_quota(len(names)), who="tenant") for name in names}
        self._keys = tuple(
            (digest, KeyOwner(self._tenants[name], Meter(own), shared[name])) for name, digest, own in entries
        )
        self._anyone = KeyOwner(self._tenants[DEFAULT_TENANT], Meter(quota), Meter(NO_LIMITS)) if not entries else None

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._anyone is not None

    def identify(self, presented: str | None) -> KeyOwner:
        """Who presents the key. Raises UNAUTHENTICATED. Takes the same time for every key."""
        if self._anyone is not None:
            return self._anyone
        if not presented:
            raise LookonceError(ErrorKind.UNAUTHENTICATED, "an API key is needed: Authorization: Bearer KEY")
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found: KeyOwner | None = None
        for expected, owner in self._keys:
            if compare_digest(digest, expected):
                found = owner
        if found is None:
            raise LookonceError(ErrorKind.UNAUTHENTICATED, "the API key is not valid")
        return found

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name, for work that goes on without a request; None when no key is its any more."""
        return self._tenants.get(name)


def read_keys(text: str, path: Path | None) -> list[str]:
    """Key lines of the setting and of the file; blank lines and comments (#) dropped."""
    lines = [item.strip() for item in text.split(",")]
    if path is not None:
        try:
            lines += [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise invalid(f"the API keys file {path} cannot be read", param="api_keys_file") from error
    return [line for line in lines if line and not line.startswith("#")]


def _parse(line: str, number: int, quota: Quota) -> tuple[str, bytes, Quota]:
    """The tenant of a key, the key's SHA-256 and its quota."""
    limits = _LIMIT.findall(line)
    text = _LIMIT.sub("", line)
    name, equals, key = text.partition("=")
    if not equals or not _TENANT.fullmatch(name):
        name, key = DEFAULT_TENANT, text
    quota = replace(quota, **{limit: int(value) for limit, value in limits})
    if _HASHED.fullmatch(key):
        return name, bytes.fromhex(key.removeprefix("sha256:")), quota
    if len(key) < MIN_KEY_CHARS:
        raise invalid(f"API key {number} is shorter than {MIN_KEY_CHARS} characters", param="api_keys")
    return name, hashlib.sha256(key.encode()).digest(), quota


def _tenant(name: str, secret: str, share_embeddings: bool, share_prefixes: bool) -> Tenant:
    own = tenant_key(secret, name) if secret else SHARED_TENANT_KEY
    salt = cache_salt(secret, name) if secret and not share_prefixes else b""
    return Tenant(name, own, SHARED_TENANT_KEY if share_embeddings else own, salt)
