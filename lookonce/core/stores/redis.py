"""Redis and Valkey: standalone, TLS, Sentinel and Cluster. Shared by machines; eviction is the server's (maxmemory,
allkeys-lru). Gets of one server, with and without TLS or Sentinel, have connections of their own (redis_reader).

A driver: whatever goes wrong is a StoreFailure, within bounded time; the library's exceptions end in `_bounded`. Keys
are `lookonce:NAMESPACE:HEX`, leases `lookonce:NAMESPACE:lease:HEX`, so an ACL of `~lookonce:*` is enough; commands:
GET SET EXISTS UNLINK PING EVAL, and in scripts DEL PTTL.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import redis.asyncio as aioredis
from redis.asyncio.connection import RedisSSLContext, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from lookonce.core.stores.interface import MAX_LEASE_SECONDS, StoreFailure, StoreMetrics, StoreStats, Value
from lookonce.core.stores.redis_reader import ValueReader

DROPPED: Final[Any] = (RedisConnectionError, RuntimeError)
"""What a dropped connection raises. RuntimeError: uvloop's, for a write to a transport that is closed already."""

# Only the owner may renew or give back a lease. Method: Redis documentation, "Distributed Locks with Redis".
# What has no end, or one farther off than ARGV[3] ms, is no lease of ours: it would never come free.
_ACQUIRE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  local left = redis.pcall('PTTL', KEYS[1])
  if type(left) ~= 'number' or (left >= 0 and left <= tonumber(ARGV[3])) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_DELETE_IF: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_CODE: Final = re.compile("[A-Z]{2,20}")


@dataclass(frozen=True)
class RedisSettings:
    """Bounds on what a server may cost. Seconds and bytes."""

    connect_timeout: float = 1.0  # for a connection to be made, TLS included
    socket_timeout: float = 1.0  # between two reads or writes
    operation_timeout: float = 3.0  # for a whole operation, waiting for a connection included
    max_connections: int = 16  # and as many again for gets
    max_value_bytes: int = 256 * 1024**2  # Redis itself allows 512 MiB
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of redis-py's connections (TLS, db ...)

    def connection_arguments(self) -> dict[str, Any]:
        """Arguments for redis-py: one quick second try after a dropped connection, none after a timeout."""
        return {
            "socket_connect_timeout": self.connect_timeout,
            "socket_timeout": self.socket_timeout,
            "socket_read_size": 1024**2,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 1, supported_errors=DROPPED),
            "max_connections": self.max_connections,
            **self.options,
        }


class RedisStore:
    """Values on the server that `client` talks to, for `ttl` seconds (None: until the server evicts them)."""

    def __init__(
        self,
        client: aioredis.Redis | aioredis.RedisCluster,
        *,
        settings: RedisSettings,
        ttl: float | None = None,
        namespace: str = "embeddings",
        also_close: tuple[Any, ...] = (),
    ) -> None:
        self.metrics = StoreMetrics("redis", namespace)
        self._client: Any = client
        self._settings = settings
        self._ttl = ttl
        self._prefix = f"lookonce:{namespace}:"
        self._also_close = also_close
        self._slots = asyncio.Semaphore(settings.max_connections)  # a cluster client fails rather than waits
        self._closed = False
        self._reader = ValueReader(client, settings) if isinstance(client, aioredis.Redis) else None

    async def get(self, key: bytes) -> memoryview | None:
        name = self._name(key)
        reader = self._client if self._reader is None else self._reader
        try:
            value = await self._run(lambda: reader.get(name))
        except StoreFailure as failure:
            if failure.code != "WRONGTYPE":
                raise
            self.metrics.corrupt()  # a list or a hash, put there by somebody else
            await self.delete(key)
            value = None
        if not isinstance(value, bytes | memoryview | None):
            raise StoreFailure("redis answered a get with something else than bytes")
        self.metrics.lookup(value is not None)
        return None if value is None else memoryview(value)

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. False when `value` is over the size limit. A full server is a StoreFailure."""
        if memoryview(value).nbytes > self._settings.max_value_bytes:
            self.metrics.put(False)
            return False
        seconds = self._ttl if ttl is None else ttl
        milliseconds = None if seconds is None else max(1, round(seconds * 1000))
        data = value if isinstance(value, bytes | memoryview) else memoryview(value)
        name = self._name(key)
        if await self._run(lambda: self._client.set(name, data, px=milliseconds)) is not True:
            raise StoreFailure("redis did not confirm a put")
        self.metrics.put(True)
        return True

    async def contains(self, key: bytes) -> bool:
        name = self._name(key)
        return bool(await self._run(lambda: self._client.exists(name)))

    async def delete(self, key: bytes) -> bool:
        name = self._name(key)
        if not isinstance(await self._run(lambda: self._client.unlink(name)), int):
            raise StoreFailure("redis did not confirm a delete")
        return True

    async def discard(self, key: bytes, value: Value) -> None:
        name = self._name(key)
        await self._run(lambda: self._client.eval(_DELETE_IF, 1, name, bytes(value)))

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        lease, milliseconds, longest = self._lease(name), max(1, round(seconds * 1000)), round(MAX_LEASE_SECONDS * 1000)
        return bool(await self._run(lambda: self._client.eval(_ACQUIRE, 1, lease, owner, milliseconds, longest)))

    async def release(self, name: bytes, owner: bytes) -> None:
        lease = self._lease(name)
        await self._run(lambda: self._client.eval(_DELETE_IF, 1, lease, owner))

    async def ping(self) -> bool:
        await self._run(lambda: self._client.exists(self._name(b"ping")))
        return True

    def stats(self) -> list[StoreStats]:
        return [replace(self.metrics.stats)]

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._reader is not None:
            await self._reader.close()
        for client in (self._client, *self._also_close):
            try:
                await self._bounded(client.aclose)
            except StoreFailure:
                self.metrics.error()

    async def _run(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        async def in_turn() -> Any:
            async with self._slots:
                return await operation()

        if self._closed:
            raise StoreFailure("the store is closed")
        return await self._bounded(in_turn)

    async def _bounded(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._settings.operation_timeout):
                return await operation()
        except Exception as error:
            raise StoreFailure("redis operation failed", _code(error)) from error

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()

    def _lease(self, name: bytes) -> str:
        return f"{self._prefix}lease:{name.hex()}"


class _TlsConnection(SSLConnection):  # type: ignore[misc,unused-ignore]
    """A connection that shares its pool's TLS context: building one reads every trusted certificate, some 70 ms."""

    def __init__(self, *, contexts: dict[str, RedisSSLContext], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ssl_context = contexts.setdefault("shared", self.ssl_context)


def standalone(url: str, settings: RedisSettings) -> aioredis.Redis:
    """Client of one server at redis:// or rediss:// `url` (without query). Connects on first use."""
    pool = aioredis.BlockingConnectionPool.from_url(
        url, timeout=settings.operation_timeout, **settings.connection_arguments()
    )
    if pool.connection_class is SSLConnection:
        pool.connection_class = _TlsConnection
        pool.connection_kwargs["contexts"] = {}
    return aioredis.Redis.from_pool(pool)


def cluster(url: str, settings: RedisSettings) -> aioredis.RedisCluster:
    """Client of the cluster that the node at redis:// or rediss:// `url` belongs to. Discovers it on first use."""
    return aioredis.RedisCluster.from_url(url, **settings.connection_arguments())


def sentinel(url: str, settings: RedisSettings) -> tuple[aioredis.Redis, tuple[Any, ...]]:
    """Client of the master that Sentinels name; `url` is
    redis+sentinel://[USER:PASSWORD@]HOST:PORT[,HOST:PORT]/SERVICE.

    The credentials are the master's. Answers the client and what must be closed with it.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    arguments = settings.connection_arguments()
    if credentials:
        arguments |= {"username": unquote(user) or None, "password": unquote(password)}
    addresses = []
    for host in hosts.split(","):
        name, _, port = host.rpartition(":")
        addresses.append((name or port, int(port) if name else 26379))
    watchers = Sentinel(  # type: ignore[no-untyped-call]
        addresses,
        sentinel_kwargs={
            "socket_connect_timeout": settings.connect_timeout,
            "socket_timeout": settings.socket_timeout,
        },
        **arguments,
    )
    return watchers.master_for(parts.path.strip("/")), tuple(watchers.sentinels)


def _code(error: Exception) -> str:
    """The word that an error of the server began with. What follows it may name keys and users."""
    word = getattr(error, "status_code", None)  # the client's, which cuts it off the text
    if word is None and isinstance(error, ResponseError):
        word = str(error).partition(" ")[0]
    return word if isinstance(word, str) and _CODE.fullmatch(word) else ""
