"""Checkpoints of Gemma 3 and PaliGemma: random weights of true architecture, files as published, windows that are short
enough for a prompt to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.families.tiny_checkpoints import HALF, TEXT, WORDS, Tiny, begun, merges_of, siglip, with_special, write

WINDOW = 24
_LETTERS = set("▁:,.!'\nABCDEIWHë") | {letter for word in (*WORDS, "model", "user") for letter in word}


def tokenizer(special: tuple[str, ...]) -> Tokenizer:
    """Gemma's kind: spaces are ▁, none stands before a text, several newlines are one added token that is not special,
    unknown characters are bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {letter: len(vocabulary) + at for at, letter in enumerate(sorted(_LETTERS))}
    merges = merges_of(vocabulary, [*WORDS, "model", *("▁" + word for word in WORDS)])
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    with_special(made, special)
    made.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(1, 6)])
    return begun(made)


def _siglip_images(path: Path, processor: str, kind: str, side: int) -> None:
    image = {"image_processor_type": kind, "processor_class": processor, "resample": 2, **HALF}
    image |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}
    write(path / "preprocessor_config.json", image | {"size": {"height": side, "width": side}} | _further(processor))


def _further(processor: str) -> dict[str, Any]:
    if processor == "PaliGemmaProcessor":
        return {"do_convert_rgb": None, "image_seq_length": 16}
    names = ("pan_and_scan_max_num_crops", "pan_and_scan_min_crop_size", "pan_and_scan_min_ratio_to_activate")
    return {"do_convert_rgb": None, "do_pan_and_scan": None, "image_seq_length": 16} | dict.fromkeys(names)


def _gemma3(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """google/gemma-3-4b-it: SigLIP, pooled, and Gemma 3, most of whose layers see a window."""
    _siglip_images(path, "Gemma3Processor", "Gemma3ImageProcessor", 112)
    write(path / "processor_config.json", {"image_seq_length": 16, "processor_class": "Gemma3Processor"})
    text = {"model_type": "gemma3_text", **TEXT, "num_hidden_layers": 4, "head_dim": 32, "query_pre_attn_scalar": 24}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": WINDOW}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
        "mm_tokens_per_image": 16,
        "model_type": "gemma3",
        "text_config": text | {"sliding_window_pattern": 3},
        "vision_config": siglip() | {"image_size": 112},
    }


GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = "
    "messages[0]['content'][0]['text'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}{%- else -%}"
    "{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
_GEMMA3 = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
_GEMMA3_NAMES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_LOCATIONS = (
    "<image>",
    *(f"<loc{number:04d}>" for number in range(1024)),
    *(f"<seg{number:03d}>" for number in range(128)),
)


def _paligemma(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """google/paligemma-3b-mix-224: SigLIP and Gemma."""
    _siglip_images(path, "PaliGemmaProcessor", "SiglipImageProcessor", 56)
    text = {"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "image_token_index": ids["<image>"],
        "model_type": "paligemma",
        "projection_dim": 64,
        "hidden_size": 64,
        "text_config": text | {"num_image_tokens": 16},
        "vision_config": siglip() | {"projection_dim": 64},
    }


def _paligemma2(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """google/paligemma2-3b-mix-224: SigLIP and Gemma 2, whose scores and logits are capped."""
    text = {"model_type": "gemma2", **TEXT, "num_hidden_layers": 4, "head_dim": 32, "query_pre_attn_scalar": 24}
    text |= {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return _paligemma(path, ids) | {"text_config": text | {"num_image_tokens": 16}}


GEMMAS = {
    "gemma3": Tiny(_GEMMA3, _gemma3, GEMMA3, settings=_GEMMA3_NAMES, tokenizer=tokenizer),
    "paligemma": Tiny(_LOCATIONS, _paligemma, "", tokenizer=tokenizer),
    "paligemma2": Tiny(_LOCATIONS, _paligemma2, "", tokenizer=tokenizer),
}
