"""The supervisor over small real processes: restart, backoff, giving up, drain order, force, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest

from lookonce.cli.supervisor import RestartPolicy, describe_exit
from lookonce.core.process import PERMANENT_EXIT
from tests.cli.commands import Background, gone, until


def supervise(directory, *services: str, grace: float = 60) -> Background:
    return Background(sys.executable, "-m", "tests.cli.supervise", str(grace), str(directory), *services)


def pid_of(output: str, name: str) -> int:
    return int(re.findall(rf"{name}: starting \(process (\d+)\)", output)[-1])


def test_drains_in_order_and_exits_0(tmp_path):
    with supervise(tmp_path, "first", "second", "third") as system:
        system.wait_for("all ready")
        system.signal(signal.SIGTERM)
        assert system.wait_exit() == 0
        assert (tmp_path / "ended").read_text().split() == ["first", "second", "third"]
        assert re.findall(r"(\w+): stopped", system.output) == ["first", "second", "third"]


def test_restarts_what_is_killed_and_its_children_go(tmp_path):
    grandchild = tmp_path / "grandchild"
    with supervise(tmp_path, f"one:--spawn {grandchild}", "two") as system:
        output = system.wait_for("all ready")
        left_behind = int(grandchild.read_text())
        os.kill(pid_of(output, "one"), signal.SIGKILL)
        output = system.wait_for("one: ready", times=2)
        assert "one: killed by SIGKILL; restarting in 0.05 s" in output
        assert output.count("two: starting") == 1
        until(lambda: gone(left_behind), 60, lambda: "the grandchild outlived its parent")
        system.signal(signal.SIGINT)
        assert system.wait_exit() == 0


def test_delay_doubles_and_is_forgotten_once_healthy(tmp_path):
    with supervise(tmp_path, "one:--fail 1-2") as system:
        output = system.wait_for("all ready")
        assert re.findall(r"restarting in ([\d.]+) s", output) == ["0.05", "0.1"]
        time.sleep(0.6)  # ready for longer than `healthy_after`: the next failure counts as the first
        os.kill(pid_of(output, "one"), signal.SIGKILL)
        output = system.wait_for("killed by SIGKILL; restarting")
        assert "killed by SIGKILL; restarting in 0.05 s" in output


def test_gives_up_on_a_service_that_never_starts_and_says_why(tmp_path):
    with supervise(tmp_path, "good", "bad:--fail 1-99") as system:
        assert system.wait_exit() == 1
        assert (tmp_path / "bad.starts").read_text().count("start") == 3
        last = system.output.splitlines()[-1]
        assert last.startswith("failed: the bad service can't start: exited with status 3: the moon is full (its log:")
        assert gone(pid_of(system.output, "good"))


def test_a_usage_error_is_not_tried_again(tmp_path):
    with supervise(tmp_path, "bad:--nonsense") as system:
        assert system.wait_exit() == 1
        assert system.output.count("bad: starting") == 1
        assert "unrecognized arguments: --nonsense" in system.output


def test_a_permanent_fault_is_not_tried_again_and_its_words_come_last(tmp_path):
    with supervise(tmp_path, "good", f"bad:--fail 1-99 --status {PERMANENT_EXIT}") as system:
        assert system.wait_exit() == 1
        assert (tmp_path / "bad.starts").read_text().count("start") == 1
        assert system.output.splitlines()[-1] == "failed: the bad service can't start: the moon is full []"
        assert gone(pid_of(system.output, "good"))


def test_what_was_ready_is_started_again_whatever_it_ended_with(tmp_path):
    with supervise(tmp_path, f"one:--fail 2-5 --status {PERMANENT_EXIT}") as system:
        output = system.wait_for("all ready")
        os.kill(pid_of(output, "one"), signal.SIGKILL)
        output = system.wait_for("one: ready", times=2)
        assert output.count(f"one: exited with status {PERMANENT_EXIT}; restarting in") == 4
        system.signal(signal.SIGTERM)
        assert system.wait_exit() == 0


def test_kills_what_does_not_end_within_its_grace(tmp_path):
    with supervise(tmp_path, "deaf:--ignore-term", grace=-2) as system:
        output = system.wait_for("all ready")
        system.signal(signal.SIGTERM)
        assert system.wait_exit() == 0
        assert "did not end within 1 s; killing it" in system.output
        assert gone(pid_of(output, "deaf"))


def test_a_second_signal_forces(tmp_path):
    with supervise(tmp_path, "deaf:--ignore-term", "other:--ignore-term") as system:
        output = system.wait_for("all ready")
        system.signal(signal.SIGINT)
        system.wait_for("deaf: draining")
        system.signal(signal.SIGINT)
        assert system.wait_exit() == 130
        assert gone(pid_of(output, "deaf")) and gone(pid_of(output, "other"))
        assert "did not end within" not in system.output


def test_children_go_when_the_supervisor_is_killed(tmp_path):
    with supervise(tmp_path, "one:--ignore-term", "two") as system:
        output = system.wait_for("all ready")
        system.signal(signal.SIGKILL)
        system.wait_exit()
        for name in ("one", "two"):
            until(lambda name=name: gone(pid_of(output, name)), 60, lambda name=name: f"{name} outlived it")


def test_output_is_kept_in_the_log_and_plain_lines_stay_there(tmp_path):
    with supervise(tmp_path, "one") as system:
        system.wait_for("all ready")
        until(lambda: "a plain line" in (tmp_path / "one.log").read_text(), 60, lambda: "nothing logged")
        assert "a plain line" not in system.output
        assert (tmp_path / "one.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("failures", "delay"), [(1, 0.5), (2, 1.0), (4, 4.0), (7, 30.0), (60, 30.0)])
def test_backoff(failures, delay):
    assert RestartPolicy().delay(failures) == delay


def test_exit_in_words():
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
