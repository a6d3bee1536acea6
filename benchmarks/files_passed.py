"""The files of ours that a question on a warm prefix passes, in each process.

Starts the three processes on an embedded store, uploads an image and asks about it twice. Then every file in which a
function runs is noted: while nothing is asked, and while the same open question is answered once more. Files that run
in both are counted with `--all` only.
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
IDLE_SECONDS = 3.0


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint (default: a tiny random one)")
    parser.add_argument("--all", action="store_true", help="count files that run while nothing is asked, too")
    parser.add_argument("--json", type=Path, help="write the files here as well")
    options = parser.parse_args()
    idle, asked = count(options.model, IDLE_SECONDS)
    passed = asked if options.all else {name: files - idle[name] for name, files in asked.items()}
    for name, files in passed.items():
        print(f"{name}: {len(files)}", *(f"  {file}" for file in sorted(files)), sep="\n")
    print(
        f"{len(set().union(*passed.values()))} files; {len(set().union(*asked.values()))} with those that run idle, too"
    )
    if options.json:
        options.json.write_text(json.dumps({name: sorted(files) for name, files in passed.items()}, indent=2))
    return 0


def count(model: str | None, idle_seconds: float) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """By process, the files that run in `idle_seconds` without a question, and those that run for a warm question."""
    import httpx2  # not in the processes that are watched

    from benchmarks.gateway import QUESTION, picture_file, processes
    from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="lookonce-bench-") as folder:
        model = model or str(make_random_checkpoint(Path(folder, "model"), size="tiny"))
        Path(folder, "sitecustomize.py").write_text("import benchmarks.files_passed as hook\nhook.watch()\n")
        paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ.update({"PYTHONPATH": os.pathsep.join(paths), FOLDER: folder})
        with processes(model, folder) as url, httpx2.Client(base_url=url, timeout=60) as http:
            files = {"file": ("a.png", picture_file())}
            image = http.post("/v1/images", files=files).raise_for_status().json()["id"]

            def ask() -> None:
                http.post(f"/v1/images/{image}/questions", json={"questions": [QUESTION]}).raise_for_status()

            ask()
            ask()
            noted(folder)
            time.sleep(idle_seconds)
            idle = noted(folder)
            ask()
            return idle, noted(folder)


def noted(folder: str) -> dict[str, set[str]]:
    """What each process has noted since the last time."""
    found = {}
    for process in Path(folder).glob("*.watched"):
        answer = process.with_suffix(".noted")
        os.kill(int(process.stem), signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not answer.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        found[process.read_text()] = set(json.loads(answer.read_text()))
        answer.unlink()
    return found


def watch() -> None:
    """Note from the first SIGUSR1 on in which files of ours functions run; leave the list at each further one."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    def leave(*_: object) -> None:
        sys.setprofile(note)  # a signal's handler runs in the main thread; all others note from their start
        ours = [str(Path(file).relative_to(ROOT)) for file in list(files) if file.startswith(str(ROOT))]
        files.clear()
        unfinished = Path(os.environ[FOLDER], f"{os.getpid()}.part")
        unfinished.write_text(json.dumps([file for file in ours if file.startswith(PACKAGES)]))
        unfinished.rename(unfinished.with_suffix(".noted"))

    name = next((word for word in sys.orig_argv if word in PACKAGES), None)
    if name is not None:
        threading.setprofile(note)
        signal.signal(signal.SIGUSR1, leave)
        Path(os.environ[FOLDER], f"{os.getpid()}.watched").write_text(name)


if __name__ == "__main__":
    sys.exit(main())
