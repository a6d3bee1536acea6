"""What every command prints with: lines for people on stderr, results on stdout, errors that end the command."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from typing import NoReturn

import typer


def note(text: str) -> None:
    """A line about what is going on; stderr, so that results can be piped."""
    with contextlib.suppress(OSError):  # a supervisor outlives the terminal it was started in
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line of the command's result."""
    print(text, flush=True)


def printable(text: str) -> str:
    """A model's words without control characters, which could move the cursor or write to the clipboard."""
    return "".join(mark if mark in "\n\t" or unicodedata.category(mark) != "Cc" else "\ufffd" for mark in text)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """End the command with an error."""
    note(f"lookonce: error: {message}")
    raise typer.Exit(code)
