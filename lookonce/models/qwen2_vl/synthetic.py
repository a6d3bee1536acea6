"""Complete random-weight checkpoints of a true architecture, for tests, benchmarks and the demo: Qwen2-VL's, and those
of its successors, which give their own sizes. No torch.

A tensor's values depend only on the seed and on its place in the architecture: layouts, shard counts and dtypes of one
seed are the same model. Scales keep activations near 1, attention soft and answers dependent on the image.
`python -m lookonce.models.qwen2_vl.synthetic OUT --size tiny` writes one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.writing import TensorSpec, plan_by_count, write_json, write_shards
from lookonce.models.qwen2_vl.architecture import SIZES, Architecture, Layout, tensor_shapes
from lookonce.models.qwen2_vl.synthetic_tokenizer import write_tokenizer
from lookonce.models.registry import Half, family_of

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PIECE = 1 << 22  # values drawn at once
_BIAS_SPREAD = 0.05
_NORM_SPREAD = 0.05
_LOGIT_SPREAD = 2.0
_STACKS = ("experts.gate_up_proj", "experts.down_proj")  # [experts, in, out]
_RESIDUAL = (
    "attn.proj.weight",
    "mlp.fc2.weight",
    "mlp.linear_fc2.weight",
    "o_proj.weight",
    "down_proj.weight",
    "experts.down_proj",
)
_QK_NORMS = ("q_norm.weight", "k_norm.weight")
_GAINS = (
    ("q_proj.weight", 1.7),
    ("k_proj.weight", 1.7),
    ("o_proj.weight", 12.0),
    ("down_proj.weight", 4.0),
    ("experts.down_proj", 4.0),
    ("attn.proj.weight", 2.0),
    ("mlp.fc2.weight", 2.0),
    ("mlp.linear_fc2.weight", 2.0),
)


def make_random_checkpoint(
    path: str | Path,
    *,
    sizes: Mapping[str, Architecture] = SIZES,
    size: str = "tiny",
    layout: Layout = "published",
    tied: bool = True,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    min_pixels: int = 56 * 56,
    max_pixels: int = 12845056,
    **dimensions: Any,
) -> Path:
    """Write a checkpoint directory (created if needed) and return its path.

    `size` names one of `sizes`, all of one family; `dimensions` override its fields (`layers=3, heads=7, hidden=112`).
    Memory stays within one piece of one tensor at any size. Raises CheckpointError for sizes and dimensions that don't
    exist or don't fit, and for a directory that already holds a checkpoint.
    """
    arch = _architecture(sizes, size, dimensions)
    if layout not in ("published", "nested"):
        raise CheckpointError(f"layout must be published or nested, got {layout!r}")
    if dtype not in _CODES:
        raise CheckpointError(f"dtype must be one of {', '.join(_CODES)}, got {dtype!r}")
    path = Path(path)
    if (path / files.CONFIG).exists():
        raise CheckpointError(f"{path} already holds a checkpoint; choose an empty directory")
    path.mkdir(parents=True, exist_ok=True)
    in_config = layout == "published"
    tokens = write_tokenizer(path, arch.vocab, template_in_config=in_config, default_system=arch.default_system)
    config = arch.config(tokens, layout=layout, tied=tied, dtype=dtype)
    shapes = tensor_shapes(arch, layout=layout, tied=tied)
    tensors = [TensorSpec(name, _CODES[dtype], shape) for name, shape in shapes.items()]
    places = files.located(family_of(config), shapes)
    plan = plan_by_count(tensors, shards)
    list(write_shards(path, plan, lambda tensor: _values(arch, *places[tensor.name], tensor, seed)))
    _write_settings(path, arch, tokens, min_pixels, max_pixels)
    write_json(path / files.CONFIG, config)
    return path


def _architecture(sizes: Mapping[str, Architecture], size: str, dimensions: dict[str, Any]) -> Architecture:
    if size not in sizes:
        raise CheckpointError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    known = [field.name for field in fields(sizes[size])]
    unknown = dimensions.keys() - set(known)
    if unknown:
        raise CheckpointError(f"unknown dimension {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return replace(sizes[size], **dimensions)


def _write_settings(path: Path, arch: Architecture, tokens: dict[str, int], min_pixels: int, max_pixels: int) -> None:
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": arch.pixel_mean,
        "image_std": arch.pixel_std,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": arch.patch,
        "temporal_patch_size": arch.temporal_patch,
        "merge_size": arch.merge,
        "processor_class": arch.processor_class,
    }
    write_json(path / files.PREPROCESSOR, preprocessor)
    end, stop = tokens["<|endoftext|>"], tokens["<|im_end|>"]
    generation = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [stop, end], "do_sample": False}
    write_json(path / "generation_config.json", generation)


def _values(arch: Architecture, half: Half, name: str, tensor: TensorSpec, seed: int) -> Iterator[bytes]:
    """Little-endian bytes of one tensor, drawn piece by piece."""
    digest = blake3(f"{seed}/{half}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    mean, spread = _scale(arch, half, name, tensor.shape)
    left = math.prod(tensor.shape)
    while left:
        count = min(left, _PIECE)
        values = generator.standard_normal(count, dtype=np.float32)
        values *= np.float32(spread)
        values += np.float32(mean)
        yield _encode(values, tensor.dtype)
        left -= count


def _scale(arch: Architecture, half: Half, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    Matrices have gain/sqrt(fan-in), residual branches shared out over the depth, norms lie around 1. The language
    model's branches outweigh its embedding (or a tied head would repeat the last token for ever), and its attention
    branch most, with scores of standard deviation about 3, so that what is said depends on the image.
    """
    if name.endswith(".bias"):
        return 0.0, _BIAS_SPREAD
    if len(shape) == 1:
        return 1.7 if name.endswith(_QK_NORMS) else 1.0, _NORM_SPREAD
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.0, _LOGIT_SPREAD / math.sqrt(arch.hidden)
    depth = arch.vision_depth if half is Half.VISION else arch.layers
    gain = next((gain for ending, gain in _GAINS if name.endswith(ending)), 1.0)
    if name.endswith(_RESIDUAL):
        gain /= math.sqrt(depth)
    inputs = shape[1] if name.endswith(_STACKS) else math.prod(shape[1:])
    return 0.0, gain / math.sqrt(inputs)


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4", copy=False).tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    # bfloat16 is float32's upper half, rounded to nearest even.
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def main(arguments: list[str] | None = None, sizes: Mapping[str, Architecture] = SIZES) -> None:
    """Write a random checkpoint from the command line."""
    model_type = next(iter(sizes.values())).model_type
    parser = argparse.ArgumentParser(
        prog=f"lookonce.models.{model_type}.synthetic", description="Write a random-weight checkpoint."
    )
    parser.add_argument("out", help="directory to write")
    parser.add_argument("--size", choices=sorted(sizes), default="tiny")
    parser.add_argument("--layout", choices=("published", "nested"), default="published")
    parser.add_argument("--untied", action="store_true", help="give the output head a weight of its own")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(_CODES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        path = make_random_checkpoint(options.pop("out"), tied=not options.pop("untied"), sizes=sizes, **options)
    except CheckpointError as error:
        parser.exit(2, f"{error.message}\n")
    print(path)


if __name__ == "__main__":
    main()
