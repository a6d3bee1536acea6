"""Which settings of Qwen2-VL and its successors the services can compute. Pure functions over parsed JSON; each answers
all it finds.

A problem is one sentence: the file, what is wrong, and after a semicolon what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from lookonce.models.qwen2_vl.rope import STRETCHED, TYPES, rope_type

_YARN_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_VISION_SIZES = (
    "depth",
    "embed_dim",
    "hidden_size",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "mlp_ratio",
)
_TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_DEFAULTED_TEXT_SIZES = ("num_key_value_heads", "max_position_embeddings")
_LAYERS = ("depth", "num_hidden_layers")
MOST_LAYERS = 1000
"""Far beyond any model: layers are built before it is known whether there are weights to fill them."""
_RESAMPLING = range(6)  # PIL's filters
FROM_REPOSITORY = "take config.json from the model's repository"
_PREPROCESSOR = "preprocessor_config.json"
_PREPROCESSOR_FROM_REPOSITORY = f"take {_PREPROCESSOR} from the model's repository"


EMBEDDING_CLASSES = "GmeQwen2VL"
"""How the classes are called that repositories of embedding models bring along: a model whose head is not used."""


def model_problems(config: dict[str, Any], model_class: str) -> Iterator[str]:
    """What says that the checkpoint is another kind of model than `model_class`, which answers."""
    stated = config.get("architectures")
    named = [str(name) for name in stated] if isinstance(stated, list) else []
    if named and model_class not in named and not any(name.startswith(EMBEDDING_CLASSES) for name in named):
        yield (
            f"config.json: architectures is {', '.join(named)}, a model with another head or none "
            f"(embedding, reward, classification); use a checkpoint of {model_class}"
        )


def vision_problems(vision: dict[str, Any]) -> Iterator[str]:
    """Of Qwen2-VL's vision config with its defaults filled in."""
    return tower_problems(vision, _VISION_SIZES, width="embed_dim", activation="quick_gelu", label="Qwen2-VL")


def tower_problems(
    vision: dict[str, Any], sizes: Iterable[str], *, width: str, activation: str, label: str
) -> Iterator[str]:
    """Of a vision config with its defaults filled in; `sizes` and `width` are names of its fields."""
    yield from _sizes(vision, sizes, "vision_config.")
    if vision["hidden_act"] != activation:
        yield (
            f"config.json: vision_config.hidden_act {vision['hidden_act']!r} is not supported ({activation}); "
            f"use a checkpoint of {label}"
        )
    if vision["in_channels"] != 3:
        yield f"config.json: vision_config.in_channels must be 3, got {vision['in_channels']!r}; {FROM_REPOSITORY}"
    patches, heads = vision[width], vision["num_heads"]
    if is_size(patches) and is_size(heads) and (patches % heads or patches // heads % 4):
        yield (
            f"config.json: vision_config.{width} {patches} must be num_heads {heads} times a multiple of 4; "
            f"{FROM_REPOSITORY}"
        )


def text_problems(
    text: dict[str, Any], label: str, *, head_dim: Any = None, section: Sequence[int] = (16, 24, 24)
) -> Iterator[str]:
    """Of the language model's settings; `label` is the family's. `head_dim`: where that is a setting of its own;
    `section`: M-RoPE's unless it is stated."""
    yield from _sizes(text, _TEXT_SIZES, "")
    yield from _sizes(text, [name for name in _DEFAULTED_TEXT_SIZES if name in text], "")
    if not _is_number(text.get("rms_norm_eps", 1e-5)):
        yield f"config.json: rms_norm_eps must be a number, got {text['rms_norm_eps']!r}; {FROM_REPOSITORY}"
    if text.get("hidden_act", "silu") != "silu":
        yield f"config.json: hidden_act {text['hidden_act']!r} is not supported (silu); use a checkpoint of {label}"
    yield from _window_problems(text)
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    keys = text.get("num_key_value_heads") or heads
    if not (is_size(hidden) and is_size(heads) and is_size(keys)):
        return
    if head_dim is not None:
        if not is_size(head_dim) or head_dim % 2 or heads % keys:
            yield (
                f"config.json: head_dim {head_dim!r} must be an even number, and num_attention_heads {heads} a "
                f"multiple of num_key_value_heads {keys}; {FROM_REPOSITORY}"
            )
        else:
            yield from _rope_problems(text, head_dim, section)
    elif hidden % heads or heads % keys or hidden // heads % 2:
        yield (
            f"config.json: hidden_size {hidden} must be num_attention_heads {heads} times an even width, and these a "
            f"multiple of num_key_value_heads {keys}; {FROM_REPOSITORY}"
        )
    else:
        yield from _rope_problems(text, hidden // heads, section)


def preprocessor_problems(preprocessor: dict[str, Any], vision: dict[str, Any]) -> Iterator[str]:
    """Of preprocessor settings with their defaults filled in, beside the vision config they are for."""
    if not preprocessor["do_resize"]:
        yield f"{_PREPROCESSOR}: do_resize false is not supported; set it to true"
    for name, counterpart in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        if preprocessor[name] != vision[counterpart]:
            yield (
                f"{_PREPROCESSOR}: {name} {preprocessor[name]!r} differs from config.json's "
                f"vision_config.{counterpart} {vision[counterpart]!r}; take both from the same repository"
            )
    if preprocessor["resample"] not in _RESAMPLING:
        yield (
            f"{_PREPROCESSOR}: resample must be one of PIL's filters, 0 to 5, got {preprocessor['resample']!r}; "
            f"{_PREPROCESSOR_FROM_REPOSITORY}"
        )
    if not _is_number(preprocessor["rescale_factor"]):
        yield (
            f"{_PREPROCESSOR}: rescale_factor must be a number, got {preprocessor['rescale_factor']!r}; "
            f"{_PREPROCESSOR_FROM_REPOSITORY}"
        )
    for name in ("image_mean", "image_std"):
        values = preprocessor[name] if isinstance(preprocessor[name], list) else [preprocessor[name]] * 3
        if len(values) != 3 or not all(map(_is_number, values)) or (name == "image_std" and 0 in values):
            yield (
                f"{_PREPROCESSOR}: {name} must be three numbers{', none 0' * (name == 'image_std')}, "
                f"got {preprocessor[name]!r}; {_PREPROCESSOR_FROM_REPOSITORY}"
            )


def _window_problems(text: dict[str, Any]) -> Iterator[str]:
    types = text.get("layer_types")
    windowed = isinstance(types, list) and any(kind != "full_attention" for kind in types)
    if text.get("use_sliding_window") or windowed:
        name = "use_sliding_window" if text.get("use_sliding_window") else "layer_types"
        yield (
            f"config.json: {name}: sliding-window attention is not supported; use a checkpoint with full attention "
            "(use_sliding_window false), as all published ones are"
        )


def _rope_problems(text: dict[str, Any], head_width: int, default: Sequence[int]) -> Iterator[str]:
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(name) or {}
    if not isinstance(rope, dict):
        yield f"config.json: {name} must be an object, got {rope!r}; {FROM_REPOSITORY}"
        return
    kind = rope_type(rope)
    if kind not in TYPES:
        yield (
            f"config.json: {name}: rope type {kind!r} is not supported ({', '.join(TYPES)}); "
            f"remove the long-context extension from {name}"
        )
    elif kind in STRETCHED:
        yield from _stretch_problems(name, kind, rope)
    section = rope.get("mrope_section", list(default))
    whole = isinstance(section, list) and len(section) == 3 and all(map(is_size, section))
    if not whole or sum(section) != head_width // 2:
        yield (
            f"config.json: {name}: mrope_section must be three whole numbers that add up to half a head's width, "
            f"{head_width // 2}, got {section!r}; {FROM_REPOSITORY}"
        )
    for holder in (rope, text):
        theta = holder.get("rope_theta")
        if theta is not None and not (_is_number(theta) and theta > 0):
            yield f"config.json: rope_theta must be a number above 0, got {theta!r}; {FROM_REPOSITORY}"


def _stretch_problems(name: str, kind: str, rope: dict[str, Any]) -> Iterator[str]:
    trained = rope.get("original_max_position_embeddings")
    for field in _YARN_NUMBERS if kind == "yarn" else ("factor",):
        value, least = rope.get(field), 1 if field == "factor" else 0
        unset = value is None and (field != "factor" or (kind == "yarn" and trained is not None))
        if not unset and not (_is_number(value) and value >= least):
            yield f"config.json: {name}: {field} must be a number from {least} on, got {value!r}; {FROM_REPOSITORY}"
    if trained is not None and not is_size(trained):
        yield (
            f"config.json: {name}: original_max_position_embeddings must be a whole number above 0, got {trained!r}; "
            f"{FROM_REPOSITORY}"
        )


def _sizes(settings: dict[str, Any], names: Iterable[str], section: str) -> Iterator[str]:
    for name in names:
        value = settings.get(name)
        if value is None:
            yield f"config.json: {section}{name} missing; {FROM_REPOSITORY}"
        elif not is_size(value):
            yield f"config.json: {section}{name} must be a whole number above 0, got {value!r}; {FROM_REPOSITORY}"
        elif name in _LAYERS and value > MOST_LAYERS:
            yield f"config.json: {section}{name} must be at most {MOST_LAYERS}, got {value}; {FROM_REPOSITORY}"


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a setting is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
