"""Checkpoints that the plain engine serves, made as those of `tiny_checkpoints`: an encoder and a decoder, a Q-Former
that reads the question, and text models that can't be run packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.families.tiny_checkpoints import CLIP, FAMILIES, TEXT, WORDS, Tiny, write

_EXTRA = tuple(f"<extra_id_{number}>" for number in range(3))
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def unigram(special: tuple[str, ...]) -> Tokenizer:
    """T5's kind: every word begins with ▁, </s> comes last, there is no <s>."""
    letters = sorted({letter for word in WORDS for letter in word} | set("▁:,.!'?QAEW012"))
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -6.0) for letter in letters if letter != "?"),
    ]
    vocabulary += [(f"{space}{word}", -3.0) for word in WORDS for space in ("▁", "") if len(f"{space}{word}") > 1]
    vocabulary += [("?", -3.0), *((name, 0.0) for name in reversed(_EXTRA))]
    seen: dict[str, float] = {}
    for piece, score in vocabulary:
        seen.setdefault(piece, score)
    tokenizer = Tokenizer(models.Unigram(list(seen.items()), unk_id=2, byte_fallback=False))
    space = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    names = ("<pad>", "</s>", "<unk>", *_EXTRA, *special)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def word_pieces(path: Path) -> int:
    """BERT's kind, in a folder of its own; how many tokens it has."""
    pieces = [*_BERT, *sorted({piece for word in WORDS for piece in (word.lower(), word[0].lower(), f"##{word[-1]}")})]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _BERT])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _BERT, strict=True))
    write(path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names})
    return len(pieces)


def _t5() -> dict[str, Any]:
    """google/flan-t5-xl's text model."""
    return {
        "model_type": "t5",
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": False,
        "initializer_factor": 1.0,
    }


def _blip(path: Path, ids: dict[str, int], kind: str, text: dict[str, Any]) -> dict[str, Any]:
    name = {"blip_2": "Blip2", "instructblip": "InstructBlip"}[kind]
    image = {"image_processor_type": "BlipImageProcessor", "processor_class": f"{name}Processor", "do_resize": True}
    image |= {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "resample": 3, **CLIP}
    write(path / "preprocessor_config.json", image | {"rescale_factor": 1 / 255, "size": {"height": 56, "width": 56}})
    write(path / "processor_config.json", {"num_query_tokens": 8, "processor_class": f"{name}Processor"})
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": f"{kind}_vision_model"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14, "qkv_bias": True}
    former = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    former |= {"model_type": f"{kind}_qformer", "encoder_hidden_size": 32, "cross_attention_frequency": 2}
    if kind == "instructblip":
        former |= {"vocab_size": word_pieces(path / "qformer_tokenizer"), "max_position_embeddings": 64}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": {"blip_2": "blip-2"}.get(kind, kind),
        "image_token_index": ids["<image>"],
        "num_query_tokens": 8,
        "qformer_config": former,
        "text_config": text,
        "use_decoder_only_language_model": text["model_type"] != "t5",
        "vision_config": vision,
    }


def _blip2_t5(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Salesforce/blip2-flan-t5-xl."""
    return _blip(path, ids, "blip_2", _t5())


def _instructblip_t5(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Salesforce/instructblip-flan-t5-xl."""
    return _blip(path, ids, "instructblip", _t5())


def _instructblip(path: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Salesforce/instructblip-vicuna-7b."""
    return _blip(path, ids, "instructblip", {"model_type": "llama", **TEXT, "tie_word_embeddings": False})


_T5_FILES = {"tokenizer_class": "T5Tokenizer", "extra_ids": len(_EXTRA)}
PLAIN = {
    "blip2_t5": Tiny(("<image>",), _blip2_t5, "", tokenizer=unigram, settings=_T5_FILES),
    "instructblip_t5": Tiny(("<image>",), _instructblip_t5, "", tokenizer=unigram, settings=_T5_FILES),
    "instructblip": Tiny(("<image>",), _instructblip, "", sentencepiece=True),
}


def _with_text(family: str, **text: Any) -> Tiny:
    """A family of the packed engine with another text model, or other settings of it."""
    tiny = FAMILIES[family]

    def written(path: Path, ids: dict[str, int]) -> dict[str, Any]:
        config = tiny.write(path, ids)
        same = text.get("model_type", config["text_config"]["model_type"]) == config["text_config"]["model_type"]
        return config | {"text_config": (config["text_config"] if same else TEXT) | text}

    return replace(tiny, write=written)


PLAIN |= {
    "soft_caps": _with_text("llava", model_type="gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=24),
    "short_window": _with_text("mistral3", sliding_window=20),
    "sinks": _with_text(
        "llava_next", model_type="gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=24
    ),
    "recurrent": _with_text("internvl", model_type="lfm2", layer_types=["conv", "full_attention", "conv"]),
}
