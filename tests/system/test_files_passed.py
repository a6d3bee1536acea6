"""How much code there is between a warm question and its answer: files in which a function runs, over all processes."""

from __future__ import annotations

import pytest

from benchmarks.files_passed import count

MOST = 44


@pytest.mark.slow
def test_a_warm_question_passes_no_more_files_than_it_did(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # `count` changes it
    passed = count()
    assert passed.keys() == {"gateway", "lm_service", "vision_service"}
    assert "gateway/questions.py" in passed["gateway"] and "lm_service/servicer.py" in passed["lm_service"]
    files = set().union(*passed.values())
    assert len(files) <= MOST, sorted(files)
