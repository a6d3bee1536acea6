"""A checkpoint of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, models, pre_tokenizers

from lookonce.models.chat.tokenizer import byte_level
from lookonce.models.family import Half
from tests.toy_family.family import FAMILY

SPECIAL = ("<turn>", "<end>", "<pic>", "<eol>")
TEMPLATE = (
    "{% for message in messages %}<turn>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<pic>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "<end>{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SPEAKER = {"vocab_size": 260, "width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "ffn": 96}
SPEAKER["max_position_embeddings"] = 1024


def write(path: Path, seed: int = 0) -> Path:
    """A checkpoint directory."""
    path.mkdir(parents=True)
    tokenizer = byte_level(
        models.BPE({symbol: at for at, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []),
        FAMILY.words,
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = {"model_type": "toy_vl", "tower": {"patch": 8}, "speaker": SPEAKER, "torch_dtype": "float32"}
    config |= {"picture_token": ids["<pic>"], "row_end_token": ids["<eol>"]}
    contents = {
        "config.json": config,
        "preprocessor_config.json": {"max_pixels": 192 * 192},
        "chat_template.json": {"chat_template": TEMPLATE},
        "generation_config.json": {"eos_token_id": ids["<end>"]},
    }
    for name, content in contents.items():
        (path / name).write_text(json.dumps(content))
    generator = np.random.default_rng(seed)
    tensors = {}
    for half in Half:
        for name, shape in FAMILY.tensor_shapes(config, half, head=True).items():
            spread = 1.0 if "embed" in name else 3.0 / np.sqrt(shape[-1])
            values = generator.normal(0, spread, shape) if len(shape) > 1 else np.ones(shape)
            tensors[_stored(half, name)] = values.astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    return path


def _stored(half: Half, name: str) -> str:
    """The name in the file of a tensor of the module."""
    if half is Half.VISION:
        return f"tower.{name}"
    short = {"model.embed_tokens.weight": "table", "lm_head.weight": "head", "model.norm.weight": "norm"}
    return "speaker." + short.get(name, name.removeprefix("model."))
