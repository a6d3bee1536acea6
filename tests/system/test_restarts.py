"""Rolling restarts: replicas that are told to stop, and come back, while the others serve. No request fails."""

from __future__ import annotations

import os

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.system.clients import Clients, roll
from tests.system.cluster import System

pytestmark = pytest.mark.slow
TIMES = int(os.environ.get("LOOKONCE_RESTARTS", "20"))


@pytest.mark.parametrize("kind", ["languages", "visions"])
def test_no_request_fails_in_twenty_restarts(kind, tmp_path):
    model = make_random_checkpoint(tmp_path / "model", max_pixels=100 * 28 * 28)
    with System(model, tmp_path, visions=2, languages=2) as system, Clients(system) as clients:
        for number in range(TIMES):
            clients.wait_for_more(16)
            roll(getattr(system, kind)[number % 2])
        clients.wait_for_more(16)
    assert clients.failed == []
    assert len(clients.results) > 16 * TIMES
