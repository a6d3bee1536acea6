"""Families with recurrent layers: a prefix is its KV and the state at its end, and answers are the unsplit model's."""

from __future__ import annotations

import pytest

from tests.families.test_general import holds
from tests.families.tiny_checkpoints import make
from tests.families.tiny_recurrent import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family(family, tmp_path, monkeypatch):
    await holds(make(FAMILIES[family], tmp_path / family), monkeypatch)
