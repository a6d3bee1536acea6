"""The gateway's REST API as the commands use it: blocking, errors as LookonceError with the gateway's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx2

from lookonce.client.event_reader import EventReader
from lookonce.core.errors import ErrorKind, LookonceError

CONNECT_SECONDS = 5.0
READ_SECONDS = 600.0


class Api:
    """One gateway. Use as a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            local = httpx2.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
            self._http = httpx2.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
                trust_env=not local,  # a proxy has no business between this machine and itself
            )
        except (httpx2.InvalidURL, ValueError):
            raise LookonceError(ErrorKind.INVALID_ARGUMENT, f"--url={url!r} is not a URL", param="url") from None

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def upload(self, data: bytes) -> dict[str, Any]:
        """POST /v1/images."""
        return self._json("POST", "/v1/images", files={"file": ("image", data, "application/octet-stream")})

    def ask(self, image_id: str, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """POST /v1/images/{id}/questions: the answers, in the order asked."""
        reply = self._json("POST", f"/v1/images/{image_id}/questions", json={"questions": questions})
        return list(reply["answers"])

    def models(self) -> list[str]:
        """Names of the models served."""
        return [model["id"] for model in self._json("GET", "/v1/models")["data"]]

    def chat(self, model: str, messages: list[dict[str, Any]], max_tokens: int | None) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/completions with greedy decoding: the chunks of the stream."""
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        with self._reaching(), self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code >= 400:
                reply.read()
                raise _refusal(reply)
            reader = EventReader()
            for piece in reply.iter_bytes():
                for chunk in reader.feed(piece):
                    if "error" in chunk:
                        raise LookonceError(
                            ErrorKind.UNAVAILABLE, str(chunk["error"].get("message", "the stream failed"))
                        )
                    yield chunk
            reader.end()

    def _json(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        with self._reaching():
            reply = self._http.request(method, path, **body)
        if reply.status_code >= 400:
            raise _refusal(reply)
        try:
            answer: dict[str, Any] = reply.json()
        except ValueError:
            raise LookonceError(ErrorKind.UNAVAILABLE, f"{self.url} is not a lookonce gateway") from None
        return answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException:
            raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, f"no answer from {self.url} in time") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
            message = f"--url={self.url!r} is not a URL such as http://127.0.0.1:8000"
            raise LookonceError(ErrorKind.INVALID_ARGUMENT, message, param="url") from None
        except httpx2.HTTPError:
            message = f"cannot reach {self.url}; is `lookonce up` running there?"
            raise LookonceError(ErrorKind.UNAVAILABLE, message) from None


def _refusal(reply: httpx2.Response) -> LookonceError:
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {reply.status_code} without an explanation: is this a lookonce gateway?"
    if reply.status_code in (401, 403):
        message += " (give a key with --api-key or LOOKONCE_API_KEY)"
    return LookonceError(ErrorKind.UNAVAILABLE if reply.status_code >= 500 else ErrorKind.INVALID_ARGUMENT, message)
