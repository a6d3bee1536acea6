"""Results as a run would have left them, without a model: for the report."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from PIL import Image

from lookonce.core.identity import image_digest
from lookonce.moderation.batch.ledger import Full
from lookonce.moderation.batch.outcome import Failure, Outcome, Row
from lookonce.moderation.batch.output_formats import Columns
from lookonce.moderation.batch.parts import Output
from lookonce.moderation.batch.run import Run
from lookonce.moderation.batch.run_identity import Identity, Manifest, Models
from lookonce.moderation.batch.sources.opening import open_source
from lookonce.moderation.policy import parse_policy

POLICY = """
name: "<b>spoons</b> & forks"
description: Made up.
rules:
- {id: spoon, question: "Is there a spoon?", threshold: 0.5, severity: high, follow_up: "Which?"}
- {id: fork, question: "Is there a fork?", threshold: 0.8, severity: low}
"""
HOSTILE = "<script>window.hacked=1<script><img src=x onerror=window.hacked=1>.png"


def write_results(folder: Path, count: int = 40, name: str = "results.parquet") -> Path:
    """`count` images in FOLDER/images, one of them broken, one twice, one with markup for a name; the results."""
    output, manifest, rows = _made(folder, count, name, part_rows=1000)
    columns = Columns(manifest)
    output.write_part(0, columns, rows)
    output.finish(1, columns)
    output.release()
    return output.out


def begin_results(folder: Path, rows: int, part_rows: int, name: str = "results.parquet") -> Path:
    """The same, of a run that was killed when it had so many rows."""
    output, manifest, made = _made(folder, 40, name, part_rows)
    outcomes = {row.digest: outcome for row, outcome, *_ in made[:rows]}

    async def record() -> None:
        run = Run(output, manifest)
        run.listed(len(made))
        await run.record([row for row, *_ in made[:rows]], outcomes)
        run.close()

    asyncio.run(record())
    return output.out


def _made(folder: Path, count: int, name: str, part_rows: int) -> tuple[Output, Manifest, list[Full]]:
    images = folder / "images"
    images.mkdir()
    for number in range(count):
        file = HOSTILE if number == 3 else f"{number:03}.png"
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (number * 6 % 256, 90, 200)).save(buffer, "PNG")
        (images / file).write_bytes(b"broken" if number == 5 else buffer.getvalue())
    (images / "zzz.png").write_bytes((images / "000.png").read_bytes())
    source = open_source(str(images))
    extent = source.extent()
    models = Models("v" * 64, "l" * 64, 1_000_000, "made-up")
    policy = parse_policy(POLICY)
    output = Output(folder / name)
    parts = (source.description, extent.digest, extent.count, policy.digest, models, output.form, part_rows)
    manifest = Manifest(Identity(*parts), policy, {"max_bytes": 1 << 20})
    output.claim()
    output.begin(manifest)
    return output, manifest, [_row(number, name) for number, (name, _) in enumerate(source.entries())]


def _row(number: int, name: str) -> Full:
    data = Path(name).read_bytes()
    row = Row(number, name, image_digest(data))
    if data == b"broken":
        return row, Outcome(failure=Failure("image_invalid", "no image")), None, None
    copy = name.endswith("zzz.png")
    spoon = 0.0 if copy else number % 10 / 10
    words = {"spoon": "a <i>silver</i> spoon"} if spoon >= 0.5 else {}
    outcome = Outcome(40, 30, {"spoon": spoon, "fork": (number % 5) / 5}, words)
    first = str(Path(name).with_name("000.png"))
    return row, outcome, 0 if copy else None, first if copy else None
