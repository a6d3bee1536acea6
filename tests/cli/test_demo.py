"""The demo from start to end (slow: it starts everything and the unsplit model too), and its samples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack

import pytest

from lookonce.cli.model import BUNDLED
from lookonce.core.errors import CheckpointError
from lookonce.core.sample_images import bundled_samples, drawn_samples, same_answer
from tests.cli.commands import environment, lookonce
from tests.processes import ROOT


@pytest.mark.slow
def test_demo_answers_as_the_unsplit_model_does(checkpoint):
    done = lookonce("demo", "--model", checkpoint, seconds=300)
    assert done.returncode == 0, done.stderr
    assert "16 of 16 answers right; 16 of 16 equal the unsplit model's." in done.stdout
    assert re.search(
        r"^lookonce, uploads included: [\d.]+ s\.  The unsplit model by transformers, .* [\d.]+ s", done.stdout, re.M
    )
    assert "Both in float32 on cpu, with 1 thread for each model." in done.stdout  # OMP_NUM_THREADS of these tests
    assert "vision    stopped" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="two cores, to be chosen from")
def test_the_unsplit_models_threads_do_not_wait_awake(tmp_path):
    """Where other work shares the cores two threads take about as long as one; waiting awake, twenty times as long."""
    [image, _] = drawn_samples(tmp_path)
    cores = sorted(os.sched_getaffinity(0))[:2]
    job = {"model": str(BUNDLED), "dtype": "float32", "device": "cpu", "max_tokens": 8}
    job["items"] = [{"image": str(image.path), "question": question} for question, _ in image.questions]
    seconds = {}
    with ExitStack() as stack:
        for core in cores:
            code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            stack.callback(busy.kill)
        for threads in (1, 2):
            asked = json.dumps({**job, "threads": threads})
            done = subprocess.run(
                [sys.executable, "-m", "lookonce.cli.baseline"], cwd=ROOT, input=asked,
                env=environment(OMP_NUM_THREADS="2"), preexec_fn=lambda: os.sched_setaffinity(0, cores),
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            result = json.loads(done.stdout)
            assert result["threads"] == threads
            seconds[threads] = sum(answer["ms"] for answer in result["answers"]) / 1000
    assert seconds[2] < 6 * seconds[1], seconds


def test_drawn_samples_are_two_images_with_eight_questions(tmp_path):
    samples = drawn_samples(tmp_path)
    assert [len(sample.questions) for sample in samples] == [8, 8]
    assert all(sample.path.is_file() for sample in samples)


@pytest.mark.parametrize("wrap", [lambda items: items, lambda items: {"samples": items}])
def test_bundled_samples(tmp_path, wrap):
    items = [{"file": "a.png", "questions": [{"question": "How many?", "answer": "2"}, {"question": "Which?"}]}]
    file = tmp_path / "samples.json"
    file.write_text(json.dumps(wrap(items)))
    [sample] = bundled_samples(file)
    assert sample.path == tmp_path / "a.png"
    assert sample.questions == (("How many?", "2"), ("Which?", None))


@pytest.mark.parametrize("content", ["", "{}", '[{"file": "a.png"}]', "[1]"])
def test_bundled_samples_that_are_damaged(tmp_path, content):
    file = tmp_path / "samples.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"samples\.json"):
        bundled_samples(file)


def test_same_answer():
    assert same_answer("Red.", " red")
    assert not same_answer("red", "dark red")
