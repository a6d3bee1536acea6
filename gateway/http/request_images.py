"""The images of a request, inline (data: URLs and base64, decoded strictly) and at URLs: bounded together before any is
fetched or decoded."""

from __future__ import annotations

import asyncio
import binascii
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from gateway.auth import Tenant
from gateway.conversation import ImagePart
from gateway.core import Gateway
from gateway.http.route import aside
from gateway.images.image_records import ImageRecord
from gateway.images.index import is_alias
from gateway.images.library import Retention
from gateway.images.pixel_bounds import AS_SERVED, PixelBounds
from gateway.json_text import CHUNK, LONG_STRINGS
from gateway.schemas.body import PixelFields
from gateway.schemas.requests import REFERENCE, ImageUrlPart
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.http_fetch.fetcher import Fetcher, Wanted
from lookonce.core.units import format_size

ENCODED_AT_ONCE = 8
"""Images of one request that are sent to be encoded at the same time."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RemoteImages:
    """Images of one request that are at URLs, and what they may weigh."""

    wanted: tuple[Wanted, ...]
    max_bytes: int  # each
    total_bytes: int  # together

    async def fetch(self, fetcher: Fetcher, tenant: Tenant) -> dict[str, bytes]:
        """The files by the field that named them. Raises FetchError."""
        if not self.wanted:
            return {}
        files = await fetcher.fetch_all(
            self.wanted, max_bytes=self.max_bytes, total_bytes=self.total_bytes, owner=tenant.name
        )
        return {item.param: data for item, data in zip(self.wanted, files, strict=True)}


def check_images(urls: Sequence[tuple[str, str]], settings: GatewaySettings, param: str) -> RemoteImages:
    """Check how many images (field, URL) there are and how large the inline ones; the rest is left to the others.

    Raises INVALID_ARGUMENT, or UNSUPPORTED for another kind of URL."""
    if len(urls) > settings.max_images:
        raise invalid(f"the request has {len(urls)} images, the limit is {settings.max_images}", param=param)
    wanted = tuple(Wanted(url, name) for name, url in urls if is_remote(url))
    if len(wanted) > settings.max_urls:
        text = f"the request has {len(wanted)} images at URLs, the limit is {settings.max_urls}"
        raise invalid(text, param=param)
    total = 0
    for name, url in urls:
        if image_reference(url) is None and not is_remote(url):
            size = decoded_size(base64_of(url, name))
            check_size(size, settings.max_image_bytes, name)
            total += size
    left = settings.max_request_image_bytes - total
    if left < 0:
        text = f"the images have {total} bytes together, the limit is {settings.max_request_image_bytes}"
        raise invalid(text, param=param)
    return RemoteImages(wanted, settings.max_image_bytes, left)


def is_remote(url: str) -> bool:
    """Whether the image must be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


async def keep_all(
    images: Mapping[str, ImageUrlPart],
    files: Mapping[str, bytes],
    gateway: Gateway,
    tenant: Tenant,
    *,
    bounds: PixelBounds = AS_SERVED,
) -> dict[str, ImagePart]:
    """The images, by the fields that named them, as images of the tenant: found by their ids, or kept and encoded
    now, several at a time. `files`: what was fetched for those at URLs; `bounds` hold for all of them. Raises the first
    one's error, naming its field."""
    at_once = asyncio.Semaphore(ENCODED_AT_ONCE)
    same: dict[str, list[str]] = defaultdict(list)
    for param, image in images.items():
        same[image.url].append(param)

    async def one_after_the_other(params: Sequence[str]) -> list[tuple[str, ImagePart | LookonceError]]:
        """The variants of one image: they change one record."""
        async with at_once:
            return [
                (name, await _kept(images[name], files.get(name), gateway, tenant, name, bounds)) for name in params
            ]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one_after_the_other(params)) for params in same.values()]
    kept = dict(pair for task in tasks for pair in task.result())
    found: dict[str, ImagePart] = {}
    for param in images:
        part = kept[param]
        if isinstance(part, LookonceError):
            raise part
        found[param] = part
    return found


async def _kept(
    image: ImageUrlPart, file: bytes | None, gateway: Gateway, tenant: Tenant, param: str, bounds: PixelBounds
) -> ImagePart | LookonceError:
    identifier = image_reference(image.url)
    try:
        own = asked_bounds(image, param.removesuffix(image.field))
        bounds = bounds.joined(detail_bounds(image.detail, gateway.settings)).joined(own)
        if identifier is not None:
            return ImagePart(await gateway.images.get(identifier, tenant), bounds)
        data = file if file is not None else await decode(base64_of(image.url, param), param)
        record, resolved = await gateway.images.add(data, tenant, bounds=bounds)
        record = await _named(record, image.uuid, gateway, tenant)
    except LookonceError as error:
        is_bound = error.param is not None and error.param.endswith(("min_pixels", "max_pixels"))
        return LookonceError(
            error.kind, error.message, param=error.param if is_bound else param, retry_after=error.retry_after
        )
    return ImagePart(record, bounds, resolved, data)


def asked_bounds(fields: PixelFields | None, prefix: str = "") -> PixelBounds:
    """What a request asks for in `fields`, which are at `prefix`. Raises INVALID_ARGUMENT for a min above the max."""
    if fields is None:
        return AS_SERVED
    return PixelBounds(fields.min_pixels, fields.max_pixels, f"{prefix}min_pixels", f"{prefix}max_pixels")


def detail_bounds(detail: str | None, settings: GatewaySettings) -> PixelBounds:
    """The bounds of OpenAI's `detail`: only "low" is below the checkpoint's own."""
    return PixelBounds(max=settings.low_detail_pixels) if detail == "low" else AS_SERVED


async def _named(record: ImageRecord, uuid: str | None, gateway: Gateway, tenant: Tenant) -> ImageRecord:
    """The image with its `uuid` as one alias more. What can't be an alias, or is one too many, is no name: the request
    is answered all the same."""
    if uuid is None or uuid in record.aliases or not is_alias(uuid):
        return record
    try:
        return await gateway.images.change(record.id, tenant, Retention(alias=uuid))
    except LookonceError as error:
        log.info("an image's uuid is not kept as an alias", reason=error.message)
        return record


def image_reference(url: str) -> str | None:
    """The image id in "lookonce:ID", or None for another kind of URL."""
    return url.removeprefix(REFERENCE) if url.startswith(REFERENCE) else None


def base64_of(url: str, param: str) -> str:
    """The base64 of a data: URL. Raises INVALID_ARGUMENT for a malformed one, UNSUPPORTED for another scheme."""
    if not url[:5].lower() == "data:":
        raise LookonceError(
            ErrorKind.UNSUPPORTED,
            f"'{param}' must be an https:, http: or data: URL, or {REFERENCE}IMAGE_ID",
            param=param,
        )
    header, comma, payload = url.partition(",")
    if not comma or len(header) > 256 or not header.lower().endswith(";base64"):
        raise invalid(f"'{param}' must be of the form data:image/...;base64,...", param=param)
    return payload


def decoded_size(payload: str) -> int:
    """Bytes that base64 text decodes to, from its length alone."""
    string = LONG_STRINGS.get().get(payload)
    if string is not None:
        return string.chars * 3 // 4 - string.raw[string.end - 2 : string.end].count(b"=")
    return len(payload) * 3 // 4 - payload[-2:].count("=")


def check_size(size: int, limit: int, param: str) -> None:
    """Raise IMAGE_TOO_LARGE for a file over the limit, INVALID_ARGUMENT for an empty one."""
    if size > limit:
        raise LookonceError(
            ErrorKind.IMAGE_TOO_LARGE,
            f"'{param}' is an image of {format_size(size)}, the limit is {format_size(limit)}",
            param=param,
        )
    if size <= 0:
        raise invalid(f"'{param}' is empty", param=param)


async def decode(payload: str, param: str) -> bytes:
    """Strict base64 (RFC 4648 alphabet, padded, nothing else). Raises INVALID_ARGUMENT."""
    string = LONG_STRINGS.get().get(payload)
    try:
        if string is not None:
            return await aside(string.chars, _decode, string.chunks())
        return await aside(len(payload), _decode, _encoded(payload))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise invalid(f"'{param}' is not valid base64", param=param) from error


def _encoded(text: str) -> Iterator[bytes]:
    return (text[start : start + CHUNK].encode("ascii") for start in range(0, len(text), CHUNK))


def _decode(chunks: Iterable[bytes]) -> bytes:
    """Chunk by chunk, so that other threads have their turn. Only the last four characters may be padded."""
    decoded: list[bytes] = []
    left = b""
    for chunk in chunks:
        text = left + chunk
        whole = max(0, len(text) - 1) // 4 * 4
        if b"=" in text[:whole]:
            raise binascii.Error("padding within")
        decoded.append(binascii.a2b_base64(text[:whole], strict_mode=True))
        left = text[whole:]
    decoded.append(binascii.a2b_base64(left, strict_mode=True))
    return b"".join(decoded)
