"""Qwen2-VL (arXiv:2409.12191): names, shapes and defaults, as published and as newer saves write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Half, SpecialTokens
from lookonce.models.qwen2_vl.limits import model_problems, preprocessor_problems, text_problems, vision_problems

# Longest first: the newer layout's names start with the older one's `model.`.
_PREFIXES: tuple[tuple[str, Half, str], ...] = (
    ("model.language_model.", Half.LANGUAGE, "model."),
    ("model.visual.", Half.VISION, ""),
    ("visual.", Half.VISION, ""),
    ("lm_head.", Half.LANGUAGE, "lm_head."),
    ("model.", Half.LANGUAGE, "model."),
)
_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")

_VISION_DEFAULTS: dict[str, Any] = {
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
_OUTER_KEYS = (
    "vision_config",
    "architectures",
    "model_type",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "transformers_version",
)
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


class Qwen2VL:
    """The family of Qwen2-VL 2B, 7B and 72B and their fine-tunes."""

    model_type = "qwen2_vl"

    def locate(self, name: str) -> tuple[Half, str] | None:
        """See `Family.locate`. Language names are relative to {"model.": text model, "lm_head.": output head}."""
        if name.endswith(_BUFFERS):
            return None
        for prefix, half, replacement in _PREFIXES:
            if name.startswith(prefix):
                return half, replacement + name[len(prefix) :]
        raise CheckpointError(
            f"tensor {name!r} belongs to no layout of {self.model_type} (visual.*, model.*, lm_head.* or "
            "model.visual.*, model.language_model.*); is it an adapter or quantised? Merge it to plain weights first"
        )

    def vision_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.vision_config`."""
        stored = _section(config, "vision_config")
        if stored is None:
            raise CheckpointError("config.json: vision_config is missing; take config.json from the model's repository")
        settings = {key: stored.get(key, default) for key, default in _VISION_DEFAULTS.items()}
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
        """See `Family.text_config`."""
        nested = _section(config, "text_config")
        if nested is not None:
            return dict(nested)
        return {key: value for key, value in config.items() if key not in _OUTER_KEYS}

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        """See `Family.problems`."""
        wanted = set(halves)
        vision = self.vision_config(config)
        found = list(model_problems(config))
        if Half.VISION in wanted:
            found += vision_problems(vision)
            found += preprocessor_problems(preprocessor, vision) if preprocessor is not None else ()
        if Half.LANGUAGE in wanted:
            found += text_problems(self.text_config(config))
        return found

    def tied_head(self, config: dict[str, Any]) -> bool:
        """See `Family.tied_head`. Older nested saves put the switch inside text_config."""
        nested = _section(config, "text_config") or {}
        return bool(config.get("tie_word_embeddings", False) or nested.get("tie_word_embeddings", False))

    def preprocessor(self, stored: dict[str, Any]) -> dict[str, Any]:
        """See `Family.preprocessor`. Bounds stand in min_pixels / max_pixels or in size's shortest and longest edge."""
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
        """See `Family.fingerprint_preprocessor`. EXIF and alpha are handled before the processor."""
        settings = {key: preprocessor[key] for key in _PREPROCESSOR_DEFAULTS}
        return settings | {"exif_orientation": "applied", "alpha": "white"}

    def special_tokens(self, config: dict[str, Any]) -> SpecialTokens:
        """See `Family.special_tokens`."""
        return SpecialTokens(
            image_id=int(config.get("image_token_id", 151655)),
            video_id=int(config.get("video_token_id", 151656)),
            vision_start_id=int(config.get("vision_start_token_id", 151652)),
            vision_end_id=int(config.get("vision_end_token_id", 151653)),
            image="<|image_pad|>",
            video="<|video_pad|>",
            vision_start="<|vision_start|>",
            vision_end="<|vision_end|>",
        )

    def hidden_size(self, config: dict[str, Any]) -> int:
        """See `Family.hidden_size`. The tower's output width must agree with the language model's input width."""
        text = self.text_config(config).get("hidden_size", 8192)
        vision = self.vision_config(config)["hidden_size"]
        if text != vision or not isinstance(text, int):
            raise CheckpointError(
                f"config.json: vision_config.hidden_size {vision} differs from the language model's {text}; "
                "take config.json from the model's repository"
            )
        return text

    def merge_size(self, config: dict[str, Any]) -> int:
        """See `Family.merge_size`."""
        return int(self.vision_config(config)["spatial_merge_size"])

    def pixel_factor(self, config: dict[str, Any]) -> int:
        """See `Family.pixel_factor`: 28 in every published model."""
        return int(self.vision_config(config)["patch_size"]) * self.merge_size(config)

    def tokens_per_grid(self, config: dict[str, Any], grid_thw: tuple[int, int, int]) -> int:
        """See `Family.tokens_per_grid`."""
        t, h, w = grid_thw
        return t * h * w // self.merge_size(config) ** 2


def _section(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = config.get(key)
    return value if isinstance(value, dict) else None
