"""The demo from start to end (slow: it starts everything and the unsplit model too), and its samples."""

from __future__ import annotations

import json

import pytest

from lookonce.cli.samples import bundled_samples, drawn_samples, same_answer
from lookonce.errors import CheckpointError
from tests.cli.commands import lookonce


@pytest.mark.slow
def test_demo_answers_as_the_unsplit_model_does(checkpoint):
    done = lookonce("demo", "--model", checkpoint, seconds=300)
    assert done.returncode == 0, done.stderr
    assert "16 of 16 answers right; 16 of 16 equal the unsplit model's." in done.stdout
    assert "vision    stopped" in done.stderr


def test_drawn_samples_are_two_pictures_with_eight_questions(tmp_path):
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
