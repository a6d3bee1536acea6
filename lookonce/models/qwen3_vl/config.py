"""Qwen3-VL (arXiv:2511.21631): where its settings differ from Qwen2-VL's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lookonce.core.errors import CheckpointError
from lookonce.core.record import MAX_TENSORS
from lookonce.models.family import Dimensions, Family, VisionEncoder
from lookonce.models.qwen2_vl import limits
from lookonce.models.qwen2_vl.architecture import architecture_of
from lookonce.models.qwen2_vl.config import Qwen2VL
from lookonce.models.qwen3_vl.architecture import Qwen3VLArchitecture, Qwen3VLMoeArchitecture

if TYPE_CHECKING:
    import torch

    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.plain import Plain
    from lookonce.models.text_adapter import ModelAdapter

_VISION_SIZES = (
    "depth",
    "hidden_size",
    "out_hidden_size",
    "intermediate_size",
    "num_heads",
    "num_position_embeddings",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
)
_TEXT_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000}
_ROUTING = {"experts": "num_experts", "chosen": "num_experts_per_tok", "expert_ffn": "moe_intermediate_size"}
SECTION = (24, 20, 20)
"""Of M-RoPE, unless config.json says otherwise."""


class Qwen3VL(Qwen2VL):
    """The family of Qwen3-VL 2B, 4B, 8B and 32B and their fine-tunes."""

    model_type = "qwen3_vl"
    label = "Qwen3-VL"
    kind: ClassVar[type[Qwen3VLArchitecture]] = Qwen3VLArchitecture
    layouts = "model.visual.*, model.language_model.* and lm_head.*"
    vision_defaults: ClassVar[dict[str, Any]] = {
        "depth": 27,
        "hidden_size": 1152,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    vector_prompt = ("Represent the user's input.", "")
    """Qwen3-VL-Embedding's (arXiv:2601.04720)."""
    row_width = "out_hidden_size"
    cpu_max_pixels = 1280 * 32 * 32
    """1,280 tokens."""

    def architecture(self, config: dict[str, Any]) -> Qwen3VLArchitecture:
        vision, text = self.vision_config(config), self.text_config(config)
        blocks = vision["deepstack_visual_indexes"]
        return architecture_of(
            self.kind,
            vision,
            text,
            self.hidden_size(config),
            deepstack_blocks=() if _deepstack_problems(vision) else tuple(blocks),
            head_dim=text["head_dim"] if limits.is_size(text["head_dim"]) else _TEXT_DEFAULTS["head_dim"],
            **self.routing(text),
        )

    def routing(self, text: dict[str, Any]) -> dict[str, int]:
        """Dimensions of a mixture of experts, where there is one."""
        return {}

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """At hand are the rows of the deepstack, too."""
        found, arch = super().dimensions(config), self.architecture(config)
        deepstack = len(arch.deepstack_blocks)
        rows = (1 + deepstack) * found.hidden // found.patches_per_token
        return replace(
            found,
            ffn=arch.token_ffn,
            patch_numbers=found.patch_numbers + rows,
            deepstack=deepstack,
            idle_parameters=arch.idle_parameters,
        )

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """With transformers' defaults."""
        return _TEXT_DEFAULTS | super().text_config(config)

    def vision_problems(self, vision: dict[str, Any]) -> Iterable[str]:
        return vision_problems(vision)

    def text_problems(self, text: dict[str, Any]) -> Iterable[str]:
        return text_problems(text, self.label)

    def load_encoder(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> VisionEncoder:
        from lookonce.models.qwen3_vl.vision import DeepstackEncoder

        return DeepstackEncoder.load(checkpoint, dtype, device, quantization=quantization, native=native)

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
        from lookonce.models.qwen3_vl.modules import NormedTextModel

        model, head = load_language_model(checkpoint, dtype, where, NormedTextModel)
        deepstack = self.dimensions(checkpoint.config).deepstack
        return Qwen2VLAdapter(
            model, head, quantization=quantization, devices=devices, native=native, deepstack=deepstack
        )

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain:
        from lookonce.models.qwen3_vl.plain import PlainQwen3VL

        return PlainQwen3VL(checkpoint, dtype)


def vision_problems(vision: dict[str, Any]) -> Iterator[str]:
    """Every setting of a filled-in vision config that can't be computed."""
    activation, label = Qwen3VLArchitecture.activation, Qwen3VL.label
    yield from limits.tower_problems(vision, _VISION_SIZES, width="hidden_size", activation=activation, label=label)
    yield from _deepstack_problems(vision)


def _deepstack_problems(vision: dict[str, Any]) -> list[str]:
    blocks, depth = vision["deepstack_visual_indexes"], vision["depth"]
    numbers = isinstance(blocks, list) and all(
        isinstance(block, int) and not isinstance(block, bool) for block in blocks
    )
    if not numbers or len({*blocks}) < len(blocks) or (limits.is_size(depth) and {*blocks} - {*range(depth)}):
        return [
            "config.json: vision_config.deepstack_visual_indexes must be different numbers of blocks, "
            f"below depth {depth!r}, got {blocks!r}; {limits.FROM_REPOSITORY}"
        ]
    if len(blocks) >= MAX_TENSORS:
        return [
            f"config.json: vision_config.deepstack_visual_indexes may be at most {MAX_TENSORS - 1}, got {len(blocks)}; "
            f"{limits.FROM_REPOSITORY}"
        ]
    return []


def text_problems(text: dict[str, Any], label: str) -> Iterator[str]:
    """Every setting of a filled-in text config that can't be computed."""
    yield from limits.text_problems(text, label, head_dim=text["head_dim"] or 0, section=SECTION)
    if text.get("attention_bias"):
        yield f"config.json: attention_bias true is not supported; use a checkpoint of {label}"
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if isinstance(rope, dict) and rope.get("mrope_interleaved", True) is not True:
            yield f"config.json: {name}: mrope_interleaved must be true; {limits.FROM_REPOSITORY}"


class Qwen3VLMoe(Qwen3VL):
    """The family of Qwen3-VL 30B-A3B and 235B-A22B and their fine-tunes: a mixture of experts in every layer."""

    model_type = "qwen3_vl_moe"
    kind = Qwen3VLMoeArchitecture

    def routing(self, text: dict[str, Any]) -> dict[str, int]:
        missing = [name for name in _ROUTING.values() if not limits.is_size(text.get(name))]
        if missing:
            stated = ", ".join(f"{name} {text.get(name)!r}" for name in missing)
            raise CheckpointError(f"config.json: no dimensions of a model: {stated}; {limits.FROM_REPOSITORY}")
        return {name: text[field] for name, field in _ROUTING.items()}

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """transformers 5 writes another name."""
        text = super().text_config(config)
        return {"num_experts": text.get("num_local_experts")} | text

    def text_problems(self, text: dict[str, Any]) -> Iterable[str]:
        return routed_text_problems(text, self.label)

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
        from lookonce.models.qwen3_vl.modules import RoutedTextModel
        from lookonce.models.qwen3_vl.routed import RoutedAdapter

        model, head = load_language_model(checkpoint, dtype, where, RoutedTextModel)
        deepstack = self.dimensions(checkpoint.config).deepstack
        return RoutedAdapter(
            model, head, quantization=quantization, devices=devices, native=native, deepstack=deepstack
        )

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain:
        from lookonce.models.qwen3_vl.plain import PlainQwen3VLMoe

        return PlainQwen3VLMoe(checkpoint, dtype)


def routed_text_problems(text: dict[str, Any], label: str) -> Iterator[str]:
    """Every setting of a language model with experts that can't be computed."""
    yield from text_problems(text, label)
    for name in _ROUTING.values():
        if not limits.is_size(text.get(name)):
            stated = text.get(name)
            yield f"config.json: {name} must be a whole number above 0, got {stated!r}; {limits.FROM_REPOSITORY}"
    experts, chosen = text.get("num_experts"), text.get("num_experts_per_tok")
    if limits.is_size(experts) and limits.is_size(chosen) and chosen > experts:
        yield (
            f"config.json: num_experts_per_tok {chosen} must be at most num_experts {experts}; {limits.FROM_REPOSITORY}"
        )
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        yield (
            "config.json: layers without experts (mlp_only_layers, decoder_sparse_step) are not supported; use a "
            f"checkpoint of {label}, which has them in every layer"
        )


FAMILY: Family = Qwen3VL()
MOE_FAMILY: Family = Qwen3VLMoe()
