"""Qwen3-VL's architecture: the published sizes and small ones for tests. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from lookonce.core.errors import CheckpointError
from lookonce.models.qwen2_vl.architecture import Architecture, Layout, Shapes, affine, model_config

_QWEN2 = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")


@dataclass(frozen=True)
class Qwen3VLArchitecture(Architecture):
    """Dimensions of one Qwen3-VL."""

    model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen3VLProcessor"
    activation = "gelu_pytorch_tanh"
    mlp_matrices = 2
    tower_fields: ClassVar[dict[str, str]] = {
        "vision_depth": "depth",
        "vision_width": "hidden_size",
        "vision_heads": "num_heads",
        "vision_ffn": "intermediate_size",
        "places": "num_position_embeddings",
        "patch": "patch_size",
        "temporal_patch": "temporal_patch_size",
        "merge": "spatial_merge_size",
    }
    prefixes: ClassVar[dict[Layout, tuple[str, str]]] = dict.fromkeys(
        ("published", "nested"), ("model.visual.", "model.language_model.")
    )
    pixel_mean: ClassVar[list[float]] = [0.5, 0.5, 0.5]
    pixel_std: ClassVar[list[float]] = [0.5, 0.5, 0.5]
    default_system = False

    patch: int = 16
    vision_ffn: int = 4304
    places: int = 2304  # of the learned positions, a square
    deepstack_blocks: tuple[int, ...] = (8, 16, 24)  # of the tower, behind which rows are taken
    head_dim: int = 128

    def __post_init__(self) -> None:
        """Refuse dimensions that transformers' modules can't take."""
        if self.heads % self.kv_heads:
            raise CheckpointError(f"heads {self.heads} / kv_heads {self.kv_heads} don't divide")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} must be even for rotary positions")
        if self.vision_width % self.vision_heads or self.vision_width // self.vision_heads % 4:
            raise CheckpointError(f"vision head width {self.vision_width}/{self.vision_heads} must be a multiple of 4")

    @property
    def mrope_section(self) -> list[int]:
        """[24, 20, 20] in every published model."""
        half = self.head_dim // 2
        side = 5 * half // 16
        return [half - 2 * side, side, side]

    def attention_pairs(self, count: int) -> float:
        return self.vision_depth * count**2

    def norm(self, name: str) -> Shapes:
        yield from affine(name, self.vision_width)

    def mlp(self, name: str) -> Shapes:
        yield from affine(name + ".linear_fc1", self.vision_ffn, self.vision_width)
        yield from affine(name + ".linear_fc2", self.vision_width, self.vision_ffn)

    def encode_flops(self, tokens: int) -> float:
        """With a merger for each level of the deepstack."""
        merged = self.vision_width * self.merge**2
        further = 2 * tokens * merged * (merged + self.hidden) * len(self.deepstack_blocks)
        return super().encode_flops(tokens) + further

    def tower(self) -> Shapes:
        width = self.vision_width
        yield from affine("patch_embed.proj", width, 3, self.temporal_patch, self.patch, self.patch)
        yield "pos_embed.weight", (self.places, width)
        for layer in range(self.vision_depth):
            block = f"blocks.{layer}."
            yield from self.norm(block + "norm1")
            yield from self.norm(block + "norm2")
            yield from affine(block + "attn.qkv", 3 * width, width)
            yield from affine(block + "attn.proj", width, width)
            yield from self.mlp(block + "mlp")
        yield from self._merger("merger.", width)
        for level in range(len(self.deepstack_blocks)):
            yield from self._merger(f"deepstack_merger_list.{level}.", width * self.merge**2)

    def _merger(self, name: str, normed: int) -> Shapes:
        merged = self.vision_width * self.merge**2
        yield from affine(name + "norm", normed)
        yield from affine(name + "linear_fc1", merged, merged)
        yield from affine(name + "linear_fc2", self.hidden, merged)

    @property
    def token_ffn(self) -> int:
        """Width of what a layer's MLP has of a token: of its experts together."""
        return self.ffn

    @property
    def idle_parameters(self) -> int:
        """Of the experts that a token is not sent to, in all layers."""
        return 0

    def text_mlp(self, name: str) -> Shapes:
        """A layer's MLP."""
        yield f"{name}.gate_proj.weight", (self.ffn, self.hidden)
        yield f"{name}.up_proj.weight", (self.ffn, self.hidden)
        yield f"{name}.down_proj.weight", (self.hidden, self.ffn)

    def text(self) -> Shapes:
        hidden, queries, keys = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "embed_tokens.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            block = f"layers.{layer}."
            yield block + "input_layernorm.weight", (hidden,)
            yield block + "self_attn.q_proj.weight", (queries, hidden)
            yield block + "self_attn.k_proj.weight", (keys, hidden)
            yield block + "self_attn.v_proj.weight", (keys, hidden)
            yield block + "self_attn.o_proj.weight", (hidden, queries)
            yield block + "self_attn.q_norm.weight", (self.head_dim,)
            yield block + "self_attn.k_norm.weight", (self.head_dim,)
            yield block + "post_attention_layernorm.weight", (hidden,)
            yield from self.text_mlp(block + "mlp")
        yield "norm.weight", (hidden,)

    def config(self, tokens: dict[str, int], *, layout: Layout, tied: bool, dtype: str) -> dict[str, Any]:
        """Nested in any case; only where rotary settings stand differs."""
        config = model_config(self, tokens, layout="nested", tied=tied, dtype=dtype)
        text = {name: value for name, value in config["text_config"].items() if name not in _QWEN2}
        rope = {"rope_type": "default", "mrope_section": self.mrope_section, "mrope_interleaved": True}
        text |= {"head_dim": self.head_dim, "attention_bias": False, "max_position_embeddings": 262144}
        text |= {"rope_parameters": rope | {"rope_theta": 5000000.0}}
        if layout == "published":
            del text["rope_parameters"]
            text |= {"rope_scaling": rope, "rope_theta": 5000000}
        return config | {"text_config": text}

    def vision_config(self) -> dict[str, Any]:
        return {
            "deepstack_visual_indexes": list(self.deepstack_blocks),
            "depth": self.vision_depth,
            "hidden_act": self.activation,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_ffn,
            "num_heads": self.vision_heads,
            "num_position_embeddings": self.places,
            "out_hidden_size": self.hidden,
            "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": self.temporal_patch,
        }


@dataclass(frozen=True)
class Qwen3VLMoeArchitecture(Qwen3VLArchitecture):
    """Dimensions of one with a mixture of experts in every layer of the language model."""

    model_type = "qwen3_vl_moe"
    model_class = "Qwen3VLMoeForConditionalGeneration"

    experts: int = 128
    chosen: int = 8  # experts of a token
    expert_ffn: int = 768

    def text_mlp(self, name: str) -> Shapes:
        """Stacks [experts, in, out], as published; transformers 5 writes [experts, out, in]."""
        yield f"{name}.gate.weight", (self.experts, self.hidden)
        yield f"{name}.experts.gate_up_proj", (self.experts, self.hidden, 2 * self.expert_ffn)
        yield f"{name}.experts.down_proj", (self.experts, self.expert_ffn, self.hidden)

    @property
    def token_ffn(self) -> int:
        return self.chosen * self.expert_ffn

    @property
    def idle_parameters(self) -> int:
        return 3 * self.layers * (self.experts - self.chosen) * self.hidden * self.expert_ffn

    def config(self, tokens: dict[str, int], *, layout: Layout, tied: bool, dtype: str) -> dict[str, Any]:
        config = super().config(tokens, layout=layout, tied=tied, dtype=dtype)
        routing = {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.expert_ffn,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
        }
        return config | {"text_config": config["text_config"] | routing}


def _small(depth: int, width: int, vision_heads: int, vision_ffn: int, blocks: tuple[int, ...]) -> Qwen3VLArchitecture:
    """A tower, before the smallest language model; heads of 32."""
    return Qwen3VLArchitecture(
        depth,
        width,
        vision_heads,
        layers=4,
        hidden=64,
        heads=4,
        kv_heads=2,
        ffn=128,
        vocab=512,
        vision_ffn=vision_ffn,
        places=144,
        deepstack_blocks=blocks,
        head_dim=32,
    )


def _published(layers: int, hidden: int, heads: int, ffn: int) -> Qwen3VLArchitecture:
    """With the tower of 8B and 32B."""
    return Qwen3VLArchitecture(27, 1152, 16, layers, hidden, heads, 8, ffn, vocab=151936)


def _small_tower(arch: Qwen3VLArchitecture) -> Qwen3VLArchitecture:
    """With that of 2B and 4B."""
    return replace(arch, vision_depth=24, vision_width=1024, vision_ffn=4096, deepstack_blocks=(5, 11, 17))


SIZES: dict[str, Qwen3VLArchitecture] = {
    "tiny": _small(4, 64, 2, 96, (0, 1, 2)),
    "small": replace(
        _small(6, 128, 4, 320, (1, 2, 4)), layers=6, hidden=128, heads=4, ffn=384, vocab=2048, head_dim=64
    ),
    "50m": replace(
        _small(8, 384, 6, 1536, (2, 4, 6)), layers=8, hidden=512, heads=8, ffn=2048, vocab=8192, head_dim=64
    ),
    "2b": _small_tower(_published(28, 2048, 16, 6144)),
    "4b": _small_tower(_published(36, 2560, 32, 9728)),
    "8b": _published(36, 4096, 32, 12288),
    "32b": _published(64, 5120, 64, 25600),
}


def _routed(
    arch: Qwen3VLArchitecture, *, experts: int, chosen: int, expert_ffn: int, kv_heads: int
) -> Qwen3VLMoeArchitecture:
    """The same with experts in the place of its MLPs."""
    same = {field.name: getattr(arch, field.name) for field in fields(arch)} | {"kv_heads": kv_heads}
    return Qwen3VLMoeArchitecture(**same, experts=experts, chosen=chosen, expert_ffn=expert_ffn)


MOE_SIZES: dict[str, Qwen3VLMoeArchitecture] = {
    "moe-tiny": _routed(SIZES["tiny"], experts=8, chosen=2, expert_ffn=48, kv_heads=2),
    "moe-50m": _routed(SIZES["50m"], experts=16, chosen=4, expert_ffn=256, kv_heads=2),
    "30b-a3b": _routed(_published(48, 2048, 32, 6144), experts=128, chosen=8, expert_ffn=768, kv_heads=4),
    "235b-a22b": _routed(_published(94, 4096, 64, 12288), experts=128, chosen=8, expert_ffn=1536, kv_heads=4),
}
