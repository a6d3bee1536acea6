"""Every request of the client and how its answer is read: plain data, sent by `sync` and `aio` alike. No I/O here, but
for `upload`, which reads the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

from lookonce.client.exceptions import StreamInterrupted, api_error
from lookonce.client.request_options import (
    ChatOptions,
    PixelOptions,
    Question,
    QuestionOptions,
    as_question,
    image_id,
    upload_body,
    without_none,
)
from lookonce.client.response_types import Answer, Erasure, ImageInfo, Json, Model, Moderation, answer_of, completion_of
from lookonce.core.errors import invalid

if TYPE_CHECKING:
    from lookonce.client.request_options import ImageSource

T = TypeVar("T")
MAX_QUESTIONS = 1000  # the gateway's limits for one request
MAX_CHARS = 1_000_000


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request. `read` makes the result of the JSON that answers it; `body` are arguments of httpx2's `request`.
    `repeatable`: doing it twice gives the same as doing it once."""

    method: str
    path: str
    read: Callable[[Json], T]
    body: Mapping[str, Any] = field(default_factory=dict)
    repeatable: bool = True


def upload(source: ImageSource, bounds: PixelOptions) -> Call[ImageInfo]:
    """An image: uploaded and encoded within `bounds`, or looked up when it is an id. May block."""
    identifier = image_id(source)
    if identifier is not None:
        return look(identifier)
    return Call("POST", "/v1/images", ImageInfo.of, upload_body(source, bounds))


def look(image: str) -> Call[ImageInfo]:
    return Call("GET", _image(image), ImageInfo.of)


def erase(image: str) -> Call[Erasure]:
    def read(json: Json) -> Erasure:
        return Erasure(json["id"], json.get("complete", True))

    return Call("DELETE", _image(image), read, repeatable=False)


def models() -> Call[list[Model]]:
    return Call("GET", "/v1/models", lambda json: [Model.of(item) for item in json["data"]])


def ask(image: str, question: str, options: QuestionOptions, choices: Sequence[str] | None = None) -> Call[Answer]:
    """One question; its failure is raised."""

    def read(json: Json) -> Answer:
        answer = answer_of(json["answers"][0])
        if answer.error is not None:
            raise answer.error
        return answer

    asked = as_question(question)
    if choices is not None:
        asked = Question(asked.text, choices=choices)
    body = {"questions": [asked.to_json()], **without_none(options)}
    return Call("POST", f"{_image(image)}/questions", read, {"json": body})


def moderate(content: Sequence[Any]) -> Call[Moderation]:
    """The verdict on texts and images, judged together."""
    if not content:
        raise invalid("give something to moderate", param="content")
    body = {"input": [part_of(item) for item in content]}
    return Call("POST", "/v1/moderations", lambda json: Moderation.of(json["results"][0]), {"json": body})


def chat(
    messages: str | Iterable[Mapping[str, Any]], options: ChatOptions, model: str | None, *, stream: bool = False
) -> Call[Answer]:
    """A conversation, answered whole or, with `stream`, in events that TextAssembly takes."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    given = without_none({"model": model, **options})
    bounds = {name: given.pop(name) for name in PixelOptions.__annotations__ if name in given}
    body = {**given, "messages": [_message(turn) for turn in turns]}
    if bounds:
        body["mm_processor_kwargs"] = bounds
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Call("POST", "/v1/chat/completions", completion_of, {"json": body})


def ask_stream(image: str, question: str, options: QuestionOptions) -> Call[Answer]:
    """One question, answered in events that TextAssembly takes."""
    sampling: Any = {name: value for name, value in options.items() if name not in ("system", "detail")}
    shown = image_part(image, options.get("detail"))
    text = {"type": "text", "text": as_question(question).text}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [shown, text]}]
    if options.get("system"):
        messages.insert(0, {"role": "system", "content": options["system"]})
    return chat(messages, sampling, None, stream=True)


def image_part(image: str, detail: str | None = None, bounds: PixelOptions | None = None) -> dict[str, Any]:
    """The message part that stands for an image of the gateway."""
    shown = without_none({"url": f"lookonce:{image}", "detail": detail})
    return {"type": "image_url", "image_url": shown, **(bounds or {})}


@dataclass(frozen=True)
class Batch:
    """Questions that go in one request; its events come in order of completion. `first` is where they stand in the
    caller's list."""

    call: Call[Any]
    first: int
    questions: Sequence[Question]

    def answer(self, event: Json) -> tuple[int, Answer]:
        """The answer in an event, under the caller's own id, and its place in the caller's list."""
        if "id" not in event:
            raise StreamInterrupted("the gateway failed") from api_error(event.get("error"))
        place = int(event["id"])
        identifier = self.questions[place].id
        json = {**event, "id": str(self.first + place) if identifier is None else identifier}
        return self.first + place, answer_of(json)

    def check(self, count: int) -> None:
        """Raises StreamInterrupted if fewer answers came than were asked for."""
        if count != len(self.questions):
            raise StreamInterrupted(f"the gateway ended after {count} of {len(self.questions)} answers")


def batches(image: str, questions: Iterable[str | Question], options: QuestionOptions) -> list[Batch]:
    """Requests for any number of questions, each within the gateway's limits."""
    if isinstance(questions, str):
        raise invalid("questions must be a list; ask a single one with ask()", param="questions")
    made, first = [], 0
    common = without_none(options)
    for group in _groups([as_question(item) for item in questions], len(options.get("system") or "")):
        items = [question.to_json(str(place)) for place, question in enumerate(group)]
        body = {"questions": items, "stream": True, **common}
        made.append(Batch(Call("POST", f"{_image(image)}/questions", dict, {"json": body}), first, group))
        first += len(group)
    return made


def chosen(answer: Answer) -> dict[str, float]:
    """The probabilities of an answer with choices; its failure is raised."""
    if answer.error is not None:
        raise answer.error
    return answer.choices or {}


class TextAssembly:
    """Puts a streamed answer together from its events."""

    def __init__(self) -> None:
        self.text = ""
        self._finished: dict[str, Any] = {}

    def take(self, event: Json) -> str:
        """The text that the event adds. Raises StreamInterrupted when it is an error."""
        if "error" in event:
            failure = api_error(event["error"])
            raise StreamInterrupted(failure.message, text=self.text) from failure
        piece = ""
        for choice in event.get("choices") or ():
            piece += choice["delta"].get("content") or ""
            self._keep(finish_reason=choice.get("finish_reason"))
        self._keep(usage=event.get("usage"), receipt=event.get("receipt"), id=event.get("id"))
        self.text += piece
        return piece

    def answer(self) -> Answer:
        """The whole answer."""
        return answer_of({**self._finished, "text": self.text})

    def _keep(self, **fields: Any) -> None:
        self._finished.update(without_none(fields))


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    if isinstance(content, list | tuple):
        return {**turn, "content": [part_of(item) for item in content]}
    return dict(turn)


def part_of(item: Any) -> Any:
    """Strings and images of this client may stand in a message as they are."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if isinstance(item, Mapping):
        return item
    identifier = getattr(item, "id", None)
    if not isinstance(identifier, str):
        kinds = "a string, an image of this client, or one of the API's parts"
        raise invalid(f"a part of a message must be {kinds}, not {type(item).__name__}", param="messages")
    return image_part(identifier, bounds=getattr(item, "bounds", None))


def _groups(questions: Sequence[Question], common_chars: int) -> Iterator[list[Question]]:
    group: list[Question] = []
    chars = common_chars
    for question in questions:
        size = len(question.text) + sum(map(len, question.choices or ()))
        if group and (len(group) == MAX_QUESTIONS or chars + size > MAX_CHARS):
            yield group
            group, chars = [], common_chars
        group.append(question)
        chars += size
    if group:
        yield group


def _image(image: str) -> str:
    return f"/v1/images/{quote(image, safe='')}"
