"""Families with recurrent layers: a prefix is its KV and the state at its end, and answers are the unsplit model's."""

from __future__ import annotations

import pytest

from tests.families.test_general import check_packed
from tests.families.tiny_recurrent import FAMILIES, make


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family(family, tmp_path, monkeypatch):
    await check_packed(make(family, tmp_path / family), monkeypatch)
