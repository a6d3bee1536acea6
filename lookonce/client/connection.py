"""What both drivers need around a request: where it goes, when it is tried again, what httpx2's errors mean, and the
events of a streamed answer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import tenacity

from lookonce.client.calls import Call
from lookonce.client.exceptions import ApiError, ConnectionFailed, RequestTimeout, StreamInterrupted, refusal
from lookonce.core.errors import invalid
from lookonce.core.version import __version__

DEFAULT_URL = "http://127.0.0.1:8000"
READ_SECONDS = 600.0
CONNECT_SECONDS = 5.0
MAX_RETRY_AFTER = 60.0  # seconds; told to wait longer, the caller decides
RETRY_JITTER = 0.25  # of the time asked for, so that clients turned away together don't come back together
RETRIED = frozenset({429, 503})
BACKOFF = tenacity.wait_exponential_jitter(multiplier=0.1, max=5.0, exp_base=2.0, jitter=1.0)
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
DONE = "[DONE]"
T = TypeVar("T")
log = logging.getLogger("lookonce.client")  # a library's: silent unless the program that uses it wants to hear


@dataclass(frozen=True)
class Connection:
    """How to reach a gateway."""

    base_url: str
    api_key: str | None
    timeout: httpx2.Timeout
    retries: int

    @classmethod
    def of(
        cls, base_url: str | None, api_key: str | None, timeout: float | httpx2.Timeout | None, retries: int
    ) -> Connection:
        """Defaults come from LOOKONCE_URL and LOOKONCE_API_KEY. Raises INVALID_ARGUMENT for what is no http(s) URL."""
        text = (base_url or os.environ.get("LOOKONCE_URL") or DEFAULT_URL).rstrip("/")
        try:
            url = httpx2.URL(text)
        except (httpx2.InvalidURL, TypeError, ValueError):
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise invalid(f"base_url={text!r} is not a URL such as {DEFAULT_URL}", param="base_url")
        if retries < 0:
            raise invalid(f"retries is {retries}, it must be at least 0", param="retries")
        if not isinstance(timeout, httpx2.Timeout):
            read = READ_SECONDS if timeout is None else timeout
            timeout = httpx2.Timeout(read, connect=min(read, CONNECT_SECONDS))
        return cls(text, api_key or os.environ.get("LOOKONCE_API_KEY") or None, timeout, retries)

    def http_options(self) -> dict[str, Any]:
        local = httpx2.URL(self.base_url).host in LOCAL
        return {"timeout": self.timeout, "trust_env": not local}  # no proxy between this machine and itself

    def request(self, call: Call[Any]) -> dict[str, Any]:
        headers = {"user-agent": f"lookonce-python/{__version__}"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        return {"method": call.method, "url": self.base_url + call.path, "headers": headers, **call.body}

    def attempts(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of tenacity's attempts at the call."""
        return {
            "retry": tenacity.retry_if_exception(lambda error: _is_retried(call, error)),
            "wait": _pause,
            "stop": tenacity.stop_after_attempt(self.retries + 1),
            "before_sleep": _note,
            "reraise": True,
        }

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """httpx2's errors before an answer, in our terms."""
        try:
            yield
        except httpx2.ConnectTimeout as error:
            raise RequestTimeout(f"no connection to {self.base_url} in time", unsent=True) from error
        except httpx2.TimeoutException as error:
            raise RequestTimeout(f"no answer from {self.base_url} in time") from error
        except httpx2.ConnectError as error:
            message = f"cannot reach {self.base_url}; is `lookonce up` running there?"
            raise ConnectionFailed(message, unsent=True) from error
        except httpx2.HTTPError as error:
            raise ConnectionFailed(f"the connection to {self.base_url} broke before the answer") from error

    def result(self, call: Call[T], reply: httpx2.Response) -> T:
        """What the call gives. Raises ConnectionFailed if it's no gateway that answered."""
        try:
            return call.read(reply.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ConnectionFailed(f"{self.base_url} does not answer as a lookonce gateway does") from error

    @staticmethod
    def check(reply: httpx2.Response) -> None:
        """Raises ApiError for a refusal whose body has been read."""
        if reply.status_code >= 300:
            raise refusal(reply.status_code, reply.headers, reply.content)


@contextmanager
def streaming() -> Iterator[None]:
    """httpx2's errors after an answer began."""
    try:
        yield
    except httpx2.TimeoutException as error:
        raise StreamInterrupted("the answer did not go on in time") from error
    except httpx2.HTTPError as error:
        raise StreamInterrupted("the connection broke while the answer came") from error


def _is_retried(call: Call[Any], error: BaseException) -> bool:
    if isinstance(error, ApiError):
        return error.status in RETRIED and (error.retry_after or 0.0) <= MAX_RETRY_AFTER
    if isinstance(error, ConnectionFailed):
        return error.unsent or (call.repeatable and not isinstance(error, RequestTimeout))
    return False


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, ApiError) and error.retry_after:
        return error.retry_after + tenacity.wait_random(0, RETRY_JITTER * error.retry_after)(state)
    return BACKOFF(state)


def _note(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    log.info("attempt %d failed, the next in %.1f s: %s", state.attempt_number, state.upcoming_sleep, error)


class EventReader:
    """Turns pieces of a response body into the JSON of its server-sent events. `done`: the end was announced.

    Lines end at \\n or \\r\\n only: JSON may hold every other separator of lines that Unicode has.
    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Events that this piece completes. Raises StreamInterrupted on what is no JSON object."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data = b"\n".join(self._data)
                self._data.clear()
                if data == DONE.encode():
                    self.done = True
                else:
                    events.append(_parse(data))
        return events

    def end(self) -> None:
        """To be told that the body ended. Raises StreamInterrupted if that was too early."""
        if not self.done:
            raise StreamInterrupted("the connection ended before the answer did")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise StreamInterrupted("the gateway sent an event that is not a JSON object")
    return event
