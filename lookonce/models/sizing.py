"""What a checkpoint needs, from its config alone: weights of each half, KV, embeddings, work.

Pure arithmetic; docs/operations.md has the formulas. Knows nothing of torch, devices or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lookonce.models.family import BLOCKS, LAYERS, Dimensions, Family, Half

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4
"""Of each output row of an int8 matrix."""
RECORD_BYTES = 512
"""Of an embedding's record beside its rows, at most."""


def default_max_pixels(family: Family, own: int, device: str) -> int:
    """Most pixels of a resized image unless a setting says otherwise: the checkpoint's `own`, fewer where `device` is
    "cpu"."""
    return min(own, family.cpu_max_pixels) if device == "cpu" else own


@dataclass(frozen=True)
class HalfSize:
    """One half's weights, counted."""

    parameters: int
    matrix_parameters: int  # those of the blocks' matrices, which int8 replaces
    matrix_rows: int

    def weight_bytes(self, dtype: str, *, int8: bool = False) -> int:
        """In memory."""
        width = DTYPE_BYTES[dtype]
        if not int8:
            return self.parameters * width
        return (
            (self.parameters - self.matrix_parameters) * width + self.matrix_parameters + SCALE_BYTES * self.matrix_rows
        )


@dataclass(frozen=True)
class ModelSize:
    """A checkpoint's dimensions and what follows from them."""

    dimensions: Dimensions
    halves: dict[Half, HalfSize]
    image_tokens: Callable[[int, int], int]  # of an image of so many pixels, width and height
    encode_flops: Callable[[int], float]  # work of the vision tower on one image of so many tokens
    context: int  # tokens of the longest sequence
    tied: bool  # one table is the embedding and the head
    stored: str  # dtype of the weights as config.json says, bfloat16 (as all published ones are) where it doesn't

    @property
    def table_parameters(self) -> int:
        """Of the embedding, and of a head that is its own."""
        return self.dimensions.vocabulary * self.dimensions.hidden

    def layer_bytes(self, dtype: str, *, int8: bool = False) -> int:
        """Weights of one layer of the language half."""
        tables = self.table_parameters * (1 if self.tied else 2) * DTYPE_BYTES[dtype]
        return (self.halves[Half.LANGUAGE].weight_bytes(dtype, int8=int8) - tables) // self.dimensions.layers

    @property
    def kv_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.dimensions.kv_layers or self.dimensions.layers

    def state_bytes(self, dtype: str) -> int:
        """Recurrent state of one sequence, or of one prefix."""
        return (
            self.dimensions.state_numbers * DTYPE_BYTES[dtype] + self.dimensions.state_floats * DTYPE_BYTES["float32"]
        )

    @property
    def kv_elements(self) -> int:
        """Numbers of one token's keys and values, in all layers."""
        dims = self.dimensions
        return 2 * self.kv_layers * dims.kv_heads * dims.head_dim

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Of so many tokens."""
        return tokens * self.kv_elements * DTYPE_BYTES[dtype]

    def embedding_bytes(self, tokens: int, dtype: str) -> int:
        """Of an image's record in the store."""
        rows = tokens * (1 + self.dimensions.deepstack)
        return rows * self.dimensions.hidden * DTYPE_BYTES[dtype] + RECORD_BYTES

    def patches(self, tokens: int) -> int:
        """Patches of so many image tokens."""
        return tokens * self.dimensions.patches_per_token

    def prefill_flops(self, tokens: int, context: int = 0) -> float:
        """Work of the language model on `tokens` after `context` others whose KV is there."""
        dims = self.dimensions
        matrices = self.halves[Half.LANGUAGE].matrix_parameters - dims.idle_parameters
        attention = 4 * self.kv_layers * dims.heads * dims.head_dim * (tokens * context + tokens * (tokens + 1) / 2)
        return 2 * tokens * matrices + attention + 2 * dims.vocabulary * dims.hidden


@dataclass(frozen=True)
class Economics:
    """Work of asking one image N questions, in floating-point operations; decoding the answers, equal in all, apart."""

    unsplit: float  # encode and prefill everything for each question
    embeddings: float  # encode once
    prefixes: float  # and prefill the image once: what lookonce does

    @classmethod
    def of(cls, size: ModelSize, image_tokens: int, question_tokens: int, questions: int) -> Economics:
        """For one image of so many tokens."""
        encode, prompt = size.encode_flops(image_tokens), size.prefill_flops(image_tokens + question_tokens)
        image, question = size.prefill_flops(image_tokens), size.prefill_flops(question_tokens, image_tokens)
        return cls(
            questions * (encode + prompt),
            encode + questions * prompt,
            encode + image + questions * question,
        )


def question_flops(
    size: ModelSize, image_tokens: int, question_tokens: int, *, prefix_hits: float, embedding_hits: float
) -> float:
    """Expected work of one question: the embedding is looked for only where the prefix is not there."""
    missed = size.prefill_flops(image_tokens) + (1 - embedding_hits) * size.encode_flops(image_tokens)
    return size.prefill_flops(question_tokens, image_tokens) + (1 - prefix_hits) * missed


def size_of(family: Family, config: dict[str, Any], preprocessor: dict[str, Any], *, untied: bool = False) -> ModelSize:
    """Count a checkpoint's weights; `untied`: an adapter makes a head of its own of one that is tied. Raises
    CheckpointError for a config that lacks a dimension."""
    bounds = int(preprocessor["min_pixels"]), int(preprocessor["max_pixels"])
    text, tied = family.text_config(config), family.tied_head(config) and not untied
    return ModelSize(
        family.dimensions(config),
        {half: _count(family.tensor_shapes(config, half, head=not tied)) for half in Half},
        lambda width, height: family.tokens_per_grid(config, family.image_grid(config, width, height, *bounds)),
        partial(family.encode_flops, config),
        int(text.get("max_position_embeddings", 32768)),
        tied,
        _stored_dtype(config, text),
    )


def _stored_dtype(*configs: dict[str, Any]) -> str:
    stated = (config.get(name) for config in configs for name in ("dtype", "torch_dtype"))
    return next((name for name in stated if name in DTYPE_BYTES), "bfloat16")


def _count(shapes: Mapping[str, tuple[int, ...]]) -> HalfSize:
    blocks = [shape for name, shape in shapes.items() if name.startswith((BLOCKS, LAYERS))]
    matrices = [shape for shape in blocks if len(shape) == 2]
    stacks = [shape for shape in blocks if len(shape) == 3]  # of experts: [experts, in, out]
    return HalfSize(
        sum(math.prod(shape) for shape in shapes.values()),
        sum(math.prod(shape) for shape in matrices + stacks),
        sum(shape[0] for shape in matrices) + sum(shape[0] * shape[2] for shape in stacks),
    )
