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


def make(family: str, path: Path, seed: int = 0) -> Path:
    """A checkpoint directory."""
    tiny = FAMILIES[family]
    path.mkdir(parents=True)
    tokenizer = sentencepiece(tiny.tokens) if tiny.sentencepiece else byte_level(tiny.tokens)
    tokenizer.save(str(path / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    config = tiny.write(path, ids)
    text = config["text_config"]
    text |= {"vocab_size": -(-len(ids) // 8) * 8, "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    text["pad_token_id"] = ids["<pad>"]
    config = {"torch_dtype": "float32", **config}
    write(path / "config.json", config)
    write(path / "generation_config.json", {"eos_token_id": ids["</s>"], "bos_token_id": ids["<s>"]})
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    kind = "LlamaTokenizer" if tiny.sentencepiece else "PreTrainedTokenizerFast"
    write(path / "tokenizer_config.json", {**names, "tokenizer_class": kind, **(tiny.settings or {})})
    (path / "chat_template.jinja").write_text(tiny.template)
    torch.manual_seed(seed)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(parsed)](parsed).float()
    for name, parameter in model.named_parameters():
        if (parameter.dim() > 1 and "language" in name) or "text_model" in name:
            continue
        if parameter.abs().max() < 1e-3 or parameter.dim() > 1:  # so that what an image is decides an answer
            torch.nn.init.normal_(parameter, 0, 0.3 if parameter.dim() < 2 else 0.15)
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


def byte_level(special: tuple[str, ...]) -> Tokenizer:
    """GPT-2's kind, as Qwen and SmolLM have it; no token is put before a text."""
    vocabulary = {symbol: at for at, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = _merges(vocabulary, [*WORDS, *("Ġ" + word for word in WORDS)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, special)


def sentencepiece(special: tuple[str, ...]) -> Tokenizer:
    """LLaMA's kind: spaces are ▁, one stands before a text, unknown characters are bytes, <s> comes first."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted({letter for word in WORDS for letter in word} | set("▁:,.!'\nABCDEIWH"))
    vocabulary |= {letter: len(vocabulary) + at for at, letter in enumerate(letters)}
    merges = _merges(vocabulary, [*WORDS, *("▁" + word for word in WORDS)])
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer = _with_special(tokenizer, special)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    return tokenizer


def _with_special(tokenizer: Tokenizer, special: tuple[str, ...]) -> Tokenizer:
    names = ("<unk>", "<s>", "</s>", "<pad>", *special)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _merges(vocabulary: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
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


FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(
        ("<image>",),
        _llava,
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
        "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        sentencepiece=True,
    ),
}
