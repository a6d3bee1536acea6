"""The check at start: that a loaded half computes what its weights say, on one small image.

What is expected is either recorded (`lookonce verify --record` has the checkpoint's own classes compute it, and writes
it beside the half) or computed from the weights in their plain form (`lookonce.models.plain`): of those that the loader
has read, before they are laid out, so that nothing is read twice (`watched`). That they are the file's is held by some
numbers of each. `lookonce.models` knows the image and the questions about it; each service asks its own half and hands
the numbers over. Imports torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import structlog
import torch
from PIL import Image

from lookonce.core.errors import CheckpointError
from lookonce.core.units import format_size
from lookonce.models.checkpoint import recorded
from lookonce.models.checkpoint.headers import DTYPE_BYTES, TensorEntry, read_bytes
from lookonce.models.devices import dtype_name
from lookonce.models.family import EMBEDDING, HEAD, Half
from lookonce.models.plain import Plain, PlainPrompt, PlainVectors
from lookonce.models.tolerance import bound_of, difference, spread

if TYPE_CHECKING:
    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.family import VisionEncoder
    from lookonce.models.vector_layout import Pooling

ROWS, COLUMNS = 2, 3
"""Tokens of the image, where a token is a cell of patches."""
MOST_BYTES = 20 << 30
"""Weights of a half, as stored, up to which its plain form is computed where that reads all of them again."""
_SAMPLED = 8  # numbers at either end and in the middle of a tensor
_QUESTIONS = (9, 4)  # tokens each
_CHOICES = 32  # of one token
_log = structlog.get_logger(__name__)


class SelfCheckFailed(CheckpointError):
    """A half that computes something else than its weights say."""


@dataclass(frozen=True)
class Question:
    """Tokens: one of text, the image's, a question; and choices whose log-probabilities are asked for."""

    token_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]  # single tokens, and one of two tokens at the end
    positions: np.ndarray  # int64 [r, T]
    next_position: int


@dataclass(frozen=True)
class Exam:
    """Two questions about an image whose rows are given."""

    grid_thw: tuple[int, int, int]
    rows: torch.Tensor  # float32 [1 + deepstack, tokens, hidden]
    questions: tuple[Question, ...]


def check_image(checkpoint: Checkpoint) -> Image.Image:
    """The image, of a size that need not be changed: every pixel another colour than its neighbours."""
    side = math.isqrt(max(checkpoint.family.least_pixels(checkpoint.config), 16**2))
    y, x = np.mgrid[: ROWS * side, : COLUMNS * side]
    channels = [(x * a + y * b + x * y * c) % 256 for a, b, c in ((3, 5, 1), (7, 2, 2), (1, 9, 3))]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def check_exam(checkpoint: Checkpoint, vocabulary: int) -> Exam:
    """The questions, the same on every machine: numbers by arithmetic, none drawn."""
    family, config, tokens = checkpoint.family, checkpoint.config, ROWS * COLUMNS
    grid = (1, ROWS * checkpoint.merge_size, COLUMNS * checkpoint.merge_size)
    levels = 1 + family.dimensions(config).deepstack
    places = torch.arange(levels * tokens * checkpoint.hidden_size, dtype=torch.float64)
    rows = (math.sqrt(2) * torch.sin(places * places % 9973)).float().view(levels, tokens, -1)
    singles = tuple((number * vocabulary // _CHOICES,) for number in range(_CHOICES))
    pair = (3, vocabulary - 2) if vocabulary > 8 * _CHOICES else (1, 1)
    questions = []
    for length in _QUESTIONS:
        total = 1 + tokens + length
        ids = tuple(7919 * (place + length) % vocabulary for place in range(1, total))
        positions, following = family.positions(config, total, [(1, grid)])
        questions.append(Question((0, *ids), (*singles, pair), positions, following))
    return Exam(grid, rows, tuple(questions))


def plain_scores(plain: Plain, exam: Exam) -> list[float]:
    """Log-probabilities of all choices of all questions, by a half's plain form."""
    prompts = []
    for question in exam.questions:
        first = question.choices[-1][0]
        positions = torch.from_numpy(np.array(question.positions))
        further = torch.full((len(positions), 1), question.next_position)
        ids = (*question.token_ids, first)
        prompts.append(PlainPrompt(ids, 1, exam.rows, torch.cat([positions, further], dim=1), last=2))
    return scores_of(plain.logits(prompts), exam)


def scores_of(logits: Sequence[torch.Tensor], exam: Exam) -> list[float]:
    """From the logits [2, vocabulary] of each question's last token, and of the pair's first after it."""
    found: list[float] = []
    for each, question in zip(logits, exam.questions, strict=True):
        asked, then = each.double().log_softmax(-1)
        *singles, (first, second) = question.choices
        found += [float(asked[number]) for (number,) in singles]
        found.append(float(asked[first] + then[second]))
    return found


def watched(checkpoint: Checkpoint, half: Half, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint, to load a half from in a compute dtype and to check it by: what is expected of the half is
    computed while it is loaded, unless that is recorded. A family that reads weights by itself has them read again."""
    make = getattr(checkpoint.family, "plain", None)
    recorded_already = recorded.read(checkpoint, half) is not None
    if make is None or recorded_already or getattr(checkpoint.family, "checks_itself", False):
        return checkpoint
    return replace(checkpoint, witness=_PlainForm(checkpoint, half, dtype))


class _PlainForm:
    """A `Witness` that computes a half's plain form."""

    def __init__(self, checkpoint: Checkpoint, half: Half, dtype: torch.dtype) -> None:
        self._checkpoint, self._half, self._dtype = checkpoint, half, dtype
        self.numbers: Sequence[float] | None = None

    def __call__(self, half: Half, weights: Mapping[str, torch.Tensor]) -> None:
        if half is not self._half:
            return
        self._hold_to_files(weights)
        checkpoint = replace(self._checkpoint, held=weights)
        plain: Plain | None = checkpoint.family.plain(checkpoint, self._dtype)  # type: ignore[attr-defined]
        if plain is not None and half is Half.VISION:
            self.numbers = plain.rows(check_image(checkpoint)).flatten().tolist()
        elif plain is not None:
            vocabulary = weights[HEAD if HEAD in weights else EMBEDDING].shape[0]
            self.numbers = plain_scores(plain, check_exam(checkpoint, vocabulary))

    def _hold_to_files(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raises SelfCheckFailed naming a tensor that is not the file's, of those that are stored as they are."""
        added = self._checkpoint.adapter.added[self._half] if self._checkpoint.adapter is not None else {}
        for name, entry in self._checkpoint.half_entries(self._half).items():
            if not isinstance(entry, TensorEntry) or name in added or name not in weights:
                continue
            held = weights[name] if weights[name].shape == entry.shape else weights[name].mT
            count = held.numel()
            for start in {0, max(0, count // 2 - _SAMPLED), max(0, count - _SAMPLED)}:
                stored = _stored(entry, start, min(_SAMPLED, count - start))
                if not torch.equal(_some(held, start, len(stored)), stored.to(self._dtype).double()):
                    raise SelfCheckFailed(
                        f"self-check of the {self._half.value} half failed: tensor {entry.stored_name!r} was loaded "
                        f"with other values than {entry.file} has. Nothing is served. Start it again; if that fails, "
                        "download the checkpoint again"
                    )


def _stored(entry: TensorEntry, start: int, count: int) -> torch.Tensor:
    """Float64 [count] of a stored tensor's numbers in order, each exactly."""
    width = DTYPE_BYTES[entry.dtype]
    raw = read_bytes(replace(entry, offset=entry.offset + start * width, nbytes=count * width))
    if entry.dtype == "BF16":  # the upper half of a float32
        numbers = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.dtype])
    return torch.from_numpy(numbers.astype(np.float64))


def _some(tensor: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Float64 [count] of a tensor's numbers in order."""
    if tensor.is_contiguous():
        found = tensor.detach().view(-1)[start : start + count]
    else:
        places = np.unravel_index(np.arange(start, start + count), tensor.shape)
        found = tensor.detach()[tuple(torch.from_numpy(place).to(tensor.device) for place in places)]
    return found.to("cpu", torch.float64)


def check_encoder(checkpoint: Checkpoint, encoder: VisionEncoder, quantization: str) -> str:
    """Hold a loaded vision half to its weights; what came of it, as `check_half`. Raises SelfCheckFailed."""
    image = check_image(checkpoint)

    def found() -> Sequence[float]:
        pixels = image.width * image.height
        [rows] = encoder.encode([encoder.prepare(image, pixels, pixels)])
        return rows.float().flatten().tolist()

    return check_half(
        checkpoint,
        Half.VISION,
        encoder.dtype,
        quantization,
        found=found,
        by_plain=lambda plain: plain.rows(image).flatten().tolist(),
    )


def check_half(
    checkpoint: Checkpoint,
    half: Half,
    dtype: torch.dtype,
    quantization: str,
    *,
    found: Callable[[], Sequence[float]],
    by_plain: Callable[[Plain], Sequence[float]],
) -> str:
    """Compare what a half computes with what is recorded of it, or else with its plain form; what came of it, for the
    log's line of a service that is ready. Raises SelfCheckFailed naming the check, the difference and the bound."""
    began = time.perf_counter()
    expected: Sequence[float] | None = recorded.read(checkpoint, half)
    against: Literal["its record", "its plain form"] = "its record"
    if expected is None and isinstance(checkpoint.witness, _PlainForm) and checkpoint.witness.numbers is not None:
        against, expected = "its plain form", checkpoint.witness.numbers
    if expected is None:
        against, plain = "its plain form", _plain(checkpoint, half, dtype)
        if plain is None:
            return "left out"
        expected = by_plain(plain)
    scale = spread(expected) if half is Half.LANGUAGE else None
    worst, bound = difference(found(), expected, scale), bound_of(dtype_name(dtype), quantization)
    taken = round((time.perf_counter() - began) * 1000, 1)
    if not worst <= bound:
        raise SelfCheckFailed(failure(half, against, worst, bound, dtype))
    _log.debug("self-check passed", half=half.value, against=against, difference=f"{worst:.2g}", bound=bound, ms=taken)
    return f"{worst:.2g} from {against} (bound {bound:g}), {taken:g} ms"


def check_language_vectors(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantization: str,
    pooling: Pooling,
    exam: Exam,
    found: Callable[[], Sequence[float]],
) -> str:
    """Compare the vectors of an embedding model with those by its plain form; what came of it, as `check_half`. Raises
    SelfCheckFailed. (What is recorded of a half are log-probabilities, which such a model has none of.)"""
    began, plain = time.perf_counter(), _plain(checkpoint, Half.LANGUAGE, dtype)
    if plain is None:
        return "left out"
    prompts = [
        PlainPrompt(
            question.token_ids,
            1,
            exam.rows,
            torch.from_numpy(np.array(question.positions)),
            last=1 if pooling == "last" else len(question.token_ids),
        )
        for question in exam.questions
    ]
    rows = cast("PlainVectors", plain).rows_for_head(prompts)
    pooled = [each.mean(0, keepdim=True) if pooling == "mean" else each for each in rows]
    expected = torch.cat([torch.nn.functional.normalize(each, dim=-1).flatten() for each in pooled]).tolist()
    # of a vector of length 1 no number is large: what is wrong altogether would not differ by much
    worst, bound = difference(found(), expected, max(map(abs, expected))), bound_of(dtype_name(dtype), quantization)
    taken = round((time.perf_counter() - began) * 1000, 1)
    if not worst <= bound:
        what = "vectors of two prompts about one image"
        raise SelfCheckFailed(failure(Half.LANGUAGE, "its plain form", worst, bound, dtype, what))
    return f"{worst:.2g} from its plain form (bound {bound:g}), {taken:g} ms"


def failure(half: Half, against: str, worst: float, bound: float, dtype: torch.dtype, what: str = "") -> str:
    """What an operator is told; `what` differs, where it is not what a half that answers is asked."""
    asked = "log-probabilities of two questions about one image"
    what = what or ("the rows of an image" if half is Half.VISION else asked)
    return (
        f"self-check of the {half.value} half failed: {what} differ from {against} by {worst:.2g}, "
        f"the bound in {dtype_name(dtype)} is {bound:g}. Nothing is served. "
        "Try --kernels torch, which leaves out kernels compiled for this machine; `lookonce verify MODEL` says more, "
        "--self-check off serves it all the same"
    )


def _plain(checkpoint: Checkpoint, half: Half, dtype: torch.dtype) -> Plain | None:
    """None, with the reason logged: the family has none, or it would take too long. One that checks its halves as it
    loads them has none either."""
    if getattr(checkpoint.family, "checks_itself", False):
        return None
    stored, make = checkpoint.weight_bytes(half), getattr(checkpoint.family, "plain", None)
    plain: Plain | None = make(checkpoint, dtype) if make is not None else None
    if plain is None:
        reason = f"{checkpoint.family.model_type} has no plain form of it"
    elif stored > MOST_BYTES:
        reason = f"its plain form would read {format_size(stored)} again"
    else:
        return plain
    _log.warning("self-check left out: `lookonce verify MODEL --record` makes one", half=half.value, reason=reason)
    return None
