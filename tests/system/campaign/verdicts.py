"""What a campaign holds against a system: which failures a fault justifies, which nothing does."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gateway.http.error_bodies import HTTP_ERRORS

EXAMPLES = 5  # kept of each kind of violation
STATUS_OF_CODE = {shape.code: shape.status for shape in HTTP_ERRORS.values()}
LIBRARIES = re.compile(r"traceback|redis|grpc|uvloop|asyncio|errno|handler is closed|/tmp|unix:|127\.0\.0\.1", re.I)
"""What no message to a client holds: words of libraries, paths, addresses."""


@dataclass
class Window:
    """A fault, from its beginning until what it broke is whole again."""

    kind: str
    start: float  # monotonic seconds, like all times here
    end: float = float("inf")
    statuses: frozenset[int] = frozenset()  # that requests may be answered with meanwhile
    cuts: str | None = None  # the gateway whose connections may break
    store: bool = False  # what is uploaded meanwhile may stand in one gateway's memory alone
    slack: float = 0.0  # seconds beyond `end` until the last breaker has closed and the last channel is up

    def covers(self, start: float, end: float) -> bool:
        """Whether a request of that time can have met it."""
        return self.start <= end and start <= self.end + self.slack


@dataclass
class Verdicts:
    """All that was seen. May be used from several threads."""

    windows: list[Window] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)  # "operation: outcome"
    justified: Counter[str] = field(default_factory=Counter)  # "503 unavailable during kill language: ..."
    violations: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    slowest: float = 0.0  # seconds of a request
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def fault(self, kind: str, **allowed: Any) -> Iterator[Window]:
        """A window that is open while the block runs."""
        window = Window(kind, time.monotonic(), **allowed)
        with self._lock:
            self.windows.append(window)
        try:
            yield window
        finally:
            window.end = time.monotonic()

    def note(self, operation: str, outcome: str) -> None:
        """Count what came of a request."""
        with self._lock:
            self.outcomes[f"{operation}: {outcome}"] += 1

    def accuse(self, violation: str, **facts: Any) -> None:
        """Count what nothing justifies."""
        with self._lock:
            self.violations[violation] += 1
            kept = self.examples.setdefault(violation, [])
            if len(kept) < EXAMPLES:
                kept.append({"at": round(time.monotonic() - self.began, 1), **facts})

    def store_was_whole(self, start: float, end: float) -> bool:
        """Whether no fault of the store can have touched a request of that time."""
        return not any(window.store and window.covers(start, end) for window in list(self.windows))

    def broken(self, start: float, *, gateway: str, **facts: Any) -> None:
        """A connection that broke, or an answer that was cut."""
        end = time.monotonic()
        cause = next((w for w in list(self.windows) if w.cuts == gateway and w.covers(start, end)), None)
        if cause is None:
            self.accuse("connection broken without a fault of its gateway", gateway=gateway, **facts)
        else:
            self._justify(f"connection broken during {cause.kind}")

    def error(self, status: int, body: Any, start: float, **facts: Any) -> None:
        """An error with that status and {"error": ...}: its shape is held against it, and what can't justify it."""
        end, error = time.monotonic(), body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
            self.accuse("error without OpenAI's shape", status=status, body=str(body)[:300], **facts)
            return
        code, message = str(error["code"]), str(error["message"])
        facts |= {"status": status, "code": code, "message": message[:200]}
        if LIBRARIES.search(message):
            self.accuse("error with a library's words", **facts)
        if STATUS_OF_CODE.get(code) != status:
            self.accuse("error whose code and status disagree", **facts)
        if status in (499, 500, 501, 502):
            self.accuse(f"{status} {code}", **facts)
            return
        met = [w for w in list(self.windows) if w.covers(start, end)]
        cause = next((w for w in met if status in w.statuses), None)
        if cause is None:
            told = ", ".join(sorted({w.kind for w in met})) or "no fault"
            self.accuse(f"{status} {code} that nothing justifies (met: {told})", **facts)
        else:
            self._justify(f"{status} {code} during {cause.kind}: {message}")

    def reply(self, status: int, headers: Mapping[str, str], **facts: Any) -> None:
        """What every reply has."""
        if not headers.get("x-request-id"):
            self.accuse("reply without a request id", status=status, **facts)
        if status in (429, 503) and not headers.get("retry-after", "").isdigit():
            self.accuse("refusal without retry-after", status=status, **facts)

    def _justify(self, text: str) -> None:
        with self._lock:
            self.justified[text] += 1

    def report(self) -> str:
        """All of it, for people."""
        lines = [f"{len(self.windows)} faults, {self.outcomes.total()} requests, slowest {self.slowest:.1f} s"]
        faults = Counter(window.kind for window in self.windows)
        for title, counts in (
            ("faults", faults),
            ("outcomes", self.outcomes),
            ("failures that faults justify", self.justified),
            ("VIOLATIONS", self.violations),
        ):
            lines += [f"{title}:", *(f"  {count:6}  {name}" for name, count in sorted(counts.items()))]
        if self.violations:
            lines += ["faults in their order:"]
            lines += [f"  {w.start - self.began:6.1f} to {w.end - self.began:6.1f}  {w.kind}" for w in self.windows]
        for violation, examples in sorted(self.examples.items()):
            lines += [violation, *(f"  {example}" for example in examples)]
        return "\n".join(lines)
