"""A tokenizer of Qwen2-VL's kind for random checkpoints: byte-level BPE, ChatML, the same special tokens, any size.

Merges are pairs of letters and of pairs, in order of how common the letters are in English: nothing is learnt, every
text encodes, every id below the vocabulary size decodes. Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.writing import write_json
from lookonce.models.qwen2_vl.config import WORDS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
_PLAIN_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = _DEFAULT_SYSTEM + _PLAIN_TEMPLATE
_LETTERS = "etaoinshrdlucmwfgypbvkjxqz"
_SPACE = "Ġ"  # how byte-level BPE writes a space


def write_tokenizer(
    directory: Path, vocab_size: int, *, template_in_config: bool, default_system: bool = True
) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; returns the special tokens' ids.

    Special tokens have the last ids. The template stands in tokenizer_config.json or in chat_template.jinja;
    `default_system`: it begins with a system message of its own where there is none.
    """
    from tokenizers import AddedToken, models, pre_tokenizers

    from lookonce.models.chat.tokenizer import byte_level

    vocab = {symbol: position for position, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    room = vocab_size - len(vocab) - len(SPECIAL_TOKENS)
    if room < 0:
        raise CheckpointError(f"vocab must be at least {len(vocab) + len(SPECIAL_TOKENS)}, got {vocab_size}")
    merges = list(itertools.islice(_merges(), room))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges), WORDS)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {token: len(vocab) + place for place, token in enumerate(SPECIAL_TOKENS)}
    config = _tokenizer_config(ids)
    template = CHAT_TEMPLATE if default_system else _PLAIN_TEMPLATE
    if template_in_config:
        config["chat_template"] = template
    else:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", config)
    return ids


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs to merge, each side a byte or an earlier merge, without repeating a product."""
    pairs = ["".join(pair) for pair in itertools.product(_LETTERS, repeat=2)]
    yield from itertools.product(_LETTERS, repeat=2)
    yield from itertools.product(_SPACE, _LETTERS)
    yield from ((_SPACE + letter, other) for letter, other in itertools.product(_LETTERS, repeat=2))
    yield from itertools.product(pairs, _LETTERS)
    yield from ((_SPACE + pair, letter) for pair, letter in itertools.product(pairs, _LETTERS))
    yield from itertools.product(pairs, pairs)


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(position): {"content": token, **flags} for token, position in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
