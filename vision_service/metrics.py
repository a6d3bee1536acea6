"""What the vision service tells Prometheus. Collectors are made once a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from lookonce.core.errors import LookonceError

ENCODES: Final = Counter("lookonce_vision_encodes", "Images that went through the tower.")
HITS: Final = Counter("lookonce_vision_hits", "Requests answered from a store.")
COALESCED: Final = Counter("lookonce_vision_coalesced", "Requests answered by an encode made for another request.")
ERRORS: Final = Counter("lookonce_vision_errors", "Failed requests, by kind.", ("kind",))
UNDER_WAY: Final = Gauge("lookonce_vision_images_under_way", "Images being decoded, waiting or being encoded.")
WAITING_PATCHES: Final = Gauge("lookonce_vision_waiting_patches", "Patches that wait for a batch.")
BATCH_PATCHES: Final = Histogram(
    "lookonce_vision_batch_patches", "Patches in a batch.", buckets=[2.0**n for n in range(6, 18)]
)
ENCODE_SECONDS: Final = Histogram(
    "lookonce_vision_encode_seconds", "Forward of a batch.", buckets=[0.001 * 2**n for n in range(16)]
)


@contextmanager
def counting_errors() -> Iterator[None]:
    """Count the error that leaves the block, by kind."""
    try:
        yield
    except LookonceError as error:
        ERRORS.labels(error.kind.value).inc()
        raise
