"""The first ten minutes on a GPU: whether everything is exact and nothing waits, and how far a step is from its bounds.

Each stage is a process of its own with a time limit (scripts/gpu_check.sh); its JSON is written at once. Weights of the
large models are made on the device, so that none is downloaded or copied. `--device cpu --size tiny` runs all stages on
a CPU, where they prove the stages themselves: what a GPU does is proven by a GPU only.

Usage: python -m benchmarks.gpu STAGE [--device cuda] [--size 2b] [--out DIR]      one stage
       python -m benchmarks.gpu summary --out DIR                                  all that was written, in words
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts as parts
from benchmarks.gpu_parts import Setting

LIMITS = {
    "imports": 60,
    "kernels": 90,
    "parity": 120,
    "audit": 90,
    "decode": 180,
    "encode": 120,
    "system": 240,
    "faults": 120,
}
"""Stages in order, and the seconds each may take."""
BIASES = (0.0, 10.0, 100.0)
MIXES = {"32 questions, 1 image": (1, 32), "32 images": (32, 1), "8 images, 4 questions": (8, 4)}


@dataclass
class Outcome:
    """What a stage found: figures, and every sentence that says what is wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def hold(self, true: bool, sentence: str) -> None:
        """A fault unless it is true."""
        if not true:
            self.faults.append(sentence)


def imports(setting: Setting) -> Outcome:
    """Everything the services import, and what `lookonce doctor` says."""
    found = Outcome({"torch": torch.__version__, "cuda": torch.version.cuda})
    for module in ("lm_service.app", "vision_service.app", "gateway.app", "lookonce.client"):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
        found.figures[f"import {module}, s"] = round(time.perf_counter() - began, 2)
        found.hold(done.returncode == 0, f"{module} can't be imported: {done.stderr.strip().splitlines()[-1:]}")
    if setting.on_gpu:
        found.figures["gpu"] = torch.cuda.get_device_name(setting.device)
        found.figures["capability"] = torch.cuda.get_device_capability(setting.device)
    done = subprocess.run([sys.executable, "-m", "lookonce", "doctor", "--json"], capture_output=True, text=True)
    findings = json.loads(done.stdout or "[]")
    found.figures["doctor"] = {one["check"]: one["detail"] for one in findings}
    for one in findings:
        found.hold(one["status"] != "fail", f"doctor: {one['check']}: {one['detail']}")
    return found


def kernels(setting: Setting) -> Outcome:
    """Attention against float64, with key biases as Qwen2 has them, over memory that is NaN until it is written."""
    from lm_service.engine.packed.execution.attention import merge, partial_attention_for

    found, heads, group, size = Outcome(), 2, 6, 128
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for dtype in setting.dtypes:
        attend = partial_attention_for(setting.device, dtype)
        for bias in BIASES:
            draw = torch.Generator().manual_seed(int(bias))
            k = torch.randn(1, heads, 96, size, generator=draw) + bias * torch.linspace(-1, 1, size)
            q, v = (torch.randn(1, heads, n, size, generator=draw) for n in (group * 5, 96))
            q, k, v = (x.to(setting.device, dtype) for x in (q, k, v))
            parts = [attend(q, k[:, :, at], v[:, :, at], False, None) for at in (slice(0, 60), slice(60, 96))]
            out, lse = merge(*parts)
            scores = torch.matmul(q.double(), k.double().transpose(-1, -2)) * size**-0.5
            exact = torch.matmul(scores.softmax(-1), v.double())
            error = float((out.double() - exact).abs().max() / v.double().abs().max())
            name = f"{str(dtype).removeprefix('torch.')}, bias {bias:g}"
            found.figures[f"relative error, {name}"] = error
            found.hold(error <= (2**-6 if dtype == torch.bfloat16 else 2e-5), f"attention is off by {error:g} ({name})")
            found.hold(bool(lse.isfinite().all()), f"log-sum-exps are not finite ({name})")
    return found


def parity(setting: Setting) -> Outcome:
    """The bundled checkpoint on the device against the CPU in float32: rows, greedy answers, scores."""
    from lookonce.core.sample_images import bundled_samples

    found, root = Outcome(), Path(__file__).resolve().parent.parent
    shapes, samples = str(root / "lookonce/data/shapes"), bundled_samples()[:4]
    reference = parts.rows(shapes, samples, torch.device("cpu"), torch.float32)
    expected = asyncio.run(parts.greedy(shapes, reference, samples, torch.device("cpu"), torch.float32))
    for dtype in setting.dtypes:
        name = str(dtype).removeprefix("torch.")
        rows = parts.rows(shapes, samples, setting.device, dtype)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(rows, reference, strict=True))
        found.figures[f"rows, relative error, {name}"] = error
        found.hold(error <= (0.05 if dtype == torch.bfloat16 else 1e-3), f"rows differ by {error:g} in {name}")
        answers = asyncio.run(parts.greedy(shapes, rows, samples, setting.device, dtype))
        same = sum(a == b for a, b in zip(answers, expected, strict=True))
        found.figures[f"answers equal, {name}"] = f"{same} of {len(expected)}"
        least = len(expected) if dtype == torch.float32 else round(0.9 * len(expected))
        found.hold(same >= least, f"{len(expected) - same} of {len(expected)} answers differ in {name}")
    return found


def audit(setting: Setting) -> Outcome:
    """Nothing within a forward waits for the device; kernels and copies of a decode step."""
    from lm_service.engine.packed.execution.runner import Runner

    found, real = Outcome(), Runner.run

    def run(self: Any, batch: Any) -> Any:
        with parts.no_waits(setting):
            return real(self, batch)

    Runner.run = run  # type: ignore[method-assign]
    try:
        with parts.engine(setting, "tiny" if not setting.on_gpu else "2b", layers=2) as (engine, adapter):
            for name, (images, questions) in MIXES.items():
                counts = asyncio.run(parts.profiled(setting, engine(), adapter, images, questions))
                found.figures[name] = counts
    except RuntimeError as error:
        found.faults.append(f"something within a forward waits for the device: {error}")
    finally:
        Runner.run = real  # type: ignore[method-assign]
    return found


def decode(setting: Setting) -> Outcome:
    """A decode step of 32 answers against the bytes of the weights, and against its own captured graph of matrices."""
    found = Outcome()
    with parts.engine(setting, setting.size) as (engine, adapter):
        weights = parts.language_bytes(adapter)
        floor = weights / parts.bandwidth(setting)
        found.figures |= {"weights, GB": weights / 1e9, "floor of a step, ms": 1000 * floor}
        found.figures["its matrices alone, one captured graph, ms"] = 1000 * parts.matrices_seconds(setting, adapter)
        for name, (images, questions) in MIXES.items():
            seconds = asyncio.run(parts.step_seconds(engine(), adapter, images, questions))
            found.figures[f"step, ms: {name}"] = 1000 * seconds
            found.figures[f"step over the floor: {name}"] = seconds / floor
    return found


def encode(setting: Setting) -> Outcome:
    """An image of 1024 x 1024, and 64 of mixed sizes: cut, copy and forward, copy back."""
    from PIL import Image

    found = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        encoder, checkpoint = parts.encoder(setting, Path(folder))
        side = 1024 if setting.on_gpu else 112
        sizes = [(side, side)] + [
            (side // (1 + i % 4), side // (1 + i % 3)) for i in range(64 if setting.on_gpu else 8)
        ]
        began = time.perf_counter()
        patches = [
            encoder.prepare(Image.new("RGB", one, (i, 90, 200)), checkpoint.min_pixels, checkpoint.max_pixels)
            for i, one in enumerate(sizes)
        ]
        found.figures["cut, ms an image"] = 1000 * (time.perf_counter() - began) / len(sizes)
        for name, batch in (("one image", patches[:1]), (f"{len(sizes) - 1} mixed", patches[1:])):
            encoder.encode(batch)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                rows = encoder.encode(batch)
                times.append(time.perf_counter() - began)
            found.figures[f"encode, ms: {name}"] = 1000 * statistics.median(times)
            found.hold(all(bool(one.isfinite().all()) for one in rows), f"rows are not finite ({name})")
    return found


def system(setting: Setting) -> Outcome:
    """`lookonce up` on the device: 20 images x 8 questions, moderation in both modes, kill -9 of each service."""
    import httpx2

    found, root = Outcome(), Path(__file__).resolve().parent.parent
    images, questions = (20, 8) if setting.on_gpu else (3, 3)
    with tempfile.TemporaryDirectory() as folder, parts.up(setting, Path(folder)) as url:
        client = httpx2.Client(base_url=url, timeout=120, trust_env=False, verify=False)
        began, wrong = time.perf_counter(), 0
        for number in range(images):
            reply = client.post("/v1/images", files={"file": ("a.png", parts.picture(number))})
            asked = [f"Question {n}?" for n in range(questions)]
            body = {"questions": asked, "max_tokens": 4}
            answers = client.post(f"/v1/images/{reply.json()['id']}/questions", json=body).json()["answers"]
            wrong += sum(one.get("text") is None for one in answers)
        found.figures[f"{images} images x {questions} questions, s"] = time.perf_counter() - began
        found.hold(wrong == 0, f"{wrong} questions had no answer")
        for name in ("vision", "language"):
            killed = parts.kill(Path(folder), name)
            back = parts.until(lambda: client.get("/readyz").json()["status"] == "ready", 120)
            found.figures[f"{name} back after kill -9, s"] = back
            found.hold(killed and back is not None, f"the {name} service did not come back")
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for number in range(200 if setting.on_gpu else 6):
            (pictures / f"{number}.png").write_bytes(parts.picture(number))
        for name, mode in (("reproducible", ()), ("packed", ("--no-reproducible",))):
            command = [
                sys.executable,
                "-m",
                "lookonce",
                "moderate",
                str(pictures),
                "--data-dir",
                f"{folder}/data",
                *mode,
            ]
            command += ["--policy", str(root / "lookonce/data/shapes.yaml"), "--out", f"{folder}/{name}.jsonl"]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            found.figures[f"moderate, {name}, s"] = time.perf_counter() - began
            found.hold(done.returncode == 0, f"moderate ({name}): {done.stderr.strip().splitlines()[-1:]}")
    return found


def faults(setting: Setting) -> Outcome:
    """Out of memory recovers; a record of NaN is refused; a device that computes nothing any more ends the process."""
    from lm_service.engine.packed.engine import rows_of
    from lm_service.engine.types import DamagedRecord
    from lookonce.models.tensors import view_of

    found = Outcome()
    bad = torch.full((4, 8), torch.nan)
    try:
        rows_of(view_of(bad), device=setting.device, dtype=torch.bfloat16)
        found.faults.append("rows of NaN were taken")
    except DamagedRecord:
        pass
    with parts.engine(setting, "tiny") as (engine, _):
        found.hold(asyncio.run(parts.survives(engine())), "a step without memory ended more than itself")
    if setting.on_gpu:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _ASSERT], capture_output=True, text=True, timeout=60)
        found.figures["exit after a device assert, s"] = time.perf_counter() - began
        found.hold("ENDED" in done.stdout, "an engine whose device asserts goes on")
    return found


STAGES: dict[str, Callable[[Setting], Outcome]] = {
    one.__name__: one for one in (imports, kernels, parity, audit, decode, encode, system, faults)
}
_ASSERT = """
import asyncio, torch
from benchmarks import gpu_parts
setting = gpu_parts.Setting(torch.device("cuda"), "tiny")
with gpu_parts.engine(setting, "tiny") as (engine, adapter):
    print("ENDED" if asyncio.run(gpu_parts.ends(engine())) else "GOES ON", flush=True)
    import os; os._exit(0)
"""


def summary(out: Path) -> int:
    """Every stage in words; 1 when one is missing or has a fault."""
    bad = 0
    for name in LIMITS:
        file = out / f"{name}.json"
        if not file.is_file():
            print(f"FAIL  {name}: it ended without a word, or took too long")
            bad += 1
            continue
        found = json.loads(file.read_text())
        bad += bool(found["faults"])
        print(f"{'FAIL' if found['faults'] else 'ok':<5} {name}  ({found['seconds']:.1f} s on {found['device']})")
        for sentence in found["faults"]:
            print(f"      {sentence}")
        for key, value in found["figures"].items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"      {key}: {shown}" if not isinstance(value, dict) else f"      {key}: {json.dumps(value)}")
    return 1 if bad else 0


def main() -> int:
    """One stage, or the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "summary", "limits"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="2b", help="of the models whose weights are made here: tiny, 2b, 7b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    options = parser.parse_args()
    if options.stage == "limits":
        print("\n".join(f"{name} {seconds}" for name, seconds in LIMITS.items()))
        return 0
    if options.stage == "summary":
        return summary(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    setting, began = Setting(torch.device(options.device), options.size), time.monotonic()
    with torch.inference_mode():
        found = STAGES[options.stage](setting)
    text = asdict(found) | {"seconds": time.monotonic() - began, "device": str(setting.device)}
    (options.out / f"{options.stage}.json").write_text(json.dumps(text, indent=2, default=str))
    for sentence in found.faults:
        print(f"{options.stage}: {sentence}", file=sys.stderr)
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
