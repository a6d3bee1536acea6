"""Names that a tenant gives to its images, in the image store. A name never becomes a key as it is: it is hashed
together with its tenant. A name points at one making of an image, so that erasing the image ends it in every case."""

from __future__ import annotations

import re

import orjson
import structlog
from blake3 import blake3

from gateway.images.image_records import ImageRecord
from gateway.images.image_store import PINNED_SECONDS, StoreOutage, StoreWithSpare
from lookonce.core.errors import LookonceError, invalid
from lookonce.core.identity import canonical_json

MAX_ALIASES = 16
PATTERN = "^(?!img_)[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_ALIAS = re.compile(PATTERN.replace("$", r"\Z"))
_CONTEXT = "lookonce 2026 image alias"
log = structlog.get_logger(__name__)


class Aliases:
    """The names of all tenants."""

    def __init__(self, kept: StoreWithSpare) -> None:
        self._kept = kept

    async def find(self, tenant: str, name: str) -> tuple[bytes, float] | None:
        """The digest of the image of that name, and when that was made; None when there is none. Raises StoreOutage
        when the store could not be asked."""
        key = _key(tenant, name)
        value = await self._kept.spare.get(key)
        if value is None:
            value = await self._kept.store.get(key)
        else:  # given while the store could not keep it
            await self._kept.put(key, value, ttl=PINNED_SECONDS)
        if value is None:
            return None
        try:
            fields = orjson.loads(value)
            return bytes.fromhex(fields["digest"]), float(fields["created"])
        except (ValueError, TypeError, KeyError):
            log.warning("image alias unreadable, dropped")
            return None

    async def point(self, name: str, record: ImageRecord) -> None:
        """Give the name to the image, whoever had it."""
        value = orjson.dumps({"digest": record.digest.hex(), "created": record.created})
        await self._kept.put(_key(record.tenant, name), value, ttl=PINNED_SECONDS)

    async def drop(self, record: ImageRecord, name: str) -> bool:
        """Take the name away from this making of an image, unless another has it; whether that is confirmed."""
        try:
            found = await self.find(record.tenant, name)
        except StoreOutage:
            return False
        if found is not None and found != (record.digest, record.created):
            return True  # it has moved on
        return await self._kept.delete(_key(record.tenant, name))


def is_alias(name: str) -> bool:
    """Whether this could be an alias; an image id never is one."""
    return _ALIAS.match(name) is not None


def check_alias(name: str, param: str) -> str:
    """The name. Raises INVALID_ARGUMENT."""
    if not is_alias(name):
        raise alias_error(param)
    return name


def alias_error(param: str) -> LookonceError:
    """What is said of a name that can't be one."""
    text = "must be 1 to 64 letters, digits, '_', '.' or '-', begin with a letter or digit, and not with 'img_'"
    return invalid(f"'{param}' {text}", param=param)


def _key(tenant: str, name: str) -> bytes:
    fields = canonical_json({"tenant": tenant, "name": name})
    return b"alias:" + blake3(fields, derive_key_context=_CONTEXT).digest()
