"""The whole recipe from nothing: tokenizer, the stages, export, evaluation. `python -m training.shapes --help`."""

import argparse
import subprocess
import sys
from pathlib import Path

from .evaluate import BUNDLED


def commands(work: Path, out: Path, scale: float, scenes: int) -> dict[str, list[str]]:
    """Module and arguments of each step by the step's name; `scale` stretches or shrinks every stage's minutes."""

    def minutes(value: float) -> list[str]:
        return ["--minutes", f"{value * scale:.2f}"]

    def kept(name: str) -> str:
        return str(work / f"{name}.safetensors")

    words = ["--tokenizer", str(work / "tokenizer.json")]
    evaluation = str(work / "evaluation.json")
    worn = ["--weights", "lists", "--alike", "0.5", "--worn", "0.15", "--variety", "0.35", "--length", "260"]
    gentle = ["--rate", "0.006", "--vision-rate", "0.2", "--helper", "0.3", "--flat", "0.15", "--seed", "5"]
    return {
        "language": ["stage_language", "--out", kept("language"), *words, *minutes(20)],
        "vision": ["stage_vision", "--out", kept("vision"), *minutes(30)],
        "joint": [
            *("stage_joint", "--start", kept("vision"), kept("language"), "--out", kept("joint")),
            *(*words, *minutes(60)),
        ],
        "deepen": ["deepen", "--state", kept("joint"), "--out", kept("deep")],
        "answers": ["stage_answers", "--start", kept("deep"), "--out", kept("answers"), *words, *minutes(25)],
        "finish": [
            *("stage_joint", "--start", kept("answers"), "--out", kept("finish")),
            *(*words, *minutes(40), *worn, *gentle),
        ],
        "export": ["export", "--state", kept("finish"), *words, "--out", str(out)],
        "evaluate": ["evaluate", "--checkpoint", str(out), "--scenes", str(scenes), "--out", evaluation],
        "card": ["card", "--checkpoint", str(out), "--evaluation", evaluation],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("checkpoints/shapes"), help="folder for stages' results")
    parser.add_argument(
        "--out", type=Path, help=f"checkpoint folder to write (default: WORK/out; the bundled one is {BUNDLED})"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the minutes of every stage")
    parser.add_argument("--scenes", type=int, default=2000, help="fresh scenes to evaluate on")
    parser.add_argument("--from", dest="first", default="language", help="step to begin with, to resume")
    args = parser.parse_args()
    steps = commands(args.work, args.out or args.work / "out", args.scale, args.scenes)
    if args.first not in steps:
        parser.error(f"--from: unknown step {args.first!r}; known: {', '.join(steps)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in list(steps)[list(steps).index(args.first) :]:
        module, *arguments = steps[name]
        print(f"== {name}: {' '.join(steps[name])}", flush=True)
        subprocess.run([sys.executable, "-m", f"training.shapes.{module}", *arguments], check=True)


if __name__ == "__main__":
    main()
