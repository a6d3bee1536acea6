"""A lease held while something is read, changed and written back, so that processes don't undo each other's changes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from lookonce.core.stores.interface import Leases

SECONDS = 10.0
"""How long a holder that died keeps others waiting at most; also how long the work may take."""
FIRST_PAUSE = 0.005
LAST_PAUSE = 0.1
"""Seconds between two tries: from the first, growing, to the last."""
log = structlog.get_logger(__name__)


@asynccontextmanager
async def leased(leases: Leases, name: bytes, *, seconds: float = SECONDS) -> AsyncIterator[None]:
    """Hold the lease `name` for the body. After twice its `seconds` of waiting the body runs without it: what others
    hold for so long is no longer a short change."""
    owner, pause, give_up = os.urandom(16), FIRST_PAUSE, time.monotonic() + 2 * seconds
    while not await leases.acquire(name, owner, seconds):
        if time.monotonic() > give_up:
            log.warning("changed without its lease", seconds=2 * seconds)
            break
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))
        pause = min(1.5 * pause, LAST_PAUSE)
    try:
        yield
    finally:
        await leases.release(name, owner)
