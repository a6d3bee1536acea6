"""Checkpoints of families with recurrent layers: random weights of true architecture, files as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.families.tiny_checkpoints import HALF, TEXT, Tiny, make_tiny, write

_VISION = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen3_5(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Qwen/Qwen3.5-9B: three gated delta nets to one gated attention, interleaved M-RoPE on a quarter of each head, a
    tower without deepstack."""
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", **HALF}
    image |= {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    write(path / "preprocessor_config.json", image | {"size": {"shortest_edge": 4096, "longest_edge": 50176}})
    rope = {"rope_type": "default", "rope_theta": 10000000, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    heads |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "head_dim": 32, "attn_output_gate": True}
    text = TEXT | heads | {"num_hidden_layers": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6}
    text |= {"layer_types": [*["linear_attention"] * 3, "full_attention"], "mamba_ssm_dtype": "float32"}
    text |= {"rope_parameters": rope | {"partial_rotary_factor": 0.25}}
    vision = {"model_type": "qwen3_5", "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"out_hidden_size": 64, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"num_position_embeddings": 16, "in_channels": 3, "deepstack_visual_indexes": []}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {"model_type": "qwen3_5_text", **text},
        "tie_word_embeddings": False,
        "vision_config": vision,
    }


def _qwen3_5_moe(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Qwen/Qwen3.5-35B-A3B: the same layers with experts, and one that all tokens share."""
    config = _qwen3_5(path, ids)
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = config["text_config"] | experts | {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 32}
    del text["intermediate_size"]
    vision = config["vision_config"] | {"model_type": "qwen3_5_moe"}
    config |= {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    return config | {"text_config": text, "vision_config": vision}


def _lfm3(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """LiquidAI/LFM3-VL-2B: short convolutions between attention with a window and without, a tower that convolves."""
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Lfm3VlProcessor", **HALF}
    image |= {"patch_size": 16, "temporal_patch_size": 1, "merge_size": 2}
    write(path / "preprocessor_config.json", image | {"size": {"shortest_edge": 4096, "longest_edge": 50176}})
    text = {name: value for name, value in TEXT.items() if name != "rms_norm_eps"}
    text |= {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 24, "conv_L_cache": 7, "norm_eps": 1e-5}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 16}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "out_hidden_size": 64, "temporal_patch_size": 1}
    return {
        "architectures": ["Lfm3VlForConditionalGeneration"],
        "model_type": "lfm3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "projector_hidden_size": 64,
        "text_config": {"model_type": "lfm3", **text},
        "tie_word_embeddings": True,
        "vision_config": {"model_type": "lfm3_vl_vision", **vision},
    }


FAMILIES = {
    "qwen3_5": Tiny(_VISION, _qwen3_5, QWEN),
    "qwen3_5_moe": Tiny(_VISION, _qwen3_5_moe, QWEN),
    "lfm3_vl": Tiny(_VISION, _lfm3, QWEN),
}


def make(family: str, path: Path) -> Path:
    """A checkpoint directory as published: experts in one tensor a layer, and a layer that predicts further tokens,
    which nobody asks."""
    make_tiny(FAMILIES[family], path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".experts.0.gate_proj.weight")]:
        stem = name.removesuffix(".0.gate_proj.weight")
        count = sum(each.startswith(stem) for each in tensors) // 3
        gate, up, down = (
            torch.stack([tensors.pop(f"{stem}.{number}.{part}_proj.weight") for number in range(count)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    if family != "lfm3_vl":
        tensors |= {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(2)}
    save_file(tensors, file, {"format": "pt"})
    return path
