"""What a caller may give: an image, questions with their sampling and choices, progress. Field names are those of the
API."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lookonce.core.errors import invalid

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image


_ID = re.compile(r"(?:lookonce:)?(img_[a-z2-7]{52})")
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def given(source: ImageSource | None, picture: ImageSource | None) -> Any:
    """The image of `Client.image`, also under the argument's former name."""
    if picture is None:
        return source
    warnings.warn("image(picture=...) is image(source=...) now", DeprecationWarning, stacklevel=3)
    return picture


def image_id(source: ImageSource) -> str | None:
    """The id, if that is what it is."""
    found = _ID.fullmatch(source) if isinstance(source, str) else None
    return found[1] if found else None


def upload_body(source: ImageSource, bounds: PixelOptions) -> dict[str, Any]:
    """The body of the upload: the file, or where it is, and its pixel bounds. Reads the file, so it may block.

    Raises INVALID_ARGUMENT when a file can't be read or the type is none of those above.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return {"json": {"data": source, **bounds}}
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        return {"json": {"url": source, **bounds}}
    form = {name: str(pixels) for name, pixels in bounds.items()}
    return {"files": {"file": ("image", _file(source), "application/octet-stream")}, "data": form}


def _file(source: ImageSource) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    pillow = sys.modules.get("PIL.Image")  # who has an image of Pillow's has imported it
    if pillow is not None and isinstance(source, pillow.Image):
        return _encode(source)
    kinds = "a path, bytes, a PIL image, a URL or an image id"
    raise invalid(f"an image must be {kinds}, not {type(source).__name__}", param="image")


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise invalid(f"{str(path)[:200]}: cannot be read ({reason})", param="image") from error


def _encode(source: Image.Image) -> bytes:
    """As PNG, which loses nothing; modes that PNG lacks as RGB."""
    buffer = io.BytesIO()
    try:
        (source if source.mode in _PNG_MODES else source.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise invalid(f"the PIL image cannot be written (mode {source.mode})", param="image") from error
    return buffer.getvalue()


class SamplingOptions(TypedDict, total=False):
    """How an answer is written; what is left out is the model's own default, or greedy."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | list[str]
    skip_special_tokens: bool
    logit_bias: dict[str, float]
    stop_token_ids: list[int]
    bad_words: list[str]
    allowed_token_ids: list[int]


class PixelOptions(TypedDict, total=False):
    """How many pixels an image has once it is resized; what is left out is the service's own bound."""

    min_pixels: int
    max_pixels: int


class ChatOptions(SamplingOptions, PixelOptions, total=False):
    """What holds for a conversation; the pixel bounds for all of its images, and the form of its answers."""

    response_format: dict[str, Any]
    structured_outputs: dict[str, Any]


class QuestionOptions(ChatOptions, total=False):
    """What else holds for questions on an image: instructions, and how closely it is looked at."""

    system: str
    detail: Literal["low", "high", "auto"]


@dataclass(frozen=True, slots=True)
class Question:
    """One of many questions, with its own sampling. `type` says how it is answered, or else the field that it has: by
    the probabilities of `choices`, of places on a `scale` (labels, or {"min", "max"}) or of `labels`; or by text, of a
    `schema` (a JSON Schema) or `regex`.

    >>> Question("What does the sign say?", id="sign", sampling={"max_tokens": 20})
    >>> Question("Is it day?", choices=["yes", "no"])
    >>> Question("Is it day?", type="yes_no")
    >>> Question("How sharp is it?", scale=["blurred", "fair", "sharp"], debias=True)
    >>> Question("Is there a {label}?", labels=["cat", "dog"])
    >>> Question("Which price?", regex="[0-9]+ EUR")
    """

    text: str
    id: str | None = None
    choices: Sequence[str] | None = None
    schema: Mapping[str, Any] | None = None
    regex: str | None = None
    type: Literal["text", "choice", "yes_no", "rating", "many_of", "extract"] | None = None
    scale: Sequence[str] | Mapping[str, int] | None = None
    labels: Sequence[str] | None = None
    tell_options: bool | None = None
    debias: bool | None = None
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions())

    def to_json(self, identifier: str | None = None) -> dict[str, Any]:
        """As the API takes it, under an id of the client's own."""
        form = {name: getattr(self, name) for name in _FORM}
        form |= {name: list(value) for name, value in form.items() if isinstance(value, tuple)}
        return without_none({"id": identifier, "text": self.text, **self.sampling, **form})


_FORM = ("type", "choices", "scale", "labels", "schema", "regex", "tell_options", "debias")


def as_question(question: str | Question) -> Question:
    """Raises INVALID_ARGUMENT for anything but a string or a Question."""
    if isinstance(question, Question):
        return question
    if not isinstance(question, str):
        raise invalid(f"a question must be a string or a Question, not {type(question).__name__}", param="questions")
    return Question(question)


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only what was said: None means the default."""
    return {name: value for name, value in options.items() if value is not None}


Progress = bool | Callable[[int, int], object]
"""True: a bar on stderr. A function: called with how many are done, of how many."""


@contextmanager
def reporting(progress: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with the count of answers that are there."""
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("questions", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield lambda done: None
