"""The whole recipe from nothing: tokenizer, three stages, export, evaluation. `python -m training.shapes --help`."""

import argparse
import subprocess
import sys
from pathlib import Path

BUNDLED = Path(__file__).resolve().parents[2] / "lookonce" / "data" / "shapes"


def commands(work: Path, out: Path, scale: float, scenes: int) -> dict[str, list[str]]:
    """Arguments of each step by its module's name; `scale` stretches or shrinks every stage's minutes."""

    def minutes(value: float) -> str:
        return f"{value * scale:.2f}"

    tokenizer = str(work / "tokenizer.json")
    vision, language, joint = (str(work / f"{name}.safetensors") for name in ("vision", "language", "joint"))
    return {
        "stage_language": ["--out", language, "--tokenizer", tokenizer, "--minutes", minutes(20)],
        "stage_vision": ["--out", vision, "--minutes", minutes(30)],
        "stage_joint": [
            "--start",
            vision,
            language,
            "--out",
            joint,
            "--tokenizer",
            tokenizer,
            "--minutes",
            minutes(60),
        ],
        "export": ["--state", joint, "--tokenizer", tokenizer, "--out", str(out)],
        "evaluate": ["--checkpoint", str(out), "--scenes", str(scenes), "--out", str(work / "evaluation.json")],
        "card": ["--checkpoint", str(out), "--evaluation", str(work / "evaluation.json")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("checkpoints/shapes"), help="folder for stages' results")
    parser.add_argument(
        "--out", type=Path, help=f"checkpoint folder to write (default: WORK/out; the bundled one is {BUNDLED})"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the minutes of every stage")
    parser.add_argument("--scenes", type=int, default=2000, help="fresh scenes to evaluate on")
    parser.add_argument("--from", dest="first", default="stage_language", help="step to begin with, to resume")
    args = parser.parse_args()
    steps = commands(args.work, args.out or args.work / "out", args.scale, args.scenes)
    if args.first not in steps:
        parser.error(f"--from: unknown step {args.first!r}; known: {', '.join(steps)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in list(steps)[list(steps).index(args.first) :]:
        print(f"== {name} {' '.join(steps[name])}", flush=True)
        subprocess.run([sys.executable, "-m", f"training.shapes.{name}", *steps[name]], check=True)


if __name__ == "__main__":
    main()
