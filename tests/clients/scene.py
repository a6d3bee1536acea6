"""What each drive is told by the file that $SCENE names: where the server is, one image in three forms, and a
question about it with its answer. Standard library only: every client has an environment of its own."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

_scene = json.loads(Path(os.environ["SCENE"]).read_text())
SERVER: str = _scene["server"]
BASE_URL = f"{SERVER}/v1"
KEY = "any"
MODEL = "lookonce"
IMAGES: dict[str, str] = _scene["images"]  # "data", "url" and "id": URLs of the same image
FILE = base64.b64decode(IMAGES["data"].partition(",")[2])
CHECKPOINT: str = _scene["checkpoint"]  # the directory of the model's tokenizer
QUESTION: str = _scene["question"]
ANSWER: str = _scene["answer"]


def check(what: str, said: str | None) -> None:
    """Print that it is right, or end."""
    if said is None or ANSWER not in said.lower():
        raise SystemExit(f"{what}: {said!r} is not {ANSWER!r}")
    print(f"{what}: {said.strip()}")


def refused(what: str, error: BaseException, *words: str) -> None:
    """Print that an error says these words, or end."""
    missing = [word for word in words if word not in str(error)]
    if missing:
        raise SystemExit(f"{what}: {error!r} does not say {missing}")
    print(f"{what}: refused, {type(error).__name__}")


def held(what: str, value: object, kind: type) -> None:
    """Print a value that is of its type, or end."""
    if not isinstance(value, kind):
        raise SystemExit(f"{what}: {value!r} is no {kind.__name__}")
    print(f"{what}: {value!r}")


def content(form: str) -> list[dict[str, object]]:
    """The user's message in OpenAI's parts."""
    return [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": IMAGES[form]}},
    ]
