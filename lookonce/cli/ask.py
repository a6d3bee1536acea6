"""`lookonce ask`: questions about one image, answered in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.cli.console import fail, note, printable, say
from lookonce.cli.rundir import default_data_dir
from lookonce.core.errors import LookonceError, invalid
from lookonce.core.units import split_list

if TYPE_CHECKING:
    from lookonce.cli.api import Api

HELP = """Ask questions about an image.

\b
  lookonce ask photo.jpg -q "What is in this image?"
  lookonce ask form.png -q "Who signed?" -q "What is the date?" --json
  lookonce ask photo.jpg -q "Is there a person?" --choices yes,no      probabilities
  lookonce ask photo.jpg                                               a prompt; it remembers the conversation

Uses the server at --url, else the one that `lookonce up` runs on the data directory, else starts one for the call.
IMAGE may be - for standard input.
"""


def ask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or - for standard input.")],
    question: Annotated[
        list[str] | None, typer.Option("-q", "--question", metavar="TEXT", help="A question; may be given many times.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Answer with the probability of each of these.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most tokens of one answer.")] = None,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Enlarge the image to at least so many pixels.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reduce the image to at most so many pixels.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answers, usage and receipts as JSON.")] = False,
    url: Annotated[str | None, typer.Option(envvar="LOOKONCE_URL", metavar="URL", help="Gateway to ask.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_API_KEY", metavar="KEY", help="Key of a gateway that wants one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_MODEL", metavar="MODEL", help="Checkpoint, if a server is started.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="LOOKONCE_DATA_DIR", metavar="DIR", help="Where `lookonce up` runs, or will be started."),
    ] = None,
) -> None:
    from lookonce.cli.api import Api
    from lookonce.cli.system import some_system
    from lookonce.client.calls import image_part
    from lookonce.client.request_options import without_none

    questions = question or []
    interactive = not questions and sys.stdin.isatty() and image != "-" and choices is None and not as_json
    try:
        data = read_image(image)
        options = _choices(choices)
        bounds: Any = without_none({"min_pixels": min_pixels, "max_pixels": max_pixels})
        if not questions and not interactive:
            raise invalid("no question: give one with -q (a prompt needs a terminal)", param="question")
        up_arguments = ["--model", model] if model else []
        with some_system(url, data_dir or default_data_dir(), up_arguments) as gateway, Api(gateway, api_key) as api:
            uploaded = api.upload(data, bounds)
            shown = image_part(uploaded["id"], bounds=bounds)
            if interactive:
                converse(api, shown, max_tokens)
            elif len(questions) == 1 and options is None and not as_json:
                _print_stream(_stream(api, shown, [questions[0]], max_tokens))
            else:
                extra = {"choices": options, "max_tokens": max_tokens, "temperature": None if options else 0}
                asked = [{"text": text, **without_none(extra)} for text in questions]
                _report(uploaded, questions, api.ask(uploaded["id"], asked, bounds), as_json)
    except LookonceError as error:
        fail(error.message)


def read_image(image: str) -> bytes:
    """The file's bytes, known to be an image. Raises INVALID_ARGUMENT otherwise."""
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    try:
        data = sys.stdin.buffer.read() if image == "-" else Path(image).expanduser().read_bytes()
    except OSError as error:
        raise invalid(f"{image}: cannot be read ({error.strerror})", param="image") from None
    try:
        Image.open(BytesIO(data)).close()  # the header only
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        kind = "is empty" if not data else "is not an image (JPEG, PNG, WEBP, GIF, BMP or TIFF)"
        raise invalid(f"{image}: {kind}", param="image") from None
    return data


def converse(api: Api, shown: dict[str, Any], max_tokens: int | None) -> None:
    """Questions from the terminal until an empty line or the end of input; earlier turns are remembered."""
    note("Ask about the image. An empty line or Ctrl-D ends.")
    turns: list[str] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        try:
            turns += [line, _print_stream(_stream(api, shown, [*turns, line], max_tokens))]
        except LookonceError as error:
            note(f"lookonce: error: {error.message}")


def _stream(api: Api, shown: dict[str, Any], turns: list[str], max_tokens: int | None) -> Iterator[str]:
    """Pieces of the answer to the last of `turns` (question, answer, question ...) about the image `shown`."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [shown, {"type": "text", "text": turns[0]}]}]
    for number, text in enumerate(turns[1:], start=1):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    for chunk in api.stream(api.model(), messages, max_tokens):
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""


def _print_stream(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        print(printable(piece), end="", flush=True)
    print(flush=True)
    return text


def _report(uploaded: dict[str, Any], questions: list[str], answers: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        together = [{"question": text, **answer} for text, answer in zip(questions, answers, strict=True)]
        say(json.dumps({"image": uploaded, "answers": together}, indent=2, ensure_ascii=False))
    for text, answer in zip(questions, answers, strict=True) if not as_json else ():
        _print_answer(text, answer, alone=len(questions) == 1)
    if any(answer.get("error") for answer in answers):
        raise typer.Exit(1)


def _print_answer(question: str, answer: dict[str, Any], *, alone: bool) -> None:
    if not alone:
        say(f"{question}")
    indent = "" if alone else "  "
    if answer.get("error"):
        note(f"{indent}error: {answer['error'].get('message', 'failed')}")
    elif answer.get("choices"):
        for choice, probability in answer["choices"].items():
            say(f"{indent}{probability:7.2%}  {choice}")
    else:
        say(indent + printable(str(answer["text"])))


def _choices(text: str | None) -> list[str] | None:
    if text is None:
        return None
    options = list(split_list(text))
    if len(options) < 2 or len(set(options)) != len(options):
        raise invalid(f"--choices={text!r}: give two or more different ones, separated by commas", param="choices")
    return options
