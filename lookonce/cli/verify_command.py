"""`lookonce verify`: the split model against the unsplit one, at length."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.cli.console import fail, note, say
from lookonce.core.errors import CheckpointError, ErrorKind, LookonceError, invalid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lookonce.cli.split_answers import Item
    from lookonce.models.checkpoint import Checkpoint

HELP = """Hold the split model to the unsplit one: transformers' own class over the whole checkpoint.

\b
  lookonce verify                                         the bundled shapes model
  lookonce verify ./Qwen2-VL-2B-Instruct
  lookonce verify ./my-finetune --image cat.jpg --image plan.png --question "What is written there?"
  lookonce verify ./my-finetune --halves ./halves --record
  lookonce verify ./base --adapter ./my-lora
  lookonce verify ./my-finetune --quantization int8       within what int8 rounds

Starts the services on MODEL, asks them about each image, ends them, and gives the unsplit model the same: rows of the
vision tower, log-probabilities of the likeliest tokens in each place of the answers, greedy tokens, scores of choices.
One line per check: the largest difference and its bound. Exit status 1 when one fails.

--record writes down beside each half what the unsplit model computes on the image of the check at start. Services that
find it compare with that, in milliseconds; others compute their weights' plain form, which reads them all again.
`lookonce split` takes the record of a whole checkpoint along.
"""
CHOICES = ("yes", "no", "a red circle")
QUESTIONS = ("What is in the image?", "Is there a circle?")
_BUNDLED_QUESTIONS = 2


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    compared: int  # numbers
    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for a difference that is not a number, too."""
        return self.difference <= self.bound


def verify(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Local directory or hub id of the whole checkpoint; unset: the bundled."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Image to ask about, may be repeated; unset: samples.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Asked about each image, may be repeated.")
    ] = None,
    halves: Annotated[
        str | None, typer.Option(metavar="DIR", help="What `lookonce split` wrote of MODEL, to be verified instead.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Compute dtype of both: float32, bfloat16 or float16.")
    ] = "float32",
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="LoRA adapter, merged into both models.")
    ] = None,
    quantization: Annotated[
        str, typer.Option(metavar="KIND", help="Of the split model's matrices: none or int8.")
    ] = "none",
    device: Annotated[
        str, typer.Option(envvar="LOOKONCE_DEVICE", metavar="DEVICE", help="auto, cpu, cuda ...")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Most tokens of an answer.")] = 16,
    threads: Annotated[
        int | None, typer.Option(envvar="LOOKONCE_THREADS", metavar="N", min=1, help="CPU threads of each model.")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Write what the check at start compares with.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="VALUE", help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Compare, and print a line for each check."""
    from lookonce.cli.demo import default_threads

    if dtype not in ("float32", "bfloat16", "float16"):
        fail(f"--dtype={dtype!r}: use float32, bfloat16 or float16", code=2)
    if quantization not in ("none", "int8"):
        fail(f"--quantization={quantization!r}: use none or int8", code=2)
    if record and (dtype, quantization) != ("float32", "none"):
        fail("--record is made in float32: leave out --dtype and --quantization", code=2)
    if record and adapter is not None:
        fail("--record is made of a checkpoint without an adapter: leave out --adapter", code=2)
    try:
        with tempfile.TemporaryDirectory(prefix="lookonce-verify-", ignore_cleanup_errors=True) as directory:
            whole = _whole(model, revision, adapter)
            items = _items(Path(directory), model, image or [], question or [])
            job = {"model": str(whole.path), "dtype": dtype, "device": device, "threads": threads or default_threads()}
            job |= {"adapter": str(whole.adapter.path.absolute()) if whole.adapter is not None else None}
            unsplit_class = _unsplit(job)["class"]
            served = halves or str(whole.path)
            checks = _run(Path(directory), whole, served, items, job, max_tokens, quantization, record=record)
    except LookonceError as error:
        fail(error.message)
    passed = all(check.passed for check in checks)
    if as_json:
        lines = [asdict(check) | {"passed": check.passed} for check in checks]
        for line in lines:
            line["difference"] = line["difference"] if math.isfinite(line["difference"]) else None
        result = {"model": served, "class": unsplit_class, "dtype": dtype, "quantization": quantization}
        result |= {"passed": passed, "checks": lines}
        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        how = dtype if quantization == "none" else f"{dtype}, its own matrices in {quantization}"
        _print(checks, f"{served} against {unsplit_class} in {how}, {len(items)} questions")
    raise typer.Exit(0 if passed else 1)


def _whole(model: str | None, revision: str | None, adapter: str | None) -> Checkpoint:
    from lookonce.cli.model import default_model
    from lookonce.models.checkpoint.check import check_checkpoint
    from lookonce.models.registry import Half

    if importlib.util.find_spec("transformers") is None:
        raise LookonceError(
            ErrorKind.UNSUPPORTED, "verify compares with transformers, which is not installed here: pip install it"
        )
    model = model or default_model()
    found = check_checkpoint(model, revision=revision, adapter=adapter).usable()
    if found[Half.VISION] is not found[Half.LANGUAGE]:
        raise CheckpointError(f"{model} is split: give the whole checkpoint, and this directory as --halves")
    return found[Half.LANGUAGE]


def _items(directory: Path, model: str | None, images: Sequence[Path], questions: Sequence[str]) -> list[Item]:
    from lookonce.cli.split_answers import Item
    from lookonce.core import sample_images

    for image in images:
        if not image.is_file():
            raise invalid(f"--image={image}: there is no such file", param="image")
    if images:
        return [Item(image, text, CHOICES) for image in images for text in questions or QUESTIONS]
    samples = sample_images.bundled_samples()[:2] if model is None else sample_images.drawn_samples(directory)
    return [
        Item(sample.path, text, CHOICES)
        for sample in samples
        for text in (questions or [text for text, _ in sample.questions[:_BUNDLED_QUESTIONS]])
    ]


def _run(
    directory: Path,
    whole: Checkpoint,
    served: str,
    items: list[Item],
    job: dict[str, Any],
    max_tokens: int,
    quantization: str,
    *,
    record: bool,
) -> list[Check]:
    """The services first, then, when they have ended, the unsplit model: never both in memory."""
    from lookonce.cli.split_answers import ask
    from lookonce.cli.system import started

    arguments = ["--model", served, "--port", "0", "--dtype", job["dtype"], "--device", job["device"]]
    arguments += ["--threads", str(job["threads"]), "--max-pixels", str(whole.max_pixels)]
    arguments += ["--vision-quantization", quantization, "--lm-quantization", quantization]
    arguments += ["--adapter", job["adapter"]] if job["adapter"] else []
    note("lookonce: starting the split model")
    with started(directory / "data", arguments) as system:
        rows = asyncio.run(ask(system, items, max_tokens, _tell))
    numbers = ("tokens", "top", "choices", "question")
    asked = [{name: getattr(item, name) for name in numbers} | {"image": str(item.image)} for item in items]
    source = str(whole.path) if record else None
    result = _unsplit(job | {"items": asked, "rows": str(directory), "record": source})
    checks = _compared(directory, items, rows, result["answers"], job["dtype"], quantization)
    if record and all(check.passed for check in checks):
        _record(served, result["recorded"])
    elif record:
        note("lookonce: nothing was recorded: a check failed")
    return checks


def _unsplit(job: dict[str, Any]) -> dict[str, Any]:
    """What `python -m lookonce.cli.unsplit` answers. Raises LookonceError."""
    command = [sys.executable, "-P", "-m", "lookonce.cli.unsplit"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RuntimeError("pipes were asked for")
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        for line in process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise LookonceError(ErrorKind.UNSUPPORTED, said["error"])
            if "result" in said:
                result: dict[str, Any] = said["result"]
                return result
            _tell(said["note"])
    raise LookonceError(ErrorKind.UNAVAILABLE, "the unsplit model's process ended without a result; is memory short?")


def _compared(
    directory: Path,
    items: Sequence[Item],
    rows: dict[Path, NDArray[np.float32]],
    answers: Sequence[dict[str, Any]],
    dtype: str,
    quantization: str = "none",
) -> list[Check]:
    import numpy as np

    from lookonce.models.tolerance import bound_of, difference, spread

    bound = bound_of(dtype, quantization)

    def check(name: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]], scale: float | None) -> Check:
        worst = [difference(found, expected, scale) for found, expected in pairs]
        compared = sum(len(found) for found, _ in pairs)
        return Check(name, compared, max(worst, key=lambda x: math.inf if math.isnan(x) else x, default=0.0), bound)

    both = list(zip(items, answers, strict=True))
    towers, deepstacks = [], []
    for number, found in enumerate(rows.values()):
        expected = np.fromfile(directory / f"{number}.f32", dtype=np.float32)
        parts = np.array_split(expected, len(found))
        pairs = [(ours.flatten().tolist(), theirs.tolist()) for ours, theirs in zip(found, parts, strict=True)]
        towers.append(pairs[0])
        deepstacks += pairs[1:]
    likeliest = [pair for item, answer in both for pair in zip(item.top_logprobs, answer["top"], strict=True)]
    greedy = [(answer["token_logprobs"], answer["best_logprobs"]) for _, answer in both]
    scores = [(item.scores, answer["scores"]) for item, answer in both]
    exact = (dtype, quantization) == ("float32", "none")
    scale = 1.0 if exact else spread([logprob for answer in answers for logprob in answer["sample"]])
    return [
        check("rows of the vision tower", towers, None),
        *([check("rows of the deepstack", deepstacks, None)] if deepstacks else []),
        check("log-probabilities of tokens", likeliest, scale),
        check("greedy tokens", greedy, scale),
        check("scores of choices", scores, scale),
    ]


def _record(served: str, recorded: dict[str, list[float]]) -> None:
    from lookonce.models.checkpoint import recorded as records
    from lookonce.models.checkpoint.check import check_checkpoint

    halves = check_checkpoint(served).usable()
    for half, checkpoint in ((half, each) for half, each in halves.items() if half.value in recorded):
        note(f"lookonce: recorded {records.write(checkpoint, half, recorded[half.value])}")


def _print(checks: Sequence[Check], title: str) -> None:
    say(title)
    for check in checks:
        label = typer.style("ok  " if check.passed else "fail", fg="green" if check.passed else "red")
        found = f"{check.difference:.2g}"
        typer.echo(f"{label} {check.name:<28} {check.compared:>9,} numbers  differ by {found:<8} bound {check.bound:g}")


def _tell(text: str) -> None:
    note(f"lookonce: {text}")
