"""The files of ours that a question on a warm prefix passes, in each process.

Starts the three processes on an embedded store, uploads an image and asks about it twice. Then every file in which a
function runs is noted while the same open question is answered again, three times. Those that ran each time count:
what a process does now and then by itself is left out.
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
            passed = []
            for _ in range(TIMES):
                ask()
                passed.append(noted(folder))
            return {name: files.intersection(*(other[name] for other in passed)) for name, files in passed[0].items()}


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
