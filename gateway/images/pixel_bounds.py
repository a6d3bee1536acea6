"""How many pixels an image has once it is resized: what a request, OpenAI's `detail` or a policy ask for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from lookonce.core.errors import invalid
from protos.lookonce.v1 import vision_pb2

_SERVICE = "--max-pixels of the vision service (LOOKONCE_VISION_MAX_PIXELS) sets the most"


@dataclass(frozen=True)
class PixelBounds:
    """Fewest and most pixels of a resized image; None: the vision service's own bound.

    `min_field` and `max_field` name the fields of the request that asked. A bound without one is the gateway's own
    (of detail "low", of a policy): it bends to what the service can, where one that was asked for is refused.
    Raises INVALID_ARGUMENT for a min above the max.
    """

    min: int | None = None
    max: int | None = None
    min_field: str = field(default="", compare=False)
    max_field: str = field(default="", compare=False)
    name: str = field(init=False, compare=False)
    """What tells the embeddings of one image apart: "full", the most pixels, or "FEWEST-MOST"."""

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            bound = f"'{self.max_field}'" if self.max_field else "the bound of detail 'low' or of the policy"
            text = f"'{self.min_field}' is {self.min}, above {bound}, {self.max}: ask for at most that"
            raise invalid(text, param=self.min_field)
        most = "full" if self.max is None else str(self.max)
        object.__setattr__(self, "name", most if self.min is None else f"{self.min}-{most}")

    @property
    def are_asked(self) -> bool:
        """Whether the request asked for any."""
        return self.min is not None or (self.max is not None and bool(self.max_field))

    def joined(self, other: PixelBounds) -> PixelBounds:
        """Both at once: the larger min, the smaller max. Raises INVALID_ARGUMENT when no size is within both."""
        low = max(self, other, key=lambda one: one.min or 0)
        high = min(self, other, key=lambda one: one.max or sys.maxsize)
        return PixelBounds(low.min, high.max, low.min_field, high.max_field)

    def field_of(self, bound: str | None) -> str | None:
        """The request's field behind the vision service's `min_pixels` or `max_pixels`; None for anything else."""
        return {"min_pixels": self.min_field, "max_pixels": self.max_field}.get(bound or "") or None

    def within(self, service: vision_pb2.VisionDescription) -> PixelBounds:
        """The bounds as that service takes them. Raises INVALID_ARGUMENT for what was asked and can't be."""
        least, most = service.least_pixels, service.max_pixels
        if self.max_field and self.max is not None and not least <= self.max <= most:
            text = f"'{self.max_field}' must be from {least} to {most}, got {self.max}: {_SERVICE}"
            raise invalid(text, param=self.max_field)
        if self.min is not None and self.min > most:
            text = f"'{self.min_field}' must be from 1 to {most}, got {self.min}: {_SERVICE}"
            raise invalid(text, param=self.min_field)
        if self.max is None or (self.max >= most and not self.max_field):
            return PixelBounds(self.min)
        return PixelBounds(self.min, max(self.max, least))


AS_SERVED = PixelBounds()
"""The vision service's own bounds."""
