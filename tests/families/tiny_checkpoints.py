"""Checkpoints of families that the general path serves: random weights of true architecture, files as published.

Everything is made here: the tokenizers by the tokenizers library, the settings from the fields that the published
config.json, preprocessor_config.json and processor_config.json have, with small numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

WORDS = (
    *("what", "is", "on", "this", "image", "?", "why", "how", "many", "cats", "are", "there", "yes", "no", "a", "cat"),
    *("dog", "red", "User", "Assistant", "answer", "the"),
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class Tiny:
    """How a family's checkpoint is made."""

    tokens: tuple[str, ...]  # special ones, by the family's names
    write: Callable[[Path, dict[str, int]], dict[str, Any]]  # processor files; config.json
    template: str
    sentencepiece: bool = False
    settings: dict[str, Any] | None = None  # of tokenizer_config.json
    begins: bool = False  # whether the tokenizer puts <s> before a text
    tokenizer: Callable[[tuple[str, ...]], Tokenizer] | None = None  # of another kind, by the special tokens


def make(family: str, path: Path, seed: int = 0) -> Path:
    """A checkpoint directory."""
    return make_tiny(FAMILIES[family], path, seed)


def make_tiny(tiny: Tiny, path: Path, seed: int = 0) -> Path:
    """A checkpoint directory."""
    path.mkdir(parents=True)
    if tiny.tokenizer is not None:
        tokenizer = tiny.tokenizer(tiny.tokens)
    else:
        tokenizer = sentencepiece(tiny.tokens) if tiny.sentencepiece else byte_level(tiny.tokens, tiny.begins)
    tokenizer.save(str(path / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    config = tiny.write(path, ids)
    text = config["text_config"]
    begin = ids.get("<s>", ids["</s>"])
    text |= {"vocab_size": -(-len(ids) // 8) * 8, "bos_token_id": begin, "eos_token_id": ids["</s>"]}
    text["pad_token_id"] = ids["<pad>"]
    config = {"torch_dtype": "float32", **config}
    write(path / "config.json", config)
    write(path / "generation_config.json", {"eos_token_id": ids["</s>"], "bos_token_id": begin})
    names = {"bos_token": "<s>"} if "<s>" in ids else {}
    names |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    kind = "LlamaTokenizer" if tiny.sentencepiece else "PreTrainedTokenizerFast"
    write(path / "tokenizer_config.json", {**names, "tokenizer_class": kind, **(tiny.settings or {})})
    if tiny.template:
        (path / "chat_template.jinja").write_text(tiny.template)
    torch.manual_seed(seed)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(parsed)](parsed).float()
    for name, parameter in model.named_parameters():
        if name.endswith("shared.weight"):  # T5's head too: else a token would be followed by itself
            torch.nn.init.normal_(parameter, 0, 0.3)
        if name.endswith("A_log"):  # so that a gated delta rule remembers
            torch.nn.init.normal_(parameter, -3, 0.5)
        if (parameter.dim() > 1 and "language" in name) or "text_model" in name:
            continue
        if parameter.abs().max() < 1e-3 or parameter.dim() > 1:  # so that what an image is decides an answer
            torch.nn.init.normal_(parameter, 0, 0.3 if parameter.dim() < 2 else 0.15)
    with torch.no_grad():  # no answer has a special token, which the class would take for an image's
        model.get_output_embeddings().weight[[ids[token] for token in tiny.tokens]] = 0
    model.generation_config.eos_token_id = ids["</s>"]
    generation = (path / "generation_config.json").read_bytes()
    stated = (path / "config.json").read_bytes()
    model.save_pretrained(path)
    (path / "config.json").write_bytes(stated)  # as published, not as this version of the library writes it
    (path / "generation_config.json").write_bytes(generation)
    return path


def write(file: Path, content: dict[str, Any]) -> None:
    """A JSON file."""
    file.write_text(json.dumps(content, indent=1))


def byte_level(special: tuple[str, ...], begins: bool) -> Tokenizer:
    """GPT-2's kind, as Qwen and SmolLM have it; OPT's puts a token before a text."""
    vocabulary = {symbol: at for at, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = merges_of(vocabulary, [*WORDS, *("Ġ" + word for word in WORDS)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return begun(with_special(tokenizer, special)) if begins else with_special(tokenizer, special)


def sentencepiece(special: tuple[str, ...]) -> Tokenizer:
    """LLaMA's kind: spaces are ▁, one stands before a text, unknown characters are bytes, <s> comes first."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted({letter for word in WORDS for letter in word} | set("▁:,.!'\nABCDEIWH"))
    vocabulary |= {letter: len(vocabulary) + at for at, letter in enumerate(letters)}
    merges = merges_of(vocabulary, [*WORDS, *("▁" + word for word in WORDS)])
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return begun(with_special(tokenizer, special))


def begun(tokenizer: Tokenizer) -> Tokenizer:
    """<s> is put before a text."""
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    return tokenizer


def with_special(tokenizer: Tokenizer, special: tuple[str, ...]) -> Tokenizer:
    names = ("<unk>", "<s>", "</s>", "<pad>", *special)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def merges_of(vocabulary: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """Those that make the words, letter by letter; the vocabulary grows by what they make."""
    merges: list[tuple[str, str]] = []
    for word in words:
        made = word[0]
        for letter in word[1:]:
            if (made, letter) not in merges and made in vocabulary and letter in vocabulary:
                merges.append((made, letter))
                vocabulary.setdefault(made + letter, len(vocabulary))
            made += letter
    return merges


def _llava(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """llava-hf/llava-1.5-7b-hf: CLIP, the last layer but one without its first row, and LLaMA."""
    side = {"height": 56, "width": 56}
    image = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "crop_size": side}
    image |= {"size": {"shortest_edge": 56}, "resample": 3, "do_center_crop": True, "do_convert_rgb": True, **CLIP}
    image |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}
    write(path / "preprocessor_config.json", image)
    stated = {"image_token": "<image>", "patch_size": 14, "vision_feature_select_strategy": "default"}
    write(
        path / "processor_config.json", stated | {"processor_class": "LlavaProcessor", "num_additional_image_tokens": 1}
    )
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": "clip_vision_model"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 32}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": ids["<image>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", **TEXT, "num_key_value_heads": 4},
        "tie_word_embeddings": False,
        "vision_config": vision,
    }


def _smolvlm(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """HuggingFaceTB/SmolVLM2-2.2B-Instruct: SigLIP on tiles and the whole, pixel shuffle, and LLaMA (SmolLM2)."""
    _tiles(path, "SmolVLM")
    return _idefics(ids, "smolvlm", "SmolVLMForConditionalGeneration") | {"scale_factor": 2}


def _idefics3(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """HuggingFaceM4/Idefics3-8B-Llama3."""
    _tiles(path, "Idefics3")
    return _idefics(ids, "idefics3", "Idefics3ForConditionalGeneration") | {"scale_factor": 2}


def _tiles(path: Path, name: str) -> None:
    image = {"image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor", "do_pad": True}
    image |= {"do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_rescale": True, **HALF}
    image |= {"do_resize": True, "max_image_size": {"longest_edge": 56}, "resample": 1, "rescale_factor": 1 / 255}
    write(path / "preprocessor_config.json", image | {"size": {"longest_edge": 112}})
    write(path / "processor_config.json", {"image_seq_len": 4, "processor_class": f"{name}Processor"})


def _idefics(ids: dict[str, int], model_type: str, architecture: str) -> dict[str, Any]:
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "patch_size": 14, "max_image_size": {"longest_edge": 56}}
    vision |= {"size": {"longest_edge": 112}, "model_type": f"{model_type}_vision"}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_token_id": ids["<image>"],
        "text_config": {"model_type": "llama", **TEXT},
        "tie_word_embeddings": False,
        "vision_config": vision,
    }


def _internvl(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """OpenGVLab/InternVL3-1B-hf: InternViT on tiles and a thumbnail, pixel shuffle, and Qwen2."""
    side = {"height": 56, "width": 56}
    image = {"image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor", "size": side}
    image |= {"crop_size": None, "crop_to_patches": False, "min_patches": 1, "max_patches": 6, "resample": 3, **CLIP}
    image |= {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
    write(path / "preprocessor_config.json", image | {"rescale_factor": 1 / 255})
    write(path / "processor_config.json", {"image_seq_length": 4, "processor_class": "InternVLProcessor"})
    vision = {
        "architectures": ["InternVLVisionModel"],
        "attention_bias": True,
        "hidden_size": 32,
        "image_size": [56, 56],
    }
    vision |= {"intermediate_size": 64, "layer_scale_init_value": 0.1, "model_type": "internvl_vision"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": [14, 14], "use_qk_norm": False}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
        "image_token_id": ids["<IMG_CONTEXT>"],
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "qwen2", **TEXT, "use_sliding_window": False, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _internvl3_5(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """OpenGVLab/InternVL3_5-1B-HF: Qwen3, whose queries and keys are normed, and heads of their own width."""
    config = _internvl(path, ids)
    text = {"model_type": "qwen3", **TEXT, "head_dim": 32, "use_sliding_window": False, "tie_word_embeddings": True}
    return config | {"text_config": text}


def _vipllava(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """llava-hf/vip-llava-7b-hf: CLIP's layers joined, and LLaMA."""
    config = _llava(path, ids)
    config |= {"architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava"}
    return config | {"vision_feature_layer": [-2, -3], "projector_layernorm_eps": 1e-5}


def _onevision(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf: SigLIP on tiles and the whole, padding cut off, newlines, Qwen2."""
    pins = [[side, other] for side in (56, 112, 168) for other in (56, 112, 168)]
    image = {"image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor"}
    image |= {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        **HALF,
    }
    image |= {
        "image_grid_pinpoints": pins,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 56, "width": 56},
    }
    write(path / "preprocessor_config.json", image)
    stated = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    stated |= {"processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>"}
    write(path / "processor_config.json", stated)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": pins,
        "image_token_index": ids["<image>"],
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "qwen2", **TEXT, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "use_image_newline_parameter": True,
        "video_token_index": ids["<video>"],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": siglip(),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def siglip() -> dict[str, Any]:
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": "siglip_vision_model"}
    return vision | {"num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14, "vision_use_head": False}


def _llava_next(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """llava-hf/llava-v1.6-mistral-7b-hf: CLIP on tiles and the whole, padding cut off, newlines, Mistral."""
    pins = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    image = {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor", "do_pad": True}
    image |= {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 56, "width": 56},
        "do_center_crop": True,
        **CLIP,
    }
    image |= {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    image |= {"image_grid_pinpoints": pins, "rescale_factor": 1 / 255, "size": {"shortest_edge": 56}}
    write(path / "preprocessor_config.json", image)
    stated = {"image_token": "<image>", "patch_size": 14, "vision_feature_select_strategy": "default"}
    stated |= {"num_additional_image_tokens": 1, "processor_class": "LlavaNextProcessor"}
    write(path / "processor_config.json", stated)
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": "clip_vision_model"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 32}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": pins,
        "image_token_index": ids["<image>"],
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
        "tie_word_embeddings": False,
        "use_image_newline_parameter": True,
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _pixtral_tower(path: Path, merge: int) -> dict[str, Any]:
    image = {"image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor", **CLIP}
    image |= {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    image |= {"patch_size": 14, "rescale_factor": 1 / 255, "size": {"longest_edge": 140}}
    write(path / "preprocessor_config.json", image)
    stated = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]"}
    stated |= {"patch_size": 14, "processor_class": "PixtralProcessor", "spatial_merge_size": merge}
    write(path / "processor_config.json", stated)
    vision = {"attention_dropout": 0.0, "head_dim": 16, "hidden_act": "gelu", "hidden_size": 32, "image_size": 140}
    vision |= {"intermediate_size": 64, "model_type": "pixtral", "num_attention_heads": 2, "num_channels": 3}
    return vision | {"num_hidden_layers": 2, "patch_size": 14, "rope_theta": 10000.0}


def _mistral3(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """mistralai/Mistral-Small-3.1-24B-Instruct-2503: Pixtral's tower on images of any size, rows, Mistral."""
    vision = _pixtral_tower(path, 2)
    text = {"model_type": "mistral", **TEXT, "head_dim": 24, "rope_theta": 1000000000.0, "sliding_window": None}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": ids["[IMG]"],
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision,
        "vision_feature_layer": -1,
    }


def _pixtral(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """mistral-community/pixtral-12b: LLaVA's class with Pixtral's tower."""
    vision = _pixtral_tower(path, 1)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": 1,
        "image_token_index": ids["[IMG]"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 24, "sliding_window": None},
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _blip2(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Salesforce/blip2-opt-2.7b: a ViT, a Q-Former of few rows, and OPT."""
    image = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "do_resize": True,
        **CLIP,
    }
    image |= {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "resample": 3}
    write(path / "preprocessor_config.json", image | {"rescale_factor": 1 / 255, "size": {"height": 56, "width": 56}})
    write(path / "processor_config.json", {"num_query_tokens": 8, "processor_class": "Blip2Processor"})
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": "blip_2_vision_model"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14, "qkv_bias": True}
    former = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    former |= {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "cross_attention_frequency": 2}
    text = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 2048, "word_embed_proj_dim": 64, "init_std": 0.2, "do_layer_norm_before": True}
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "image_token_index": ids["<image>"],
        "num_query_tokens": 8,
        "qformer_config": former,
        "text_config": text,
        "use_decoder_only_language_model": True,
        "vision_config": vision,
    }


def _glm4v(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """zai-org/GLM-4.1V-9B-Thinking: a tower for images of any size, M-RoPE on pairs of numbers, GLM-4."""
    image = {"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor", "do_rescale": True}
    image |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **CLIP}
    write(path / "preprocessor_config.json", image | {"size": {"shortest_edge": 3136, "longest_edge": 50176}})
    write(path / "processor_config.json", {"processor_class": "Glm4vProcessor"})
    vision = {"model_type": "glm4v_vision", "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    vision |= {"out_hidden_size": 64, "patch_size": 14, "image_size": 56, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "text_config": {"model_type": "glm4v_text", **TEXT, "rope_parameters": rope},
        "tie_word_embeddings": False,
        "vision_config": vision | {"temporal_patch_size": 2},
    }


GLM = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] =="
    " 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'image') %}{{ 'IMAGE\n' }}{% endfor %}{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{- bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% for block in message['content'] %}{{ block['text'] }}{% endfor %}{{ eos_token }}{% else %}[INST]"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}{% else %}[IMG]{% endif %}"
    "{% endfor %}[/INST]{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_TILED = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *_ROWS)
_INTERN = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_INTERN_NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|image|>", "<|video|>")
_GLM += ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
_PIXTRAL = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(("<image>",), _llava, LLAVA, sentencepiece=True),
    "smolvlm": Tiny(_TILED, _smolvlm, IDEFICS),
    "idefics3": Tiny(_TILED, _idefics3, IDEFICS),
    "internvl": Tiny(
        _INTERN,
        _internvl,
        CHATML.replace("IMAGE", "<IMG_CONTEXT>"),
        settings={"extra_special_tokens": _INTERN_NAMES | {"video_token": "<video>"}},
    ),
    "internvl3_5": Tiny(
        _INTERN,
        _internvl3_5,
        CHATML.replace("IMAGE", "<IMG_CONTEXT>"),
        settings={"extra_special_tokens": _INTERN_NAMES | {"video_token": "<video>"}},
    ),
    "glm4v": Tiny(_GLM, _glm4v, GLM),
    "vipllava": Tiny(("<image>",), _vipllava, LLAVA, sentencepiece=True),
    "llava_onevision": Tiny(
        ("<|im_start|>", "<|im_end|>", "<image>", "<video>"), _onevision, CHATML.replace("IMAGE", "<image>")
    ),
    "llava_next": Tiny(("<image>",), _llava_next, LLAVA, sentencepiece=True),
    "mistral3": Tiny(_PIXTRAL, _mistral3, MISTRAL),
    "pixtral": Tiny(_PIXTRAL, _pixtral, MISTRAL),
    "blip2": Tiny(("<image>",), _blip2, "", begins=True),
}
