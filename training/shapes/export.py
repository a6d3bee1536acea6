"""Writes a trained state as a published Qwen2-VL checkpoint folder: weights, config, tokenizer, template,
preprocessing."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .model import Qwen2VL, Shape2VL, layers_of
from .pixels import MEAN, STD
from .scenes import MAX_PIXELS, MIN_PIXELS
from .tokenizer import DEFAULT_SYSTEM, SPECIAL, TEMPLATE

CONTEXT = 4096


def hf_config(sizes: Shape2VL, ids: dict[str, int], dtype: str) -> dict:
    """config.json in the flat layout that Qwen2-VL checkpoints are published in."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rope_theta,
        "sliding_window": CONTEXT,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": sizes.vision_depth,
            "embed_dim": sizes.vision_dim,
            "hidden_size": sizes.hidden,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": sizes.vision_heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(sizes.mrope)},
        "vocab_size": sizes.vocab,
    }


def preprocessor_config() -> dict:
    return {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [round(float(value), 8) for value in MEAN],
        "image_std": [round(float(value), 8) for value in STD],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def tokenizer_config(ids: dict[str, int]) -> dict:
    added = {
        str(ids[token]): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special":
            True,
        }
        for token in SPECIAL
    }  # fmt: skip
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def export(state: Path, tokenizer: Path, out: Path, dtype: str = "float32") -> None:
    """Write every file of the checkpoint but its README.md into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(state)
    sizes = Shape2VL(layers=layers_of(tensors))
    words = Tokenizer.from_file(str(tokenizer))
    ids = {token: words.token_to_id(token) for token in SPECIAL}
    if words.get_vocab_size() > sizes.vocab:
        raise ValueError(f"tokenizer has {words.get_vocab_size()} entries, the embedding table {sizes.vocab} rows")
    model = Qwen2VL(sizes)
    model.load_state_dict(tensors)
    tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    files = {
        "config.json": hf_config(sizes, ids, dtype),
        "preprocessor_config.json": preprocessor_config(),
        "tokenizer_config.json": tokenizer_config(ids),
        "chat_template.json": {"chat_template": TEMPLATE},
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "max_new_tokens": 64,
            "pad_token_id": ids["<|endoftext|>"],
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    words.save(str(out / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=f"{__doc__} Default system prompt: {DEFAULT_SYSTEM}")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args()
    export(args.state, args.tokenizer, args.out, args.dtype)


if __name__ == "__main__":
    main()
