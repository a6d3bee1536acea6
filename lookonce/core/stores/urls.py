"""Store URLs: from a line of configuration to a Store.

    memory://                              this process's memory
    file:///var/lib/lookonce               the embedded store (LMDB)
    redis://[user:password@]host:port/db   Redis or Valkey; rediss:// with TLS
    redis+cluster://host:port              Redis Cluster; rediss+cluster:// with TLS
    redis+sentinel://host:port,host:port/service
    "memory:// redis://..."                tiers, nearest first, separated by spaces

Query parameters: `ttl` everywhere; `max_bytes` for memory and file; for Redis `max_value_bytes`, `connect_timeout`,
`socket_timeout`, `operation_timeout`, `max_connections`, `db`, and redis-py's TLS arguments `ssl_*` (`ssl_ca_certs`,
`ssl_certfile`, `ssl_keyfile` ...).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from lookonce.core.errors import invalid
from lookonce.core.stores.embedded import EmbeddedStore
from lookonce.core.stores.interface import Store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.redis import RedisSettings, RedisStore, cluster, sentinel, standalone
from lookonce.core.stores.tiered import TieredStore
from lookonce.core.stores.wrappers import CircuitBreaker, TracedStore
from lookonce.core.telemetry import tracing
from lookonce.core.units import parse_duration, parse_size

DEFAULT_MEMORY_BYTES = 512 * 1024**2
DEFAULT_FILE_BYTES = 8 * 1024**3

_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_TLS_OPTIONS = {
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
}
_FALSE = {"0", "f", "false", "n", "no"}


def open_store(
    url: str,
    *,
    namespace: str = "embeddings",
    max_bytes: int | None = None,
    ttl: float | None = None,
    evicts: bool = True,
    strict: bool = False,
) -> Store:
    """Open the store that `url` names (see the module's docstring).

    `namespace` keeps one use's keys apart from another's in the same store. `max_bytes` (memory and file tiers) and
    `ttl` (seconds) are defaults that the URL's query overrides. Without `evicts` a full memory or file store, when it
    is the last tier, refuses what is new and keeps what it has; Redis does as its own policy says. The last tier's
    failures are misses, unless `strict`: then its `get`, `put` and `contains` raise StoreFailure. The embedded store's
    file is opened here (blocking, at start); Redis on first use. Raises LookonceError(INVALID_ARGUMENT) naming the part
    of the URL at fault.
    """
    if not _NAMESPACE.fullmatch(namespace):
        raise invalid(f"namespace must match {_NAMESPACE.pattern}, got {namespace!r}", param="namespace")
    parts = url.split()
    if not parts:
        raise invalid("store must be a URL such as memory://, file:///path or redis://host:port", param="store")
    last = len(parts) - 1
    tiers = [
        _plan(part, namespace, max_bytes, ttl, evicts=evicts or place != last, strict=strict and place == last)
        for place, part in enumerate(parts)
    ]
    stores = [build() for build in tiers]  # only once every part is known to be well-formed
    if tracing.is_exporting():
        kinds = [part.partition(":")[0] for part in parts]
        stores = [
            store if kind == "memory" else TracedStore(store, kind, namespace)
            for store, kind in zip(stores, kinds, strict=True)
        ]
    return stores[0] if len(stores) == 1 else TieredStore(stores)


def _plan(
    url: str, namespace: str, max_bytes: int | None, ttl: float | None, *, evicts: bool, strict: bool
) -> Callable[[], Store]:
    try:
        parts = urlsplit(url)
        if "+sentinel" not in parts.scheme:
            _ = parts.port  # raises when it is not a port
    except ValueError:
        raise invalid("store: host or port is malformed", param="store") from None
    query = _query(parts)
    if "ttl" in query:
        ttl = parse_duration(query.pop("ttl"), param="store: ttl")
    if parts.scheme in ("memory", "file"):
        if "max_bytes" in query:
            max_bytes = parse_size(query.pop("max_bytes"), param="store: max_bytes")
        _nothing_left(query)
        return _local(parts, namespace, max_bytes, ttl, evicts=evicts, strict=strict)
    if parts.scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel"):
        return _remote(parts, namespace, ttl, _redis_settings(parts, query), strict=strict)
    raise invalid(
        f"store: scheme {parts.scheme!r} is not known; use memory://, file:///path, redis://, rediss://, "
        "redis+cluster://, rediss+cluster:// or redis+sentinel://",
        param="store",
    )


def _local(
    parts: SplitResult, namespace: str, max_bytes: int | None, ttl: float | None, *, evicts: bool, strict: bool
) -> Callable[[], Store]:
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise invalid("store: memory:// takes no host or path", param="store")
        size = DEFAULT_MEMORY_BYTES if max_bytes is None else max_bytes
        return lambda: MemoryStore(size, ttl=ttl, namespace=namespace, evicts=evicts)
    if parts.netloc not in ("", "localhost") or parts.path in ("", "/"):
        raise invalid(
            "store: file:// needs an absolute path, with three slashes: file:///var/lib/lookonce", param="store"
        )
    size = DEFAULT_FILE_BYTES if max_bytes is None else max_bytes
    path = Path(unquote(parts.path)) / namespace
    return lambda: CircuitBreaker(EmbeddedStore(path, size, ttl=ttl, namespace=namespace, evicts=evicts), strict=strict)


def _remote(
    parts: SplitResult, namespace: str, ttl: float | None, settings: RedisSettings, *, strict: bool
) -> Callable[[], Store]:
    if not parts.netloc.rpartition("@")[2]:
        raise invalid(f"store: {parts.scheme}:// needs a host", param="store")
    base, _, kind = parts.scheme.partition("+")
    plain = parts._replace(scheme=base, query="", fragment="")

    def build() -> Store:
        also_close: tuple[Any, ...] = ()
        client: Any
        if kind == "cluster":
            client = cluster(plain._replace(path="").geturl(), settings)
        elif kind == "sentinel":
            client, also_close = sentinel(parts.geturl(), settings)
        else:
            client = standalone(plain.geturl(), settings)
        driver = RedisStore(client, settings=settings, ttl=ttl, namespace=namespace, also_close=also_close)
        return CircuitBreaker(driver, strict=strict)

    if kind == "sentinel":
        _check_sentinels(parts)
    elif kind == "" and parts.path.strip("/") and not parts.path.strip("/").isdigit():
        raise invalid(f"store: database must be a number, got {parts.path.strip('/')!r}", param="store")
    return build


def _check_sentinels(parts: SplitResult) -> None:
    if not parts.path.strip("/"):
        raise invalid("store: redis+sentinel:// needs the service's name as its path", param="store")
    for host in parts.netloc.rpartition("@")[2].split(","):
        name, colon, port = host.rpartition(":")
        if colon and not (name and port.isdigit() and 0 < int(port) < 65536):
            raise invalid("store: host or port is malformed", param="store")


def _redis_settings(parts: SplitResult, query: dict[str, str]) -> RedisSettings:
    values: dict[str, Any] = {}
    for name in ("connect_timeout", "socket_timeout", "operation_timeout"):
        if name in query:
            values[name] = parse_duration(query.pop(name), param=f"store: {name}")
    if "max_value_bytes" in query:
        values["max_value_bytes"] = parse_size(query.pop("max_value_bytes"), param="store: max_value_bytes")
    if "max_connections" in query:
        values["max_connections"] = _number(query.pop("max_connections"), "max_connections", 1)
    options: dict[str, Any] = {}
    if "db" in query:
        options["db"] = _number(query.pop("db"), "db", 0)
    for name in sorted(_TLS_OPTIONS & query.keys()):
        if not parts.scheme.startswith("rediss"):
            raise invalid(f"store: {name} needs a rediss:// URL", param="store")
        text = query.pop(name)
        options[name] = text.lower() not in _FALSE if name == "ssl_check_hostname" else text
    if options.get("ssl_cert_reqs", "required") not in ("required", "optional", "none"):
        raise invalid("store: ssl_cert_reqs must be required, optional or none", param="store")
    _nothing_left(query)
    return RedisSettings(**values, options=options)


def _number(text: str, name: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise invalid(f"store: {name} must be a number of at least {least}, got {text!r}", param="store")
    return int(text)


def _query(parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise invalid("store: a query parameter is given twice", param="store")
    return query


def _nothing_left(query: dict[str, str]) -> None:
    if query:
        raise invalid(f"store: query parameter {sorted(query)[0]!r} is not known here", param="store")
