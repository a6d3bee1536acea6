"""`lookonce demo`: the whole system on this machine, two images, eight questions each, every answer checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lookonce.cli.console import fail, note, printable, say
from lookonce.core.errors import ErrorKind, LookonceError

HELP = """Start everything on the embedded store, ask two images eight questions each, and check every answer.

\b
  lookonce demo
  lookonce demo --keep                          stays up, for your own images
  lookonce demo --model ./Qwen2-VL-2B-Instruct  the truth is then the unsplit model's answer

Prints each question with its answer, the truth, whether embedding and prefix were found in a cache, and the time; then
the time of the unsplit model for the same, with as many threads. Exit status 0 only if all answers are right.
"""
IMAGES, QUESTIONS_EACH = 2, 8
MAX_TOKENS = 32
MIN_TABLE_WIDTH = 160


@dataclass
class Row:
    """One question of the demo."""

    image: Path
    question: str
    truth: str | None
    answer: str
    receipt: dict[str, Any]
    ms: float


def demo(
    model: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_MODEL", metavar="MODEL", help="Checkpoint; unset: the bundled one.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up afterwards, until Ctrl-C.")] = False,
    port: Annotated[
        int,
        typer.Option(envvar="LOOKONCE_PORT", metavar="PORT", min=0, max=65535, help="Gateway's port; 0: a free one."),
    ] = 0,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Compute dtype, here and in the unsplit model.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(envvar="LOOKONCE_DEVICE", metavar="DEVICE", help="auto, cpu, cuda ...")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="LOOKONCE_THREADS",
            metavar="N",
            min=1,
            max=1024,
            help="CPU threads of each model, here and of the unsplit one; unset: OMP_NUM_THREADS, or the cores.",
        ),
    ] = None,
) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="lookonce-demo-", ignore_cleanup_errors=True) as directory:
            right = _run(Path(directory), model, keep, port, dtype, device, threads or default_threads())
    except LookonceError as error:
        fail(error.message)
    raise typer.Exit(0 if right else 1)


def default_threads() -> int:
    """What OMP_NUM_THREADS says, or as many as this process may use cores."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # further numbers are for nested teams
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _run(directory: Path, model: str | None, keep: bool, port: int, dtype: str, device: str, threads: int) -> bool:
    from lookonce.cli.api import Api
    from lookonce.cli.system import started
    from lookonce.core.sample_images import same_answer

    source, samples = choose(directory, model)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise LookonceError(ErrorKind.INVALID_ARGUMENT, f"--dtype={dtype!r}: use float32, bfloat16 or float16")
    arguments = ["--model", source, "--port", str(port), "--dtype", dtype, "--device", device]
    arguments += ["--threads", str(threads)]
    with started(directory / "data", arguments) as system, Api(system.url) as api:
        begun = time.perf_counter()
        rows = [row for sample in samples[:IMAGES] for row in _ask(api, sample)]
        split_seconds = time.perf_counter() - begun
        note("lookonce: asking the unsplit model the same, for comparison")
        baseline = unsplit(source, dtype, device, threads, [(row.image, row.question) for row in rows])
        for row, unsplit_answer in zip(rows, baseline["answers"], strict=True):
            row.truth = unsplit_answer["text"] if row.truth is None else row.truth
        right = sum(same_answer(row.answer, row.truth or "") for row in rows)
        same = sum(row.answer == other["text"] for row, other in zip(rows, baseline["answers"], strict=True))
        show(rows)
        unsplit_seconds = sum(other["ms"] for other in baseline["answers"]) / 1000
        say(f"{right} of {len(rows)} answers right; {same} of {len(rows)} equal the unsplit model's.")
        say(
            f"lookonce, uploads included: {split_seconds:.2f} s.  The unsplit model by transformers, loaded and warm, "
            f"one question after the other: {unsplit_seconds:.2f} s ({unsplit_seconds / split_seconds:.1f}x)."
        )
        say(f"Both in {dtype} on {baseline['device']}, with {_threads(baseline['threads'])} for each model.")
        if keep:
            say(f"Playground: {system.url}/   (Ctrl-C ends)")
            _wait_for_signal()
    return right == len(rows)


def choose(directory: Path, model: str | None) -> tuple[str, list[Any]]:
    """Checkpoint and samples: the bundled ones, or the checkpoint named and images drawn into `directory`."""
    from lookonce.cli.model import default_model
    from lookonce.core import sample_images
    from lookonce.models.checkpoint.check import check_checkpoint

    if model is not None:
        path = next(iter(check_checkpoint(model).usable().values())).path
        if not (path / "tokenizer_config.json").is_file():
            raise LookonceError(
                ErrorKind.INVALID_ARGUMENT, "--model: the demo needs a whole checkpoint, not split halves"
            )
        return str(path), sample_images.drawn_samples(directory)
    return default_model(), sample_images.bundled_samples()


def unsplit(model: str, dtype: str, device: str, threads: int, items: list[tuple[Path, str]]) -> dict[str, Any]:
    """Answers and times of the unsplit model, from a process of its own."""
    job: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "threads": threads}
    job["max_tokens"] = MAX_TOKENS
    job["items"] = [{"image": str(image), "question": question} for image, question in items]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lookonce.cli.baseline"], input=json.dumps(job), capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise LookonceError(ErrorKind.UNAVAILABLE, f"the unsplit model failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lookonce.core.sample_images import same_answer

    table = Table("image", "question", "answer", "truth", "embedding", "prefix", "ms")
    for row in rows:
        colour = "green" if same_answer(row.answer, row.truth or "") else "red"
        answer = f"[{colour}]{escape(_short(row.answer))}[/]"
        hits = (str(row.receipt.get("embedding", "?")), str(row.receipt.get("prefix", "?")))
        texts = (escape(row.image.name), escape(row.question), answer, escape(_short(row.truth or "")))
        table.add_row(*texts, *hits, f"{row.ms:.0f}")
    console = Console()
    console.width = max(console.width, MIN_TABLE_WIDTH)
    console.print(table)


def _ask(api: Any, sample: Any) -> list[Row]:
    uploaded = api.upload(sample.path.read_bytes())
    size = f"{uploaded['width']}x{uploaded['height']}, {uploaded['tokens']} tokens"
    encoded = "embedding found" if uploaded["cached"] else f"encoded in {uploaded['encode_ms']:.0f} ms"
    note(f"lookonce: {sample.path.name}: {size}, {encoded}")
    rows = []
    for question, truth in sample.questions[:QUESTIONS_EACH]:
        begun = time.perf_counter()
        [answer] = api.ask(uploaded["id"], [{"text": question, "temperature": 0, "max_tokens": MAX_TOKENS}])
        ms = (time.perf_counter() - begun) * 1000
        if answer.get("error"):
            raise LookonceError(ErrorKind.UNAVAILABLE, f"{question!r}: {answer['error'].get('message')}")
        rows.append(Row(sample.path, question, truth, answer["text"], answer.get("receipt") or {}, ms))
    return rows


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _short(text: str, limit: int = 48) -> str:
    line = " ".join(text.split())
    line = printable(line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _wait_for_signal() -> None:
    ending = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    signal.sigwait(ending)
