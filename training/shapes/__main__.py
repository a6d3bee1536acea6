"""The whole recipe from nothing: tokenizer, the stages, export, evaluation. `python -m training.shapes --help`."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .evaluate import BUNDLED

SIDE_BY_SIDE = ("language", "vision")  # neither needs the other's result


def commands(work: Path, out: Path, scale: float, scenes: int, ranks: int) -> dict[str, list[str]]:
    """Module and arguments of each step by the step's name; `scale` stretches or shrinks every stage's minutes."""

    def minutes(value: float) -> list[str]:
        return ["--minutes", f"{value * scale:.2f}"]

    def shared(value: float) -> list[str]:
        return [*minutes(value / ranks), "--ranks", str(ranks)]

    def kept(name: str) -> str:
        return str(work / f"{name}.safetensors")

    words = ["--tokenizer", str(work / "tokenizer.json")]
    evaluation = str(work / "evaluation.json")
    worn = ["--weights", "lists", "--alike", "0.5", "--worn", "0.15", "--variety", "0.35", "--length", "260"]
    gentle = ["--rate", "0.006", "--vision-rate", "0.2", "--helper", "0.3", "--flat", "0.15", "--seed", "5"]
    return {
        "language": ["stage_language", "--out", kept("language"), *words, *minutes(20)],
        "vision": ["stage_vision", "--out", kept("vision"), *minutes(25)],
        "joint": [
            *("stage_joint", "--start", kept("vision"), kept("language"), "--out", kept("joint")),
            *(*words, *shared(40)),
        ],
        "deepen": ["deepen", "--state", kept("joint"), "--out", kept("deep")],
        "answers": ["stage_answers", "--start", kept("deep"), "--out", kept("answers"), *words, *shared(24)],
        "finish": [
            *("stage_joint", "--start", kept("answers"), "--out", kept("finish")),
            *(*words, *shared(40), *worn, *gentle),
        ],
        "export": ["export", "--state", kept("finish"), *words, "--out", str(out)],
        "evaluate": ["evaluate", "--checkpoint", str(out), "--scenes", str(scenes), "--out", evaluation],
        "card": ["card", "--checkpoint", str(out), "--evaluation", evaluation],
    }


def run(steps: dict[str, list[str]]) -> None:
    """Run these steps at the same time, and fail if one of them does; what they print goes on as it comes."""
    begun = time.monotonic()
    running = {}
    for name, (module, *arguments) in steps.items():
        print(f"== {name}: {module} {' '.join(arguments)}", flush=True)
        running[name] = subprocess.Popen([sys.executable, "-m", f"training.shapes.{module}", *arguments])
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; mend that and go on with --from {failed[0]}")
    print(f"== {', '.join(steps)}: {(time.monotonic() - begun) / 60:.1f} minutes by the clock", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("checkpoints/shapes"), help="folder for stages' results")
    parser.add_argument(
        "--out", type=Path, help=f"checkpoint folder to write (default: WORK/out; the bundled one is {BUNDLED})"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the minutes of every stage")
    parser.add_argument(
        "--ranks",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="cores to use: the first two stages run side by side, the others share their work (default: %(default)s)",
    )
    parser.add_argument("--scenes", type=int, default=2000, help="fresh scenes to evaluate on")
    parser.add_argument("--from", dest="first", default="language", help="step to begin with, to resume")
    args = parser.parse_args()
    steps = commands(args.work, args.out or args.work / "out", args.scale, args.scenes, args.ranks)
    if args.first not in steps:
        parser.error(f"--from: unknown step {args.first!r}; known: {', '.join(steps)}")
    args.work.mkdir(parents=True, exist_ok=True)
    todo = list(steps)[list(steps).index(args.first) :]
    if args.ranks > 1 and todo[: len(SIDE_BY_SIDE)] == list(SIDE_BY_SIDE):
        run({name: steps[name] for name in SIDE_BY_SIDE})
        todo = todo[len(SIDE_BY_SIDE) :]
    for name in todo:
        run({name: steps[name]})


if __name__ == "__main__":
    main()
