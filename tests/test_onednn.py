"""Rounding of rows, for which oneDNN compiles its products."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from lookonce.models.linear import rounded_up
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint


def test_few_numbers_of_rows_are_left_and_few_rows_are_added():
    rounded = [rounded_up(rows) for rows in range(1, 4097)]
    assert all(rows <= more <= max(rows + 7, rows * 9 / 8) for rows, more in enumerate(rounded, 1))
    assert rounded == sorted(rounded) and [rounded_up(more) for more in set(rounded)] == list(set(rounded))
    assert len(set(rounded)) <= 70
    assert all(more % 8 == 0 for more in rounded if more > 16)


FORWARDS = """
import sys, torch
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.modules import load_language_model
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter

checkpoint = open_checkpoint(sys.argv[1], needs=Half.LANGUAGE)
adapter = Qwen2VLAdapter(*load_language_model(checkpoint, torch.float32), native=sys.argv[2] == "native")

def attend(layer, q, k, v):
    assert q.shape[0] == k.shape[0] == v.shape[0] == tokens
    return q.reshape(tokens, -1)

attend.calls = None
with torch.inference_mode():
    for tokens in range(40, 130):
        wanted, hidden = torch.arange(0, tokens, 2), torch.randn(tokens, adapter.shape.hidden)
        logits = adapter.forward(hidden, torch.zeros(3, tokens).long(), attend, wanted)
        assert logits.shape == (len(wanted), adapter.shape.vocabulary)
"""
PRODUCT = re.compile(r"exec,cpu,inner_product,.* wei:f32::blocked:(\w+)::.*,mb(\d+)ic")


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_processes_keep_few_products(tmp_path, kernels):
    """What oneDNN says that it multiplied: products of a round number of rows, weights in a layout of its own (no `ab`,
    which it would repack each time), however many tokens a step has; our own products need none."""
    checkpoint = str(make_random_checkpoint(tmp_path / "tiny", size="tiny"))
    done = subprocess.run(
        [sys.executable, "-c", FORWARDS, checkpoint, kernels],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    products = PRODUCT.findall(done.stdout)
    expected = {rounded_up(count) for count in [*range(40, 130), *range(20, 65)]}
    assert {int(rows) for _, rows in products} == (expected if kernels == "torch" else set())
    assert not {layout for layout, _ in products} & {"ab", "ba"}
