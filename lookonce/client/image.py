"""What an image of the client is, whichever way its questions are sent."""

from __future__ import annotations

from datetime import datetime

from lookonce.client.response_types import ImageInfo


class ImageBase:
    """What the gateway told of the image last."""

    def __init__(self, info: ImageInfo) -> None:
        self._info = info

    def __repr__(self) -> str:
        size = f"{self.width}x{self.height}, {self.tokens} tokens"
        return f"{type(self).__name__}({self.id!r}, {size})"

    @property
    def info(self) -> ImageInfo:
        """All of it."""
        return self._info

    @property
    def id(self) -> str:
        """Made from the bytes and the tenant: the same file has the same id."""
        return self._info.id

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._info.bytes

    @property
    def width(self) -> int | None:
        """In pixels."""
        return self._info.width

    @property
    def height(self) -> int | None:
        """In pixels."""
        return self._info.height

    @property
    def tokens(self) -> int | None:
        """How many embeddings stand for the image in a prompt."""
        return self._info.tokens

    @property
    def status(self) -> str:
        """ "ready" when it can be asked about."""
        return self._info.status

    @property
    def created_at(self) -> datetime | None:
        """First upload."""
        return self._info.created_at

    @property
    def expires_at(self) -> datetime | None:
        """When it is forgotten unless uploaded again."""
        return self._info.expires_at

    @property
    def cached(self) -> bool | None:
        """Whether the upload found the embedding there; None if it was not uploaded but looked up."""
        return self._info.cached

    @property
    def encode_ms(self) -> float | None:
        """What encoding took at the upload, in milliseconds."""
        return self._info.encode_ms
