"""What a running system has stored, seen and changed from behind: every value of a Redis or of an embedded store."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import redis

from lookonce.core.stores.lmdb_file import close_lmdb, open_lmdb

Place = tuple[str, bytes]
"""Namespace and key."""
KINDS = (b"record:", b"file:", b"alias:", b"index:")


def kind(place: Place) -> str:
    """What lies there: image-store keys begin with it, all others are of embeddings."""
    prefix = next((one for one in KINDS if place[1].startswith(one)), b"embedding:")
    return prefix.decode().rstrip(":")


class RedisValues:
    """The values on one server."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def read(self) -> dict[Place, bytes]:
        names = [name.decode().split(":") for name in self._client.scan_iter("lookonce:*", count=1000)]
        places = [(parts[1], bytes.fromhex(parts[2])) for parts in names if parts[2] != "lease"]
        found = {place: self._client.get(self._name(place)) for place in places}
        return {place: value for place, value in found.items() if value is not None}

    def write(self, place: Place, value: bytes) -> None:
        self._client.set(self._name(place), value, keepttl=True)

    def _name(self, place: Place) -> str:
        return f"lookonce:{place[0]}:{place[1].hex()}"


class EmbeddedValues:
    """The values in one directory, beside the processes that use it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self) -> dict[Place, bytes]:
        found = {}
        for path in self._directory.iterdir():
            with _opened(path) as file, file.env.begin() as transaction:
                for key, value in transaction.cursor(db=file.tables[b"values"]):
                    found[path.name, bytes(key)] = bytes(value)
        return found

    def write(self, place: Place, value: bytes) -> None:
        with _opened(self._directory / place[0]) as file, file.env.begin(write=True) as transaction:
            transaction.put(place[1], value, db=file.tables[b"values"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[object]:
    file = open_lmdb(path, 0)
    try:
        yield file
    finally:
        close_lmdb(file)


def swapped(values: dict[Place, bytes]) -> dict[Place, bytes]:
    """Each value under the key of the next of its kind."""
    changed = {}
    for _, group in itertools.groupby(sorted(values, key=kind), key=kind):
        places = sorted(group)
        changed |= {place: values[other] for place, other in zip(places, [*places[1:], places[0]], strict=True)}
    return changed


def of_another_kind(values: dict[Place, bytes]) -> dict[Place, bytes]:
    """Each value replaced by one of another kind."""
    return {
        place: next(values[other] for other in sorted(values, reverse=True) if kind(other) != kind(place))
        for place in values
    }


def each(change: Callable[[bytes], bytes]) -> Callable[[dict[Place, bytes]], dict[Place, bytes]]:
    """Every value changed on its own."""
    return lambda values: {place: change(value) for place, value in values.items()}


def flipped(at: float) -> Callable[[bytes], bytes]:
    """One bit, at that share of the value."""

    def flip(value: bytes) -> bytes:
        changed = bytearray(value)
        changed[int(at * (len(value) - 1))] ^= 1
        return bytes(changed)

    return flip


DAMAGES = {
    "swapped": swapped,
    "of another kind": of_another_kind,
    "cut": each(lambda value: value[: len(value) // 2]),
    "cut to less than a seal": each(lambda value: value[:7]),
    "empty": each(lambda value: b""),
    "first bit": each(flipped(0)),
    "a bit in the middle": each(flipped(0.5)),
    "last bit": each(flipped(1)),
    "longer": each(lambda value: value + b"\0"),
}
