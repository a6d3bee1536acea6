"""A checkpoint of any image-text-to-text class that transformers has: its config's defaults with small numbers, a
tokenizer with the special tokens that its processor names, its image processor on small images, random weights.

Nothing here knows a family, but `OWN`: what a class's defaults don't say, or contradict.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from tests.families.tiny_checkpoints import byte_level, write

WIDTH, TOWER, LAYERS, SIDE, PATCH = 64, 32, 3, 56, 14
"""Of the language model and the tower; layers of both; pixels of an image that the tower sees, and of a patch."""
_LAYERS = re.compile(r"(^|_)(layers|depth|num_layers|resampler_depth)$")
_HEADS = re.compile(r"(^|_)(num_heads|heads|n_heads)$")
_WIDTHS = re.compile(
    r"(^|_)(hidden_size|embed_dim|d_model|hidden_dim|projection_dim|output_dim|input_dim|in_dim|out_dim)$"
)
_INNER = re.compile(r"(intermediate_size|ffn_dim|mlp_dim|d_ff|ffn_hidden_size|expert_dim|intermediate_size_mlp)$")
_SMALL: dict[str, Any] = {
    "head_dim": 16,
    "attention_head_dim": 16,
    "resampler_head_dim": 16,
    "num_key_value_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "max_position_embeddings": 2048,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "num_query_tokens": 8,
    "resampler_n_latents": 8,
    "num_position_embeddings": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "first_k_dense_replace": 1,
    "num_pos_feats": 16,
    "img_max_token_num": 64,
    "word_embed_proj_dim": WIDTH,
}
_TOKEN = re.compile(r"[\"'](<[^\"'<>\s{}]+>|<\|[^\"'{}|]+\|>|\[[A-Z_]+\]|\|[A-Z]+\|)[\"']")
_ATTRIBUTE = re.compile(r"tokenizer,? ?\.?\"?(\w+_token)\b")
_ID = re.compile(r"(_token)?_(id|index)$")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{{ '\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Own:
    """What is a family's own."""

    config: dict[str, Any] = field(default_factory=dict)  # "text_config.hidden_size": 64
    image: dict[str, Any] = field(default_factory=dict)  # of preprocessor_config.json
    processor: dict[str, Any] = field(default_factory=dict)  # of processor_config.json
    placeholder: str | None = None  # for an image, in the chat template
    rows: str | None = None  # for each row of an image, where that is another
    tokens: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # tokenizer attributes
    image_processor: str | None = None
    processor_class: str | None = None


_MROPE = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_NO_DEEP = {"vision_config.deepstack_visual_indexes": []}


def _ids_of(*tokens: str) -> Any:
    return lambda _, ids: [ids[token] for token in tokens]


def _id_of(token: str) -> Any:
    return lambda _, ids: ids[token]


def _pins(*_: Any) -> list[list[int]]:
    return [[side, other] for side in (56, 112) for other in (56, 112)]


_GEMMA = Own(
    {"mm_tokens_per_image": 4},
    {"size": {"height": SIDE, "width": SIDE}},
    {"image_seq_length": 4},
    rows="<|image_token|>",
    placeholder="<|boi_token|>",
)
OWN: dict[str, Own] = {
    "glm4v": Own(_MROPE),
    "glm46v": Own(_MROPE),
    "glm4v_moe": Own(
        {"text_config.rope_parameters.mrope_section": [2, 1, 1]}, image_processor="Glm4vImageProcessorPil"
    ),
    "glm_ocr": Own(_MROPE, image_processor="Glm46VImageProcessorPil", processor_class="Glm46VProcessor"),
    "glmga": Own(_MROPE, processor_class="Glm46VProcessor"),
    "paddleocr_vl": Own(_MROPE),
    "qwen2_vl": Own(_MROPE | {"vision_config.hidden_size": WIDTH}),
    "qwen2_5_vl": Own(_MROPE),
    "qwen3_vl": Own(_MROPE | _NO_DEEP),
    "qwen3_vl_moe": Own(_MROPE | _NO_DEEP, image_processor="Qwen2VLImageProcessorPil"),
    "cosmos3_omni": Own(_MROPE | _NO_DEEP, processor_class="Qwen3VLProcessor"),
    "cosmos3_edge": Own(_MROPE),
    "fast_vlm": Own(image_processor="CLIPImageProcessorPil", processor_class="LlavaProcessor"),
    "aya_vision": Own(
        rows="<|IMG_PATCH|>",
        placeholder="<image>",
        processor={"img_size": SIDE, "patch_size": PATCH, "downsample_factor": 2},
    ),
    "ovis2": Own(
        {"visual_indicator_token_ids": _ids_of("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")},
        rows="<IMG_ATOM>",
        placeholder="<image>",
        tokens=("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    ),
    "lfm2_vl": Own(  # where torchvision is
        image={
            "encoder_patch_size": PATCH,
            "tile_size": SIDE,
            "max_num_patches": 64,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
        }
    ),
    "got_ocr2": Own(
        {"vision_config.image_size": 1024, "vision_config.patch_size": 16, "image_seq_length": 256},
        {"size": {"height": 1024, "width": 1024}},
    ),
    "idefics2": Own(
        {"vision_config.image_size": 70},
        {"do_image_splitting": False, "size": {"longest_edge": 70, "shortest_edge": 28}},
        {"image_seq_len": 8},
    ),
    "idefics3": Own(
        {"scale_factor": 2},
        {"max_image_size": {"longest_edge": 56}, "size": {"longest_edge": 112}},
        {"image_seq_len": 4},
    ),
    "smolvlm": Own(
        {"scale_factor": 2},
        {"max_image_size": {"longest_edge": 56}, "size": {"longest_edge": 112}},
        {"image_seq_len": 4},
    ),
    "internvl": Own(
        {"vision_config.image_size": [56, 56], "vision_config.patch_size": [14, 14], "image_seq_length": 4},
        {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4},
        rows="<|context_image_token|>",
    ),
    "llava_onevision": Own(
        {"image_grid_pinpoints": _pins}, {"image_grid_pinpoints": _pins()}, {"num_image_tokens": 16}
    ),
    "llava_next": Own({"image_grid_pinpoints": _pins}, {"image_grid_pinpoints": _pins()}),
    "llava_next_video": Own({"image_grid_pinpoints": _pins}, {"image_grid_pinpoints": _pins()}),
    "granite4_vision": Own(
        {
            "image_grid_pinpoints": _pins,
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "spatial_target_layers": [0, 1, 2, 2],
        },
        {"image_grid_pinpoints": _pins()},
    ),
    "vipllava": Own(
        {"vision_feature_layers": [-1, -2], "vision_feature_layer": [-1, -2]},
        processor={"vision_feature_select_strategy": "default"},
    ),
    "qianfan_ocr": Own(
        {"vision_config.image_size": [56, 56], "vision_config.patch_size": [14, 14], "image_seq_length": 4},
        {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4},
        rows="<|context_image_token|>",
        placeholder="<image>",
        tokens=("<image>",),
    ),
    "deepseek_ocr2": Own({"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "gemma3": _GEMMA,
    "shieldgemma2": _GEMMA,
    "hunyuan_vl": Own(
        {"text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
        placeholder="<|image_start_token|><|image_token|><|image_end_token|>",
    ),
    "ernie4_5_vl_moe": Own({"text_config.rope_parameters.mrope_section": [3, 3, 2]}),
}


UNTOLD = ("blip-2", "instructblip", "paligemma")
"""Whose checkpoints have no chat template."""


class Unmade(Exception):
    """There is no way to make a checkpoint here; its text says why."""


def make_any(model_type: str, path: Path, seed: int = 0) -> Path:
    """A checkpoint directory of this model type."""
    own = OWN.get(model_type, Own())
    path.mkdir(parents=True)
    name = own.processor_class or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise Unmade("transformers names no processor for this model type")
    module, cls = processor_class(model_type, name)
    names = {attribute: f"<|{attribute}|>" for attribute in _attributes(module, cls)} | own.names
    plain = CONFIG_MAPPING[model_type]().to_dict()
    image = own.rows or names.get("image_token") or _default_token(module, "image") or "<image>"
    held = {field: _held(field, image, module) for field in _id_fields(plain)}
    tokens = (*_tokens(module), *names.values(), *own.tokens, image, *held.values())
    tokenizer = byte_level(tuple(dict.fromkeys(t for t in tokens if t not in ("<s>", "</s>", "<pad>", "<unk>"))), False)
    tokenizer.save(str(path / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {key: value for key, value in names.items() if key not in specials}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        **({"extra_special_tokens": extra} if extra else {}),
    }
    write(path / "tokenizer_config.json", settings)
    config = _config(plain, {field: ids[token] for field, token in held.items()}, ids, own) | {"model_type": model_type}
    _processors(path, model_type, name, cls, config, own)
    write(path / "config.json", config)
    write(path / "generation_config.json", {"eos_token_id": ids["</s>"], "bos_token_id": ids["<s>"]})
    if model_type not in UNTOLD:
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", own.placeholder or image))
    _weights(path, config, [ids[token] for token in tokens], seed)
    return path


def processor_class(model_type: str, name: str) -> tuple[Any, Any]:
    """Its module and itself."""
    from lookonce.models.general.processor import named_class

    cls = named_class(name, model_type)
    return importlib.import_module(cls.__module__), cls


def _tokens(module: Any) -> Iterator[str]:
    yield from dict.fromkeys(_TOKEN.findall(inspect.getsource(module)))


def _attributes(module: Any, cls: Any) -> Iterator[str]:
    """Those that the processor takes from its tokenizer unasked."""
    source = inspect.getsource(module)
    optional = set(re.findall(r"hasattr\(tokenizer, \"(\w+)\"", source)) | set(
        re.findall(r"getattr\(\w*\.?tokenizer, \"(\w+)\"", source)
    )
    taken = dict.fromkeys(re.findall(r"tokenizer\.(\w+_token)(?:_id)?\b", source))
    yield from (
        each
        for each in taken
        if each not in optional and each not in ("bos_token", "eos_token", "pad_token", "unk_token")
    )


def _default_token(module: Any, kind: str) -> str | None:
    """What a processor's source takes for an image or a video."""
    source = inspect.getsource(module)
    found = re.findall(rf"(?<![a-z_]){kind}_token(?:: str)?\s*=\s*(?:AddedToken\()?[\"']([^\"']+)[\"']", source)
    found += re.findall(rf"getattr\(tokenizer, \"{kind}_token\", \"([^\"]+)\"", source)
    return found[0] if found else None


def _id_fields(settings: dict[str, Any]) -> Iterator[str]:
    """Names of the fields that hold ids of tokens."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _id_fields(value)
        elif _ID.search(str(key)) and not isinstance(value, list):
            yield key


def _held(field: str, image: str, module: Any) -> str:
    """The token of such a field."""
    kind = _ID.sub("", field)
    usual = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "decoder_start": "<s>", "forced_eos": "</s>", "image": image}
    usual["_pad"], usual["image_patch"] = "<pad>", image
    return usual.get(kind) or (_default_token(module, kind) if kind == "video" else None) or f"<|{kind}_token|>"


def _config(plain: dict[str, Any], held: dict[str, int], ids: dict[str, int], own: Own) -> dict[str, Any]:
    made: dict[str, Any] = _shrunk(plain, "", held, ids)
    for dotted, value in own.config.items():
        *parents, last = dotted.split(".")
        at = made
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value(at.get(last), ids) if callable(value) else value
    return {"torch_dtype": "float32", **made}


def _shrunk(settings: dict[str, Any], section: str, held: dict[str, int], ids: dict[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    text = "text" in section or section in ("", "decoder", "llm_config", "language_config")
    layers = LAYERS if text else LAYERS - 1
    for number, value in settings.items():
        key = str(number)
        if key in ("id2label", "label2id", "transformers_version", "_name_or_path", "dtype", "architectures"):
            continue
        if isinstance(value, dict):
            made[key] = _rope(value) if "rope" in key else _shrunk(value, f"{section}.{key}", held, ids)
        elif key.endswith(("_types", "_pattern")) and isinstance(value, list):
            made[key] = value[-layers:]
        elif key in held:
            made[key] = held[key]
        elif isinstance(value, bool) or not isinstance(value, int):
            made[key] = _SMALL.get(key, value) if not isinstance(value, list | str | bool) else value
        else:
            made[key] = _number(key, value, text, layers, ids)
    return made


def _number(key: str, value: int, text: bool, layers: int, ids: dict[str, int]) -> Any:
    if "vocab_size" in key:
        return -(-len(ids) // 8) * 8
    if key in _SMALL:
        return _SMALL[key]
    if _LAYERS.search(key):
        return min(value, layers)
    if _HEADS.search(key) or key in ("num_attention_heads",):
        return 4 if text else 2
    if key in ("out_hidden_size", "text_hidden_size"):
        return WIDTH
    if _WIDTHS.search(key):
        return WIDTH if text else TOWER
    if _INNER.search(key):
        return 2 * (WIDTH if text else TOWER)
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    made = {key: _rope(each) if isinstance(each, dict) else each for key, each in value.items()}
    if "mrope_section" in made:
        made["mrope_section"] = [4, 2, 2] if made.get("partial_rotary_factor", 1) == 1 else [2, 1, 1]
    return made


def _processors(path: Path, model_type: str, name: str, cls: Any, config: dict[str, Any], own: Own) -> None:
    kinds = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    kind = own.image_processor or kinds.get("pil") or (find_spec("torchvision") and kinds.get("torchvision"))
    if kind is None:
        raise Unmade(f"its image processor is torchvision's only ({kinds.get('torchvision')})")
    import transformers

    image_cls = getattr(transformers, kind)
    stated = {"image_processor_type": kind.removesuffix("Pil"), "processor_class": name}
    made = image_cls()
    small: dict[str, Any] = {}
    size = dict(made.size) if getattr(made, "size", None) else {}
    pixels = {"shortest_edge": 3136, "longest_edge": 50176} if set(size) >= {"shortest_edge", "longest_edge"} else {}
    if size:
        small["size"] = {key: pixels.get(key, SIDE) for key in size if size[key] is not None}
    if getattr(made, "crop_size", None):
        small["crop_size"] = {"height": SIDE, "width": SIDE}
    if getattr(made, "patch_size", None):
        patch = made.patch_size
        small["patch_size"] = dict.fromkeys(patch, PATCH) if isinstance(patch, dict) else PATCH
    for each in ("image_mean", "image_std"):
        if getattr(made, each, None) is not None:
            small[each] = list(getattr(made, each))
    for each in ("min_pixels", "max_pixels"):
        if getattr(made, each, None):
            small[each] = {"min_pixels": 3136, "max_pixels": 50176}[each]
    write(
        path / "preprocessor_config.json", json.loads(json.dumps(small, default=lambda x: dict(x))) | stated | own.image
    )
    taken = inspect.signature(cls.__init__).parameters
    from lookonce.models.general.processor import _derived

    derived = _derived(CONFIG_MAPPING[model_type].from_dict(config))
    write(
        path / "processor_config.json",
        {k: v for k, v in derived.items() if k in taken} | own.processor | {"processor_class": name},
    )


def _weights(path: Path, config: dict[str, Any], special: list[int], seed: int) -> None:
    stated = {file: (path / file).read_bytes() for file in ("config.json", "generation_config.json")}
    torch.manual_seed(seed)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(parsed)](parsed).float()
    decoder = (
        {id(parameter) for parameter in model.get_decoder().parameters()} if hasattr(model, "get_decoder") else set()
    )
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) in decoder:
            continue
        if parameter.abs().max() < 1e-3 or parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3 if parameter.dim() < 2 else 0.15)
    head = model.get_output_embeddings()
    if head is not None:
        with torch.no_grad():
            head.weight[special] = 0
    model.generation_config.eos_token_id = json.loads(stated["generation_config.json"])["eos_token_id"]
    model.save_pretrained(path)
    for file, content in stated.items():
        (path / file).write_bytes(content)
