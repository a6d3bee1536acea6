"""What `auto` means for the dtype of a half."""

from __future__ import annotations

import pytest
import torch

from lookonce import placement


@pytest.mark.parametrize(
    ("name", "stored", "fast", "expected"),
    [
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "float32", True, torch.float32),  # what the weights hold is not rounded away unasked
        ("auto", "bfloat16", False, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
        ("float16", "float32", True, torch.float16),
    ],
)
def test_dtype(monkeypatch, name, stored, fast, expected):
    monkeypatch.setattr(placement, "fast_bfloat16", lambda device: fast)
    assert placement.choose_dtype(name, [torch.device("cpu")], stored) is expected
