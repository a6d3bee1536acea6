"""Qwen2-VL's architecture as names, shapes and config.json: the published sizes and small ones for tests. No torch.

`Architecture` is what it has in common with its successors: a tower that merges patches, before a Qwen2 language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from lookonce.core.errors import CheckpointError
from lookonce.models.qwen2_vl.limits import MOST_LAYERS

Layout = Literal["published", "nested"]


Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names of tensors with their shapes."""


@dataclass(frozen=True)
class Architecture(ABC):
    """Dimensions of one model."""

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str]
    activation: ClassVar[str]  # of the tower's MLP
    mlp_matrices: ClassVar[int]  # of the tower's MLP
    tower_fields: ClassVar[dict[str, str]]  # dimensions of the tower, and what vision_config calls them
    prefixes: ClassVar[dict[Layout, tuple[str, str]]] = {
        "published": ("visual.", "model."),
        "nested": ("model.visual.", "model.language_model."),
    }
    """How names of tensors begin: the tower's, and the language model's."""
    pixel_mean: ClassVar[list[float]] = [0.48145466, 0.4578275, 0.40821073]
    pixel_std: ClassVar[list[float]] = [0.26862954, 0.26130258, 0.27577711]
    default_system: ClassVar[bool] = True
    """Whether the chat template begins with a system message of its own where there is none."""

    vision_depth: int
    vision_width: int
    vision_heads: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2

    def __post_init__(self) -> None:
        """Refuse dimensions that transformers' modules can't take."""
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise CheckpointError(f"hidden {self.hidden} / heads {self.heads} / kv_heads {self.kv_heads} don't divide")
        if self.hidden // self.heads % 2:
            raise CheckpointError(f"head width {self.hidden // self.heads} must be even for rotary positions")
        if self.vision_width % self.vision_heads or self.vision_width // self.vision_heads % 4:
            raise CheckpointError(f"vision head width {self.vision_width}/{self.vision_heads} must be a multiple of 4")

    @property
    def head_dim(self) -> int:
        """Width of a head of the language model."""
        return self.hidden // self.heads

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies given to time, height and width; [16, 24, 24] in every published model."""
        half = self.hidden // self.heads // 2
        side = 3 * half // 8
        return [half - 2 * side, side, side]

    @property
    @abstractmethod
    def vision_ffn(self) -> int:
        """Width of the tower's MLP."""

    @abstractmethod
    def attention_pairs(self, count: int) -> float:
        """Patches that see patches, in all blocks, of one image of `count` patches."""

    @abstractmethod
    def norm(self, name: str) -> Shapes:
        """A norm of the tower."""

    @abstractmethod
    def mlp(self, name: str) -> Shapes:
        """An MLP of the tower."""

    def tower(self) -> Shapes:
        """The vision half."""
        return _vision(self)

    def text(self) -> Shapes:
        """The language half, but for a head of its own."""
        return _language(self)

    def config(self, tokens: dict[str, int], *, layout: Layout, tied: bool, dtype: str) -> dict[str, Any]:
        """config.json."""
        return model_config(self, tokens, layout=layout, tied=tied, dtype=dtype)

    @abstractmethod
    def vision_config(self) -> dict[str, Any]:
        """config.json's, but for what depends on its layout."""

    def encode_flops(self, tokens: int) -> float:
        """Work of the vision tower on one image of so many tokens."""
        width, count = self.vision_width, tokens * self.merge**2
        patch = 3 * self.temporal_patch * self.patch**2
        merged = width * self.merge**2
        block = 2 * count * (4 * width + self.mlp_matrices * self.vision_ffn) * width
        attention = 4 * self.attention_pairs(count) * width
        ends = 2 * count * patch * width + 2 * tokens * merged * (merged + self.hidden)
        return ends + self.vision_depth * block + attention


@dataclass(frozen=True)
class Qwen2VLArchitecture(Architecture):
    """Dimensions of one Qwen2-VL."""

    model_type = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    processor_class = "Qwen2VLProcessor"
    activation = "quick_gelu"
    tower_fields: ClassVar[dict[str, str]] = {
        "vision_depth": "depth",
        "vision_width": "embed_dim",
        "vision_heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
        "patch": "patch_size",
        "temporal_patch": "temporal_patch_size",
        "merge": "spatial_merge_size",
    }
    mlp_matrices = 2

    mlp_ratio: int = 4

    @property
    def vision_ffn(self) -> int:
        return self.vision_width * self.mlp_ratio

    def attention_pairs(self, count: int) -> float:
        return self.vision_depth * count**2

    def norm(self, name: str) -> Shapes:
        yield from affine(name, self.vision_width)

    def mlp(self, name: str) -> Shapes:
        yield from affine(name + ".fc1", self.vision_ffn, self.vision_width)
        yield from affine(name + ".fc2", self.vision_width, self.vision_ffn)

    def vision_config(self) -> dict[str, Any]:
        return {
            "depth": self.vision_depth,
            "embed_dim": self.vision_width,
            "hidden_size": self.hidden,
            "mlp_ratio": self.mlp_ratio,
            "num_heads": self.vision_heads,
            "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": self.temporal_patch,
        }


Kind = TypeVar("Kind", bound=Architecture)
SIZES: dict[str, Qwen2VLArchitecture] = {
    "tiny": Qwen2VLArchitecture(2, 64, 2, layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=512),
    "small": Qwen2VLArchitecture(4, 128, 4, layers=4, hidden=128, heads=4, kv_heads=2, ffn=384, vocab=2048),
    "50m": Qwen2VLArchitecture(8, 384, 6, layers=8, hidden=512, heads=8, kv_heads=2, ffn=2048, vocab=8192),
    "2b": Qwen2VLArchitecture(32, 1280, 16, layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, vocab=151936),
    "7b": Qwen2VLArchitecture(32, 1280, 16, layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064),
    "72b": Qwen2VLArchitecture(32, 1280, 16, layers=80, hidden=8192, heads=64, kv_heads=8, ffn=29568, vocab=152064),
}


def architecture_of(kind: type[Kind], vision: dict[str, Any], text: dict[str, Any], hidden: int, **others: Any) -> Kind:
    """The dimensions that the two parts of a config.json state, and `others`, which are not looked at. Raises
    CheckpointError naming what they lack."""
    sizes = {
        **{name: vision[field] for name, field in kind.tower_fields.items()},
        "layers": text.get("num_hidden_layers"),
        "hidden": hidden,
        "heads": text.get("num_attention_heads"),
        "kv_heads": text.get("num_key_value_heads") or text.get("num_attention_heads"),
        "ffn": text.get("intermediate_size"),
        "vocab": text.get("vocab_size"),
    }
    wrong = [name for name, value in sizes.items() if not isinstance(value, int) or value <= 0]
    wrong += [name for name in ("vision_depth", "layers") if name not in wrong and sizes[name] > MOST_LAYERS]
    if wrong:
        stated = ", ".join(f"{name} {sizes[name]!r}" for name in wrong)
        raise CheckpointError(f"config.json: no dimensions of a model: {stated}; take it from the model's repository")
    return kind(**sizes, **others)


def tensor_shapes(arch: Architecture, *, layout: Layout = "published", tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, vision first, as the published files have them."""
    visual, model = arch.prefixes[layout]
    shapes = {visual + name: shape for name, shape in arch.tower()}
    shapes |= {model + name: shape for name, shape in arch.text()}
    return shapes if tied else shapes | {"lm_head.weight": (arch.vocab, arch.hidden)}


def model_config(
    arch: Architecture, tokens: dict[str, int], *, layout: Layout, tied: bool, dtype: str
) -> dict[str, Any]:
    """config.json: flat as published, or with text_config nested as newer saves write it."""
    end, stop = tokens["<|endoftext|>"], tokens["<|im_end|>"]
    text: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": stop,
        "hidden_act": "silu",
        "hidden_size": arch.hidden,
        "initializer_range": 0.02,
        "intermediate_size": arch.ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_hidden_layers": arch.layers,
        "num_key_value_heads": arch.kv_heads,
        "rms_norm_eps": 1e-06,
        "sliding_window": 32768,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": arch.vocab,
    }
    vision = arch.vision_config()
    outer: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    rope: dict[str, Any] = {"mrope_section": arch.mrope_section}
    if layout == "published":
        extra = {"model_type": arch.model_type, "in_chans": 3, "spatial_patch_size": arch.patch}
        flat = {"rope_scaling": {"type": "mrope", **rope}, "rope_theta": 1000000.0, "torch_dtype": dtype}
        return outer | text | flat | {"vision_config": vision | extra}
    text |= {"model_type": f"{arch.model_type}_text", "dtype": dtype, "layer_types": ["full_attention"] * arch.layers}
    text["sliding_window"] = None
    text["rope_parameters"] = {"rope_type": "default", "type": "default", "rope_theta": 1000000.0, **rope}
    vision |= {"model_type": f"{arch.model_type}_vision", "in_channels": 3, "dtype": dtype}
    vision |= {"hidden_act": arch.activation}
    return outer | {"dtype": dtype, "text_config": text, "vision_config": vision}


def _vision(arch: Architecture) -> Shapes:
    width, merged = arch.vision_width, arch.vision_width * arch.merge**2
    yield "patch_embed.proj.weight", (width, 3, arch.temporal_patch, arch.patch, arch.patch)
    for layer in range(arch.vision_depth):
        block = f"blocks.{layer}."
        yield from arch.norm(block + "norm1")
        yield from arch.norm(block + "norm2")
        yield from affine(block + "attn.qkv", 3 * width, width)
        yield from affine(block + "attn.proj", width, width)
        yield from arch.mlp(block + "mlp")
    yield from arch.norm("merger.ln_q")
    yield from affine("merger.mlp.0", merged, merged)
    yield from affine("merger.mlp.2", arch.hidden, merged)


def _language(arch: Architecture) -> Shapes:
    hidden, keys = arch.hidden, arch.hidden // arch.heads * arch.kv_heads
    yield "embed_tokens.weight", (arch.vocab, hidden)
    for layer in range(arch.layers):
        block = f"layers.{layer}."
        yield block + "input_layernorm.weight", (hidden,)
        yield from affine(block + "self_attn.q_proj", hidden, hidden)
        yield from affine(block + "self_attn.k_proj", keys, hidden)
        yield from affine(block + "self_attn.v_proj", keys, hidden)
        yield block + "self_attn.o_proj.weight", (hidden, hidden)
        yield block + "post_attention_layernorm.weight", (hidden,)
        yield block + "mlp.gate_proj.weight", (arch.ffn, hidden)
        yield block + "mlp.up_proj.weight", (arch.ffn, hidden)
        yield block + "mlp.down_proj.weight", (hidden, arch.ffn)
    yield "norm.weight", (hidden,)


def affine(name: str, *shape: int) -> Shapes:
    """A weight, and a bias for each of its rows."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
