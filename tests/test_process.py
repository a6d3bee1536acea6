"""Leaving a process: status and output as ever, whatever is still running."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import structlog

from lookonce.core.process import heap_frozen
from lookonce.core.telemetry.logs import configure_logging

SCRIPT = """
import logging, sys, threading, time
from lookonce.core.process import leave_after
threading.Thread(target=time.sleep, args=(600,)).start()  # an ordinary end would wait for it
sys.stdout = open(1, "w", buffering=65536, closefd=False)  # buffered, whatever PYTHONUNBUFFERED says
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

def main():
    print("to stdout")
    logging.info("to the log")
    {end}

leave_after(main)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(1)", 1), ("sys.exit(2)", 2), ("sys.exit('no')", 1)],
)
def test_status_and_output_as_ever_and_at_once(end, status):
    script = SCRIPT.replace("{end}", end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == status
    assert done.stdout == "to stdout\n"
    assert "to the log" in done.stderr
    assert ("no" in done.stderr.split()) is ("no" in end)


@pytest.mark.parametrize(
    ("set_before", "spins"), [({}, "300"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
@pytest.mark.parametrize(
    ("service", "settings"), [("vision_service", "VisionSettings"), ("lm_service", "LanguageSettings")]
)
def test_a_service_says_how_threads_wait_before_torch_is_there(service, settings, set_before, spins):
    """libgomp reads it once, when it is loaded; what an operator has set stays."""
    script = f"""
import os, sys
from {service}.__main__ import run
from {service}.settings import {settings}

def at(event, args):
    if event == "import" and args[0] == "torch":
        print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)

sys.addaudithook(at)

run({settings}(model="none"))
"""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env | set_before, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout.split() == [spins], done.stderr


def test_a_reader_that_went_away_changes_nothing():
    script = SCRIPT.replace("{end}", "sys.exit(0)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(180) == 0


def test_another_exception_is_printed_as_ever():
    done = subprocess.run(
        [sys.executable, "-c", "from lookonce.core.process import leave_after\nleave_after(lambda: 1 / 0)"],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


class Knot:
    """Only the collector frees it: it holds itself."""

    def __init__(self):
        self.itself = self


def test_a_frozen_heap_leaves_alone_what_was_there_and_no_garbage():
    before, kept = weakref.ref(Knot()), Knot()
    with heap_frozen():
        assert before() is None
        assert gc.is_tracked(kept) and not any(it is kept for it in gc.get_objects())  # what a collection walks
        during = weakref.ref(Knot())
        gc.collect()
        assert during() is None
    held = weakref.ref(kept)
    del kept
    gc.collect()
    assert held() is None


def test_a_heap_is_as_before_when_the_block_fails():
    kept = Knot()
    with pytest.raises(ZeroDivisionError), heap_frozen():
        raise ZeroDivisionError
    assert any(it is kept for it in gc.get_objects())


@pytest.mark.parametrize("stream", ["err", "out"])  # the first configures logging, which the second must not notice
def test_logs_of_a_process_go_to_stderr_and_of_the_next_test_to_stdout(capsys, stream):
    if stream == "err":
        configure_logging("test", log_format="json")
    structlog.get_logger("test").warning("heard")
    assert "heard" in getattr(capsys.readouterr(), stream)


_HOLES = """
import sys
from pathlib import Path
from lookonce.core import process

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

if sys.argv[1] == "returned":
    process.return_freed_memory()
bytearray(b"x" * (24 << 20))  # freed: glibc keeps pieces up to this size from now on
pieces = [bytearray(b"x" * (3 << 20)) for _ in range(32)]
before = resident()
del pieces[::2]
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_matrices_go_back_at_once():
    """Every second of 32 pieces of 3 MiB."""

    def given_back(how):
        done = subprocess.run([sys.executable, "-c", _HOLES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert given_back("kept") < 5 < 40 < given_back("returned")
