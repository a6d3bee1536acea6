"""Server-sent events, from bytes as they come. Lines end at \\n or \\r\\n only: JSON may hold every other separator of
lines that Unicode has. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import json
from typing import Any

from lookonce.client.exceptions import StreamInterrupted

DONE = "[DONE]"


class EventReader:
    """Turns pieces of a response body into the JSON of its events. `done`: the end was announced."""

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
