"""How a model's layers are spread over several devices: the text of a `device_map` setting, and who gets how many.

Knows nothing of torch: `lookonce plan` does the same arithmetic without a GPU in sight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lookonce.core.errors import LookonceError, invalid

AUTO = "auto"
_ENTRY = re.compile(r"([a-z]+(?::[0-9]{1,3})?)(?:=([0-9]{1,4})-([0-9]{1,4}))?")


@dataclass(frozen=True)
class Share:
    """A device, and the layers it is given; None: as many as suit it."""

    device: str  # "cuda:1", "cpu"
    layers: range | None = None

    def __str__(self) -> str:
        return self.device if self.layers is None else f"{self.device}={self.layers.start}-{self.layers.stop - 1}"


def parse(text: str) -> list[Share]:
    """The shares of "cuda:0,cuda:1" or "cuda:0=0-39,cuda:1=40-79", in the order of the layers; `auto` is not one.

    Raises INVALID_ARGUMENT naming device_map."""
    shares: list[Share] = []
    for item in text.split(","):
        match = _ENTRY.fullmatch(item.strip())
        if match is None:
            raise _wrong(text, f"{item.strip()!r} is neither a device nor DEVICE=FIRST-LAST")
        ranged = match[2] is not None
        name = "cuda:0" if match[1] == "cuda" else match[1]
        shares.append(Share(name, range(int(match[2]), int(match[3]) + 1) if ranged else None))
    names = [share.device for share in shares]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(text, f"{name} is named twice")
    return shares


def layers_of(text: str, shares: Sequence[Share], layers: int) -> list[range] | None:
    """The ranges that were given, checked to be those of all `layers` in order; None when none was given.

    Raises INVALID_ARGUMENT naming device_map."""
    if len(shares) > layers:
        raise _wrong(text, f"{len(shares)} devices for {layers} layers")
    given = [share.layers for share in shares if share.layers is not None]
    if not given:
        return None
    if len(given) < len(shares):
        raise _wrong(text, "give every device its layers, or none")
    expected = 0
    for part in given:
        if part.start != expected or not len(part):
            raise _wrong(text, f"layer {expected} must come next, not {part.start}-{part.stop - 1}")
        expected = part.stop
    if expected != layers:
        raise _wrong(text, f"the model's layers are 0-{layers - 1}, the last one given is {expected - 1}")
    return given


def spread(free_bytes: Sequence[int], layers: int) -> list[range]:
    """Consecutive layers for each of some devices with so many bytes of room, at least one each.

    Every layer takes the same and KV is the same for every layer, so what counts is the least room for each layer: one
    layer after the other goes to the device that has most room for each of its own (D'Hondt's method, which makes that
    least as large as can be)."""
    counts = [1] * len(free_bytes)
    for _ in range(layers - len(free_bytes)):
        counts[max(range(len(free_bytes)), key=lambda at: free_bytes[at] / (counts[at] + 1))] += 1
    return consecutive(counts)


def consecutive(counts: Iterable[int]) -> list[range]:
    """Ranges of these lengths, one after the other from 0."""
    return [range(*ends) for ends in pairwise(accumulate(counts, initial=0))]


def _wrong(text: str, why: str) -> LookonceError:
    return invalid(f"device_map {text!r}: {why}", param="device_map")
