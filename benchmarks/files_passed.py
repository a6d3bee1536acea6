"""The files of ours that a question on a warm prefix passes, in each process.

Starts the three processes on an embedded store, uploads an image and asks about it twice. Then the same question is
answered three times more, and every function that runs is noted. The files of those that ran each time count. What a
process does by itself is left out: functions that run while nothing is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gateway", "lm_service", "lookonce", "vision_service")
FOLDER = "FILES_PASSED"
"""Variable that names the folder in which a process leaves what it notes."""
TIMES = 3
IDLE_SECONDS = 0.5
"""While nothing is asked; the loop of the gateway's server turns each 0.1 s."""


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint (default: a tiny random one)")
    parser.add_argument("--json", type=Path, help="write the files here as well")
    options = parser.parse_args()
    passed = count(options.model)
    for name, files in passed.items():
        print(f"{name}: {len(files)}", *(f"  {file}" for file in sorted(files)), sep="\n")
    print(f"{len(set().union(*passed.values()))} files")
    if options.json:
        options.json.write_text(json.dumps({name: sorted(files) for name, files in passed.items()}, indent=2))
    return 0


def count(model: str | None = None) -> dict[str, set[str]]:
    """By process, the files that a warm question passes."""
    import httpx2  # not in the processes that are watched

    from benchmarks.gateway import QUESTION, image_file, processes
    from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="lookonce-bench-") as folder:
        model = model or str(make_random_checkpoint(Path(folder, "model"), size="tiny"))
        Path(folder, "sitecustomize.py").write_text("import benchmarks.files_passed as hook\nhook.watch()\n")
        paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ.update({"PYTHONPATH": os.pathsep.join(paths), FOLDER: folder})
        with processes(model, folder) as url, httpx2.Client(base_url=url, timeout=60) as http:
            files = {"file": ("a.png", image_file())}
            image = http.post("/v1/images", files=files).raise_for_status().json()["id"]

            question = {"questions": [QUESTION], "max_tokens": 4}

            def ask() -> None:
                http.post(f"/v1/images/{image}/questions", json=question).raise_for_status()

            ask()
            ask()
            noted(folder)
            time.sleep(IDLE_SECONDS)
            idle, passed = noted(folder), []
            for _ in range(TIMES):
                ask()
                passed.append(noted(folder))
            every = {name: run.intersection(*(other[name] for other in passed)) for name, run in passed[0].items()}
            return {name: {file for file, _ in run - idle[name]} for name, run in every.items()}


def noted(folder: str) -> dict[str, set[tuple[str, str]]]:
    """What has run in each process since the last time: files and the names of functions."""
    found = {}
    for process in Path(folder).glob("*.watched"):
        answer = process.with_suffix(".noted")
        os.kill(int(process.stem), signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not answer.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        found[process.read_text()] = {(file, function) for file, function in json.loads(answer.read_text())}
        answer.unlink()
    return found


def watch() -> None:
    """Note from the first SIGUSR1 on which functions of ours run; leave the list at each further one."""
    passed: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            passed.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    def leave(*_: object) -> None:
        sys.setprofile(note)  # a signal's handler runs in the main thread; all others note from their start
        inside = [(file, name) for file, name in list(passed) if file.startswith(str(ROOT))]
        passed.clear()
        ours = [(str(Path(file).relative_to(ROOT)), name) for file, name in inside]
        unfinished = Path(os.environ[FOLDER], f"{os.getpid()}.part")
        unfinished.write_text(json.dumps([one for one in ours if one[0].startswith(PACKAGES)]))
        unfinished.rename(unfinished.with_suffix(".noted"))

    name = next((word for word in sys.orig_argv if word in PACKAGES), None)
    if name is not None:
        threading.setprofile(note)
        signal.signal(signal.SIGUSR1, leave)
        Path(os.environ[FOLDER], f"{os.getpid()}.watched").write_text(name)


if __name__ == "__main__":
    sys.exit(main())
