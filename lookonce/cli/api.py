"""The gateway as the commands use it: the Python client, answers as the API's own JSON, nothing tried again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from lookonce.client.calls import Call
from lookonce.client.exceptions import AuthenticationError, PermissionDeniedError, api_error
from lookonce.client.request_options import PixelOptions, upload_body
from lookonce.client.sync import Client, events_of
from lookonce.core.errors import LookonceError, invalid


class Api(Client):
    """One gateway. Use as a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            super().__init__(url, api_key, retries=0)
        except LookonceError:
            raise invalid(f"--url={url!r} is not a URL such as http://127.0.0.1:8000", param="url") from None

    def upload(self, data: bytes, bounds: PixelOptions | None = None) -> dict[str, Any]:
        """POST /v1/images."""
        return self._json("POST", "/v1/images", **upload_body(data, bounds or {}))

    def ask(
        self, image_id: str, questions: list[dict[str, Any]], bounds: PixelOptions | None = None
    ) -> list[dict[str, Any]]:
        """POST /v1/images/{id}/questions: the answers, in the order asked."""
        body = {"questions": questions, **(bounds or {})}
        reply = self._json("POST", f"/v1/images/{image_id}/questions", json=body)
        return list(reply["answers"])

    def model(self) -> str:
        """The name of the model served, or of the first of them."""
        return str(self._json("GET", "/v1/models")["data"][0]["id"])

    def stream(self, model: str, messages: list[dict[str, Any]], max_tokens: int | None) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/completions with greedy decoding: the chunks of the stream."""
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        call = Call("POST", "/v1/chat/completions", dict, {"json": body})
        with _explained(), closing(self._open(call)) as reply, closing(events_of(reply)) as chunks:
            for chunk in chunks:
                if "error" in chunk:
                    raise api_error(chunk["error"])
                yield chunk

    def _json(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        with _explained():
            return self._send(Call(method, path, dict, body))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (AuthenticationError, PermissionDeniedError) as error:
        error.message += " (give a key with --api-key or LOOKONCE_API_KEY)"
        raise
