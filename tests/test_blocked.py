"""Rounding of rows, for which oneDNN compiles its products."""

from __future__ import annotations

import pytest
import torch

from lookonce.models.onednn import rounded_up


def test_few_numbers_of_rows_are_left_and_few_rows_are_added():
    rounded = [rounded_up(rows) for rows in range(1, 4097)]
    assert all(rows <= more <= max(rows + 7, rows * 9 / 8) for rows, more in enumerate(rounded, 1))
    assert rounded == sorted(rounded) and [rounded_up(more) for more in set(rounded)] == list(set(rounded))
    assert len(set(rounded)) <= 70
    assert all(more % 8 == 0 for more in rounded if more > 16)


@pytest.mark.parametrize("native", [False, True])
def test_the_processes_keep_few_products(tmp_path, native):
    """What oneDNN multiplies has a round number of rows, however many tokens a step has; our own products need none."""
    from lookonce.models.checkpoint import Half, open_checkpoint
    from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
    from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
    from tests.modules import load_language_model

    checkpoint = open_checkpoint(str(make_random_checkpoint(tmp_path / "tiny", size="tiny")), needs=Half.LANGUAGE)
    adapter = Qwen2VLAdapter(*load_language_model(checkpoint, torch.float32), native=native)
    seen, shape = set(), adapter.shape
    rms = adapter._rms
    adapter._rms = lambda x, weight: (seen.add(x.shape[0]), rms(x, weight))[1]

    def attend(layer, q, k, v):
        assert q.shape[0] == k.shape[0] == v.shape[0] == tokens
        return q.reshape(tokens, -1)

    attend.calls = None
    with torch.inference_mode():
        for tokens in range(40, 130):
            wanted = torch.arange(0, tokens, 2)
            logits = adapter.forward(torch.randn(tokens, shape.hidden), torch.zeros(3, tokens).long(), attend, wanted)
            assert logits.shape == (len(wanted), shape.vocabulary)
    rows = [*range(40, 130), *range(20, 65)]
    assert seen == (set(rows) if native else {rounded_up(count) for count in rows})
