"""Qwen2-VL (arXiv:2409.12191): names, shapes and defaults, as published and as newer saves write them; the sizes it
resizes images to, and the positions of their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lookonce.core.errors import CheckpointError, invalid
from lookonce.models.family import Dimensions, Family, Grid, Half, Layout, Marker, SpecialTokens, VisionEncoder
from lookonce.models.qwen2_vl.architecture import Architecture, Qwen2VLArchitecture, architecture_of, tensor_shapes
from lookonce.models.qwen2_vl.limits import (
    EMBEDDING_CLASSES,
    model_problems,
    preprocessor_problems,
    text_problems,
    vision_problems,
)
from lookonce.models.qwen2_vl.rope import extended

if TYPE_CHECKING:
    import torch

    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.plain import Plain
    from lookonce.models.text_adapter import ModelAdapter

# Longest first: the newer layout's names start with the older one's `model.`.
_PREFIXES: tuple[tuple[str, Half, str], ...] = (
    ("model.language_model.", Half.LANGUAGE, "model."),
    ("model.visual.", Half.VISION, ""),
    ("visual.", Half.VISION, ""),
    ("lm_head.", Half.LANGUAGE, "lm_head."),
    ("model.", Half.LANGUAGE, "model."),
)
_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")

_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_OUTER_KEYS = ("vision_config", "architectures", "model_type", *_TOKEN_IDS, "transformers_version")
# Those of transformers' Qwen2VLImageProcessor (mean and std are CLIP's).
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,  # PIL bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_DEFAULT_MIN_PIXELS = 56 * 56
_DEFAULT_MAX_PIXELS = 28 * 28 * 1280
# Contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REMEMBERED, _REMEMBERED_LENGTH = 128, 2048
"""Layouts whose positions are kept, and the longest such: the same questions are asked about many images."""


class Qwen2VL:
    """The family of Qwen2-VL 2B, 7B and 72B and their fine-tunes; its successors override what is their tower's."""

    model_type = "qwen2_vl"
    label = "Qwen2-VL"
    served_by_vllm = True
    kind: ClassVar[type[Architecture]] = Qwen2VLArchitecture
    vision_defaults: ClassVar[dict[str, Any]] = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    """Every setting of vision_config that decides what the tower computes."""
    vector_prompt = ("You are a helpful assistant.", "<|endoftext|>")
    """GME-Qwen2-VL's (arXiv:2412.16855)."""
    embedding_classes = EMBEDDING_CLASSES
    row_width = "hidden_size"
    """What vision_config calls the width of an embedding's rows."""
    layouts = "visual.*, model.* and lm_head.*"
    token_id_fields = _TOKEN_IDS
    words = WORDS
    cpu_max_pixels = 1280 * 28 * 28
    """1,280 tokens. The work grows with the square of an image's size, and published checkpoints allow for 16,384."""

    def locate(self, name: str) -> tuple[Half, str] | None:
        """Language names are relative to {"model.": text model, "lm_head.": output head}."""
        if name.endswith(_BUFFERS):
            return None
        for prefix, half, replacement in _PREFIXES:
            if name.startswith(prefix):
                return half, replacement + name[len(prefix) :]
        raise CheckpointError(
            f"tensor {name!r} belongs to no layout of {self.model_type} (visual.*, model.*, lm_head.* or "
            "model.visual.*, model.language_model.*); is it an adapter or quantised? Merge it to plain weights first"
        )

    def tensor_shapes(self, config: dict[str, Any], half: Half, *, head: bool) -> dict[str, tuple[int, ...]]:
        shapes = tensor_shapes(self.architecture(config), tied=not head)
        places = ((self.locate(name), shape) for name, shape in shapes.items())
        return {place[1]: shape for place, shape in places if place is not None and place[0] is half}

    def architecture(self, config: dict[str, Any]) -> Architecture:
        """The dimensions that a config.json states. Raises CheckpointError naming what it lacks."""
        return architecture_of(
            self.kind, self.vision_config(config), self.text_config(config), self.hidden_size(config)
        )

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """At hand are two rows of the tower's width for each patch, and three of its MLP's."""
        arch = self.architecture(config)
        return Dimensions(
            layers=arch.layers,
            hidden=arch.hidden,
            heads=arch.heads,
            kv_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            ffn=arch.ffn,
            vocabulary=arch.vocab,
            patches_per_token=arch.merge**2,
            patch_numbers=2 * arch.vision_width + 3 * arch.vision_ffn,
        )

    def vision_config(self, config: dict[str, Any]) -> dict[str, Any]:
        stored = _section(config, "vision_config")
        if stored is None:
            raise CheckpointError("config.json: vision_config is missing; take config.json from the model's repository")
        settings = {key: stored.get(key, default) for key, default in self.vision_defaults.items()}
        # transformers never reads the published `in_chans`; 3 channels either way.
        settings["in_channels"] = stored.get("in_channels", 3)
        rope = _section(stored, "rope_parameters") or {}
        theta = rope.get("rope_theta", 10000.0)
        if not isinstance(theta, int | float):
            raise CheckpointError(
                f"config.json: vision_config's rope_theta must be a number, got {theta!r}; "
                "take config.json from the model's repository"
            )
        settings["rope_theta"] = float(theta)
        return settings

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        nested = _section(config, "text_config")
        if nested is not None:
            return extended(dict(nested))
        return extended({key: value for key, value in config.items() if key not in _OUTER_KEYS})

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        wanted = set(halves)
        vision = self.vision_config(config)
        found = list(model_problems(config, self.kind.model_class))
        if Half.VISION in wanted:
            found += self.vision_problems(vision)
            found += preprocessor_problems(preprocessor, vision) if preprocessor is not None else ()
        if Half.LANGUAGE in wanted:
            found += self.text_problems(self.text_config(config))
        return found

    def vision_problems(self, vision: dict[str, Any]) -> Iterable[str]:
        """Every setting of a filled-in vision config that can't be computed."""
        return vision_problems(vision)

    def text_problems(self, text: dict[str, Any]) -> Iterable[str]:
        """Every setting of the language model that can't be computed."""
        return text_problems(text, self.label)

    def tied_head(self, config: dict[str, Any]) -> bool:
        """Older nested saves put the switch inside text_config."""
        nested = _section(config, "text_config") or {}
        return bool(config.get("tie_word_embeddings", False) or nested.get("tie_word_embeddings", False))

    def preprocessor(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Bounds stand in min_pixels / max_pixels or in size's shortest and longest edge."""
        filled = _PREPROCESSOR_DEFAULTS | {key: value for key, value in stored.items() if value is not None}
        size = _section(stored, "size") or {}
        filled["min_pixels"] = stored.get("min_pixels") or size.get("shortest_edge") or _DEFAULT_MIN_PIXELS
        filled["max_pixels"] = stored.get("max_pixels") or size.get("longest_edge") or _DEFAULT_MAX_PIXELS
        filled["size"] = {"shortest_edge": filled["min_pixels"], "longest_edge": filled["max_pixels"]}
        bounds = (filled["min_pixels"], filled["max_pixels"])
        if not all(isinstance(bound, int) for bound in bounds) or not 0 < bounds[0] <= bounds[1]:
            raise CheckpointError(
                f"preprocessor_config.json: min_pixels {bounds[0]!r} must be above 0 and at most "
                f"max_pixels {bounds[1]!r}; take the file from the model's repository"
            )
        return filled

    def fingerprint_preprocessor(self, preprocessor: dict[str, Any]) -> dict[str, Any]:
        """EXIF and alpha are handled before the processor."""
        settings = {key: preprocessor[key] for key in _PREPROCESSOR_DEFAULTS}
        return settings | {"exif_orientation": "applied", "alpha": "white"}

    def special_tokens(self, config: dict[str, Any]) -> SpecialTokens:
        return SpecialTokens(
            image_id=int(config.get("image_token_id", 151655)),
            image="<|image_pad|>",
            marker="<|vision_start|><|image_pad|><|vision_end|>",
            turn_end="<|im_end|>",
        )

    def hidden_size(self, config: dict[str, Any]) -> int:
        """The tower's output width must agree with the language model's input width."""
        text = self.text_config(config).get("hidden_size", 8192)
        vision = self.vision_config(config)[self.row_width]
        if text != vision or not isinstance(text, int):
            raise CheckpointError(
                f"config.json: vision_config.{self.row_width} {vision} differs from the language model's {text}; "
                "take config.json from the model's repository"
            )
        return text

    def merge_size(self, config: dict[str, Any]) -> int:
        return int((_section(config, "vision_config") or {}).get("spatial_merge_size", 2))

    def pixel_factor(self, config: dict[str, Any]) -> int:
        """Pixels per side of one token, 28 in every published model: images are resized to multiples of it."""
        return int(self.vision_config(config)["patch_size"]) * self.merge_size(config)

    def least_pixels(self, config: dict[str, Any]) -> int:
        return self.pixel_factor(config) ** 2

    def image_grid(self, config: dict[str, Any], width: int, height: int, min_pixels: int, max_pixels: int) -> Grid:
        factor, merge = self.pixel_factor(config), self.merge_size(config)
        rows, columns = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        return 1, rows // factor * merge, columns // factor * merge

    def tokens_per_grid(self, config: dict[str, Any], grid_thw: Grid) -> int:
        (t, h, w), merge = grid_thw, self.merge_size(config)
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise invalid(f"image.grid {t}x{h}x{w} is not a whole number of {merge}x{merge} cells", param="image.grid")
        return t * h * w // merge**2

    def encode_flops(self, config: dict[str, Any], tokens: int) -> float:
        return self.architecture(config).encode_flops(tokens)

    def markers(self, config: dict[str, Any], grid_thw: Grid) -> tuple[Marker, ...]:
        return ()

    def positions(self, config: dict[str, Any], length: int, images: Layout) -> tuple[NDArray[np.int64], int]:
        return mrope_positions(length, images, self.merge_size(config))

    def load_encoder(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> VisionEncoder:
        from lookonce.models.qwen2_vl.vision import Encoder

        return Encoder.load(checkpoint, dtype, device, quantization=quantization, native=native)

    def load_text(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        where: Callable[[str], torch.device],
        devices: Sequence[torch.device],
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> ModelAdapter:
        from lookonce.models.qwen2_vl.modules import load_language_model
        from lookonce.models.qwen2_vl.text import Qwen2VLAdapter

        model, head = load_language_model(checkpoint, dtype, where)
        return Qwen2VLAdapter(model, head, quantization=quantization, devices=devices, native=native)

    def load_vectors(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        where: Callable[[str], torch.device],
        devices: Sequence[torch.device],
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> ModelAdapter:
        """See `EmbeddingFamily`: the rows that the output head would be given."""
        adapter: Any = self.load_text(
            checkpoint, dtype, where, devices, quantization=quantization, native=native
        )  # a Qwen2VLAdapter, in every family of this line
        adapter.drop_head()
        loaded: ModelAdapter = adapter
        return loaded

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain | None:
        """None for a successor that has none of its own."""
        from lookonce.models.qwen2_vl.plain import PlainQwen2VL

        return PlainQwen2VL(checkpoint, dtype) if self.kind is Qwen2VLArchitecture else None


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to resize to: multiples of `factor`, the product within the bounds where the ratio allows.

    Same arithmetic as transformers' function of this name, float rounding included. Sides of an enlarged image are
    rounded up: it has fewer than min_pixels + factor * (height + width) * s + factor**2 pixels, s = sqrt(min_pixels /
    (height * width)), which may be above the max. That isn't clamped: the bounds as given are in the embedding's key.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def mrope_positions(length: int, images: Layout, merge_size: int) -> tuple[NDArray[np.int64], int]:
    """M-RoPE positions of a prompt (arXiv:2409.12191, section 2.1), from its layout alone: [3, length] (temporal,
    height, width), and the position of the first generated token.

    Text counts up by one on all three rows. An image's tokens get frame, row and column of their cell, counted from the
    position it starts at; what follows goes on after its longer side. `images` come in order and don't overlap. Treat
    the result as read-only.
    """
    return (_remembered if length <= _REMEMBERED_LENGTH else _laid_out)(length, tuple(images), merge_size)


def _laid_out(length: int, images: Layout, merge_size: int) -> tuple[NDArray[np.int64], int]:
    positions = np.empty((3, length), dtype=np.int64)
    at = position = 0
    for start, (t, h, w) in images:
        positions[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        rows, columns = h // merge_size, w // merge_size
        end = start + t * rows * columns
        cells = positions[:, start:end].reshape(3, t, rows, columns)
        # by frame, row, column: the order of the encoder's output
        cells[0] = np.arange(position, position + t)[:, None, None]
        cells[1] = np.arange(position, position + rows)[:, None]
        cells[2] = np.arange(position, position + columns)
        position += max(rows, columns)
        at = end
    positions[:, at:] = np.arange(position, position + length - at)
    return positions, int(positions.max()) + 1 if length else 0


_remembered = lru_cache(maxsize=_REMEMBERED)(_laid_out)


def _section(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = config.get(key)
    return value if isinstance(value, dict) else None


FAMILY: Family = Qwen2VL()
