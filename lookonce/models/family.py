"""What lookonce must know of a model family to split it: names of weights, shapes in its config, special tokens.

A family is a set of pure functions over a checkpoint's JSON files. It knows nothing of torch, of files or of services.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Half(StrEnum):
    """One side of a split model."""

    VISION = "vision"
    LANGUAGE = "language"

    @property
    def other(self) -> Half:
        """The side this one is served apart from."""
        return Half.LANGUAGE if self is Half.VISION else Half.VISION


@dataclass(frozen=True)
class SpecialTokens:
    """Ids and texts of the tokens that mark an image in a prompt."""

    image_id: int
    video_id: int
    vision_start_id: int
    vision_end_id: int
    image: str
    video: str
    vision_start: str
    vision_end: str


class Family(Protocol):
    """Description of one architecture. `config` is the parsed config.json, flat or nested."""

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        ...

    def locate(self, name: str) -> tuple[Half, str] | None:
        """Half and module-relative name of a stored tensor, or None when the tensor carries no weight (old buffers).

        Raises CheckpointError for a name that no layout of the family has.
        """
        ...

    def vision_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings that decide what the vision tower computes, defaults filled in (they enter the fingerprint)."""
        ...

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The language model's settings, whether config.json is flat or nests them."""
        ...

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        """Every setting of these halves that can't be computed, one sentence each: file, what is wrong; remedy.

        `preprocessor` has its defaults filled in; None: unknown.
        """
        ...

    def tied_head(self, config: dict[str, Any]) -> bool:
        """Whether the output head shares the input embedding's weight."""
        ...

    def preprocessor(self, stored: dict[str, Any]) -> dict[str, Any]:
        """preprocessor_config.json with every default filled in, and `min_pixels` / `max_pixels` at the top level."""
        ...

    def fingerprint_preprocessor(self, preprocessor: dict[str, Any]) -> dict[str, Any]:
        """The preprocessor settings that change an embedding's bytes, pixel bounds left out (they are in its key)."""
        ...

    def special_tokens(self, config: dict[str, Any]) -> SpecialTokens:
        """The tokens that mark an image in a prompt."""
        ...

    def hidden_size(self, config: dict[str, Any]) -> int:
        """Width of an image embedding, which is the language model's hidden size."""
        ...

    def merge_size(self, config: dict[str, Any]) -> int:
        """Patches per side that are merged to one token."""
        ...

    def pixel_factor(self, config: dict[str, Any]) -> int:
        """Pixels per side of one token: height and width are resized to multiples of it."""
        ...

    def tokens_per_grid(self, config: dict[str, Any], grid_thw: tuple[int, int, int]) -> int:
        """Tokens of one image whose grid has t, h, w patches."""
        ...
