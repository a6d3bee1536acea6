"""Every image-text-to-text class of transformers, by a random checkpoint that is made here: what becomes of it.

`python -m tests.families sweep [MODEL_TYPE ...]` prints it; of all, it is written to `SWEPT`.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lm_service.prompt import Message
from lookonce.core.errors import CheckpointError, LookonceError
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.registry import BUILTIN
from tests.families.any_checkpoint import Unmade, make_any
from tests.families.split_general import Split
from tests.families.unsplit_general import Unsplit
from tests.images import photograph

SWEPT = Path(__file__).with_name("swept.json")
NAMES = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in BUILTIN)
SERVED, REFUSED, FAULT, UNMADE = "served", "refused", "FAULT", "not made"
QUESTION = "what is on this image?"
_LENGTH = 6


@dataclass(frozen=True)
class Outcome:
    """Of one model type."""

    model_type: str
    what: str
    said: str = ""  # why it is refused, or what went wrong

    def __str__(self) -> str:
        return f"{self.model_type:24} {self.what:8} {self.said}"


def swept(names: Iterable[str] = NAMES) -> Iterable[Outcome]:
    """One outcome for each name."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder, pytest.MonkeyPatch.context() as patch:
            yield outcome(name, Path(folder) / name, patch)


def outcome(model_type: str, path: Path, patch: Any) -> Outcome:
    """Of one checkpoint, made at `path`."""
    try:
        make_any(model_type, path)
    except Unmade as error:
        return Outcome(model_type, UNMADE, str(error))
    except Exception as error:
        return Outcome(model_type, UNMADE, _where(error))
    try:
        told = check_checkpoint(str(path)).problems
    except Exception as error:
        return Outcome(model_type, FAULT, "doctor: " + _where(error))
    if told:
        return Outcome(model_type, REFUSED, _brief(told, path))
    try:
        split = Split(path)
    except (CheckpointError, LookonceError) as error:
        return Outcome(model_type, REFUSED, _brief([str(error)], path) + " (at start)")
    except Exception as error:
        return Outcome(model_type, FAULT, "at start: " + _where(error))
    try:
        return _compared(model_type, split, Unsplit(path, patch))
    except LookonceError as error:
        return Outcome(model_type, FAULT, f"{error.kind} {error.message}")
    except Exception as error:
        return Outcome(model_type, FAULT, _where(error))


def _compared(model_type: str, split: Split, unsplit: Unsplit) -> Outcome:
    """Prompts and greedy answers of one image, and of two in two turns."""
    one, other = photograph("chelsea", (150, 100)), photograph("coffee", (64, 96))
    first, second = split.encoded(one, 1), split.encoded(other, 2)
    for turns in (
        [("user", [one, QUESTION])],
        [("user", [one, QUESTION]), ("assistant", ["a cat"]), ("user", [other, "and this?"])],
        [("user", [one, other, QUESTION])],
    ):
        images = {id(one): first, id(other): second}
        messages = [
            Message(role, tuple(p if isinstance(p, str) else images[id(p)][0] for p in parts)) for role, parts in turns
        ]
        try:
            prompt = split.prompts.build(messages)
        except LookonceError as error:
            return (
                Outcome(model_type, SERVED, f"one image a prompt: {error.message}")
                if turns[1:] or len(turns[0][1]) > 2
                else Outcome(model_type, FAULT, error.message)
            )
        own = unsplit.inputs(turns)
        if list(prompt.token_ids) != own["input_ids"][0].tolist():
            return Outcome(
                model_type, FAULT, f"other tokens: {list(prompt.token_ids)[:24]} {own['input_ids'][0].tolist()[:24]}"
            )
        answer, told = split.answer(prompt, dict(images.values()), _LENGTH)
        expected = unsplit.logprobs(turns, answer)
        worst = float((told - expected).abs().max())
        if not worst <= 2e-4 or answer != expected[:-1].argmax(-1).tolist():
            return Outcome(model_type, FAULT, f"log-probabilities differ by {worst:.2g}")
    return Outcome(model_type, SERVED)


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _brief(problems: Iterable[str], path: Path) -> str:
    return " | ".join(problem.replace(str(path), "PATH") for problem in problems)


def write_swept(outcomes: Iterable[Outcome]) -> None:
    """Write `SWEPT`."""
    SWEPT.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
