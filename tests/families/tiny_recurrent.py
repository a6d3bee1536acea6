"""Checkpoints of families with recurrent layers: random weights of true architecture, files as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.tiny_checkpoints import HALF, TEXT, Tiny, write

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


FAMILIES = {"qwen3_5": Tiny(_VISION, _qwen3_5, QWEN)}
