"""The Python client of lookonce's REST API: `Client`, its asynchronous twin `AsyncClient`, and what they return.

    import lookonce

    with lookonce.Client("http://127.0.0.1:8000") as client:
        image = client.image("photo.jpg")  # encoded once
        print(image.ask("What is in the image?"))
        print(image.score("Is it outdoors?", ["yes", "no"]))

Knows only the public API. `calls` says what is sent and how answers are read; `sync` and `aio` only send it.
"""

from lookonce.client.aio import AsyncClient, AsyncImage, AsyncTextStream
from lookonce.client.exceptions import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ConnectionFailed,
    ContextLengthError,
    ImageError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamInterrupted,
    UnavailableError,
)
from lookonce.client.request_options import Question, SamplingOptions
from lookonce.client.response_types import Answer, Erasure, ImageInfo, Model, Moderation, Receipt, Usage
from lookonce.client.sync import Client, Image, TextStream
from lookonce.client.vector_calls import Found, Ranked, Search

__all__ = [
    "Answer",
    "ApiError",
    "AsyncClient",
    "AsyncImage",
    "AsyncTextStream",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "ConnectionFailed",
    "ContextLengthError",
    "Erasure",
    "Found",
    "Image",
    "ImageError",
    "ImageInfo",
    "Model",
    "Moderation",
    "NotFoundError",
    "PermissionDeniedError",
    "Question",
    "Ranked",
    "RateLimitError",
    "Receipt",
    "RequestTimeout",
    "SamplingOptions",
    "Search",
    "ServerError",
    "StreamInterrupted",
    "TextStream",
    "UnavailableError",
    "Usage",
]
