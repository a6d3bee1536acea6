"""The whole system through `lookonce up`: one start shared by the tests, which run in the order they stand in."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import httpx2
import pytest

from lookonce.cli.checks import check_port
from lookonce.cli.model import BUNDLED
from tests.cli.commands import Up, environment, gone, invoke, lookonce, until
from tests.ports import free_port
from tests.processes import ROOT


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("up") / "data"


@pytest.fixture(scope="module")
def up(checkpoint, data_dir):
    flags = ["--model", checkpoint, "--port", free_port(), "--dtype", "float32", "--grace", "30"]
    with Up(data_dir, *flags, LOOKONCE_GATEWAY_MAX_QUESTIONS="7") as running:
        running.wait_for("lookonce is ready")
        yield running


def ask(data_dir, image_path, *arguments, **env):
    return lookonce("ask", image_path, "--max-tokens", "8", "--data-dir", data_dir, *arguments, **env)


def test_starts_with_a_line_per_state_and_one_url(up, data_dir):
    for name in ("gateway", "language", "vision"):
        assert f"{name:<8}  starting (process {up.system.services[name]['pid']})" in up.output
        assert f"{name:<8}  ready" in up.output
    assert up.output.count("http://127.0.0.1:") == 1
    until(lambda: up.system.ready, 60, lambda: up.output)
    assert up.system.url in up.output
    assert httpx2.get(f"{up.system.url}/readyz").status_code == 200
    for path in (data_dir, data_dir / "run", data_dir / "store", data_dir / "log"):
        assert path.stat().st_mode & 0o777 == 0o700, path
    assert up.system.services["vision"]["address"] == f"unix:{data_dir}/run/vision.sock"


def test_ask_finds_it_and_answers(up, data_dir, image_path):
    one = ask(data_dir, image_path, "-q", "What is it?")
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip()
    two = ask(data_dir, image_path, "-q", "What is it?", "-q", "What colour?", "--json")
    answers = json.loads(two.stdout)["answers"]
    assert [answer["question"] for answer in answers] == ["What is it?", "What colour?"]
    assert answers[0]["text"].strip()[:4] == one.stdout.strip()[:4]
    assert {answer["receipt"]["embedding"] for answer in answers} == {"hit"}
    assert up.output.count("starting") == 3, "no second system was started"


def test_ask_within_pixel_bounds(up, data_dir, image_path):
    sizes = []
    for bounds in (["--min-pixels", "200000"], ["--max-pixels", "8000"]):
        streamed = ask(data_dir, image_path, "-q", "What is it?", *bounds)
        whole = json.loads(ask(data_dir, image_path, "-q", "What is it?", "--json", *bounds).stdout)
        assert whole["answers"][0]["receipt"]["embedding"] == "hit"
        assert whole["answers"][0]["text"].strip()[:4] == streamed.stdout.strip()[:4]
        size = whole["image"]["tokens"]
        assert size == whole["answers"][0]["usage"]["prompt_tokens_details"]["image_tokens"]
        sizes.append(size)
    assert sizes[0] >= 200_000 // 784 and sizes[1] <= 8000 // 784
    wrong = ask(data_dir, image_path, "-q", "What is it?", "--min-pixels", "9000", "--max-pixels", "8000")
    assert wrong.returncode == 1 and "'min_pixels' is 9000" in wrong.stderr


def test_ask_choices_by_url(up, data_dir, image_path):
    done = ask("/nonexistent", image_path, "-q", "Is it red?", "--choices", "yes,no", LOOKONCE_URL=up.system.url)
    assert done.returncode == 0, done.stderr
    shares = {line.split()[1]: float(line.split()[0].rstrip("%")) for line in done.stdout.splitlines()}
    assert set(shares) == {"yes", "no"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.1)


def test_ask_reads_standard_input_and_shows_the_gateways_words(up, data_dir, image_path):
    command = [sys.executable, "-m", "lookonce", "ask", "-", "--data-dir", str(data_dir), "--max-tokens", "2"]
    questions = [word for number in range(8) for word in ("-q", f"question {number}")]
    done = subprocess.run(
        [*command, *questions], cwd=ROOT, env=environment(), input=image_path.read_bytes(), capture_output=True
    )
    assert done.returncode == 1
    # LOOKONCE_GATEWAY_MAX_QUESTIONS=7 reached the gateway through `up`.
    assert b"7" in done.stderr and b"questions" in done.stderr


def test_ask_prompts_in_a_terminal(up, data_dir, image_path):
    ours, theirs = pty.openpty()
    options = ["--data-dir", str(data_dir), "--max-tokens", "3"]
    command = [sys.executable, "-m", "lookonce", "ask", str(image_path), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    os.close(theirs)
    os.write(ours, b"What is it?\nAnd its colour?\n\n")
    output, _ = process.communicate(timeout=180)
    os.close(ours)
    assert process.returncode == 0, output
    assert "error" not in output and output.count("> ") == 3
    assert len([line for line in output.splitlines() if line.strip(" >")]) >= 3  # the hint and two answers


def test_top_asks_its_services_and_ends_with_q(up, data_dir):
    once = invoke("top", "--once", "--data-dir", data_dir)
    assert once.returncode == 0 and "prefix KV" in once.stdout and "no measurements" not in once.stdout, once.stdout
    command = [sys.executable, "-m", "lookonce", "top", "--data-dir", data_dir, "--interval", "0.2"]
    terminal, child_end = pty.openpty()
    before = termios.tcgetattr(child_end)
    watching = subprocess.Popen(
        list(map(str, command)), stdin=child_end, stdout=child_end, stderr=child_end, env=environment(), cwd=ROOT
    )
    try:
        shown = b""
        while shown.count(b"prefix KV") < 2:  # a frame, and one after it
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 1 << 16)
        assert b"no measurements" not in shown
        os.write(terminal, b"x")
        time.sleep(0.3)
        assert watching.poll() is None
        os.write(terminal, b"q")
        drained = threading.Thread(target=drain, args=(terminal,), daemon=True)
        drained.start()
        assert watching.wait(60) == 0
        assert termios.tcgetattr(child_end) == before, "the terminal is left as it was"
    finally:
        watching.kill()
        os.close(child_end)


def drain(terminal):
    """Read what is written to the terminal, so that writing it ends."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def test_a_second_up_on_the_same_data_dir_is_refused(up, checkpoint, data_dir):
    done = invoke("up", "--model", checkpoint, "--data-dir", data_dir, "--port", "0")
    assert done.returncode == 1
    assert f"process {up.process.pid}" in done.stderr and "--data-dir" in done.stderr
    assert httpx2.get(f"{up.system.url}/readyz").status_code == 200


def test_doctor_knows_its_port(up, data_dir):
    port = int(up.system.url.rpartition(":")[2])
    [finding] = check_port("127.0.0.1", port, data_dir)
    assert finding.status == "ok" and "served by the running system" in finding.detail
    [finding] = check_port("127.0.0.1", port, data_dir.parent)
    assert finding.status == "fail" and "--port" in finding.remedy


@pytest.mark.parametrize("names", [pytest.param(["gateway"], marks=pytest.mark.slow), ["vision", "language"]])
def test_killed_services_come_back_and_requests_succeed_again(up, data_dir, image_path, names):
    before = up.pids()
    stop = threading.Event()
    answered = []

    def load() -> None:
        while not stop.is_set():
            try:
                body = {"questions": [{"text": "What is it?", "max_tokens": 4}]}
                image = httpx2.post(f"{up.system.url}/v1/images", files={"file": image_path.read_bytes()}, timeout=60)
                reply = httpx2.post(f"{up.system.url}/v1/images/{image.json()['id']}/questions", json=body, timeout=60)
                answered.append((time.monotonic(), reply.status_code, reply.json()["answers"][0].get("error")))
            except (httpx2.HTTPError, KeyError, ValueError, AssertionError):
                time.sleep(0.1)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until(lambda: answered, 120, lambda: up.output)
        killed = up.output.count("killed by SIGKILL")
        for name in names:
            os.kill(before[name], signal.SIGKILL)
        up.wait_for("killed by SIGKILL; restarting in", times=killed + len(names))
        until(
            lambda: up.system.ready and not set(up.pids().values()) & {None, *map(before.get, names)},
            180,
            lambda: up.output,
        )
        back = time.monotonic()
        until(lambda: any(t > back and s == 200 and not e for t, s, e in answered), 120, lambda: f"{answered[-3:]}")
    finally:
        stop.set()
        thread.join()
    after = up.pids()
    assert {other for other in after if after[other] != before[other]} == set(names)
    assert ask(data_dir, image_path, "-q", "What is it?").returncode == 0


def test_sigterm_drains_in_order_and_exits_0(up, data_dir):
    pids = up.pids()
    up.signal(signal.SIGTERM)
    assert up.wait_exit() == 0
    stopped = [line.split()[1] for line in up.output.splitlines() if line.endswith("  stopped")]
    assert stopped == ["gateway", "language", "vision"]
    assert all(gone(pid) for pid in pids.values())
    assert sorted(path.name for path in (data_dir / "run").iterdir()) == ["lock"]


@pytest.mark.slow
def test_ask_starts_a_system_for_the_call_with_loopback_ports_when_the_path_is_long(checkpoint, image_path, tmp_path):
    data_dir = tmp_path / ("long way " * 14)
    done = ask(data_dir, image_path, "--model", checkpoint, "-q", "What is it?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "ready" not in done.stdout
    assert "vision    stopped" in done.stderr
    assert not (data_dir / "run" / "up.json").exists()


@pytest.mark.slow
def test_without_a_model_moderations_answer(tmp_path):
    with Up(tmp_path / "data", "--port", "0") as system:
        system.wait_for("lookonce is ready")
        star = (BUNDLED.parent / "samples" / "one-star.png").read_bytes()
        sample = f"data:image/png;base64,{base64.b64encode(star).decode()}"
        body = {"input": [{"type": "image_url", "image_url": {"url": sample}}]}
        reply = httpx2.post(f"{system.system.url}/v1/moderations", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        [result] = reply.json()["results"]
        assert result["flagged"] and result["category_scores"]["star"] > 0.5 > result["category_scores"]["cross"]


def test_a_killed_supervisor_takes_its_children_along(checkpoint, tmp_path):
    with Up(tmp_path / "data", "--model", checkpoint, "--port", "0") as system:
        until((tmp_path / "data/run/up.json").exists, 60, lambda: system.output)
        with socket.socket() as other, pytest.raises(OSError):  # the free port that was chosen is nobody else's
            other.bind(("127.0.0.1", int(system.system.url.rpartition(":")[2])))
        system.wait_for("loading|ready")
        until(lambda: all(system.pids().values()), 60, lambda: system.output)
        pids = system.pids()
        assert len(pids) == 3
        system.signal(signal.SIGKILL)
        system.wait_exit()
        for name, pid in pids.items():
            until(lambda pid=pid: gone(pid), 60, lambda name=name: f"{name} outlived its supervisor")
        # The lock went with it: this one ends for its model's sake, not for the lock's.
        again = invoke("up", "--model", tmp_path / "nothing", "--data-dir", tmp_path / "data", "--port", "0")
        assert "no such directory" in again.stderr
