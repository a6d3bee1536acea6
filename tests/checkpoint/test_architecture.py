"""The published models' shapes, and which shards of theirs each half needs."""

import math

import pytest

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.files import shards_of
from lookonce.models.checkpoint.writing import TensorSpec, plan_by_bytes, plan_by_count
from lookonce.models.qwen2_vl.architecture import SIZES, tensor_shapes
from lookonce.models.registry import Half, family_of

FAMILY = family_of({"model_type": "qwen2_vl"})


@pytest.mark.parametrize(
    ("size", "tied", "vision", "total"),
    [
        ("2b", True, 665_271_296, 2_208_985_600),
        ("7b", False, 675_759_104, 8_291_375_616),
        ("72b", False, 699_356_672, 73_405_560_320),
    ],
)
@pytest.mark.parametrize("layout", ["published", "nested"])
def test_parameter_counts_are_those_of_the_published_models(size, tied, vision, total, layout):
    shapes = tensor_shapes(SIZES[size], layout=layout, tied=tied)
    halves = {name: FAMILY.locate(name)[0] for name in shapes}
    tower = [math.prod(shape) for name, shape in shapes.items() if halves[name] is Half.VISION]
    assert len(tower) == 391
    assert sum(tower) == vision
    assert sum(math.prod(shape) for shape in shapes.values()) == total


def _weight_map(shards):
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}


def _tensors(size):
    return [TensorSpec(name, "BF16", shape) for name, shape in tensor_shapes(SIZES[size], tied=False).items()]


def test_vision_needs_one_of_five_shards_of_the_7b():
    weight_map = _weight_map(plan_by_bytes(_tensors("7b"), 4_000_000_000))
    assert len(set(weight_map.values())) == 5
    assert shards_of(FAMILY, weight_map, {Half.VISION}) == ["model-00001-of-00005.safetensors"]
    assert len(shards_of(FAMILY, weight_map, {Half.LANGUAGE})) == 5


def test_vision_needs_one_of_38_shards_of_the_72b():
    weight_map = _weight_map(plan_by_count(_tensors("72b"), 38))
    assert len(set(weight_map.values())) == 38
    assert shards_of(FAMILY, weight_map, {Half.VISION}) == ["model-00001-of-00038.safetensors"]
    assert len(shards_of(FAMILY, weight_map, set(Half))) == 38


def test_a_half_that_lies_in_the_middle_is_found():
    weight_map = {"model.layers.0.x": "a.safetensors", "visual.y": "b.safetensors", "lm_head.weight": "c.safetensors"}
    assert shards_of(FAMILY, weight_map, {Half.VISION}) == ["b.safetensors"]
    assert shards_of(FAMILY, weight_map, {Half.LANGUAGE}) == ["a.safetensors", "c.safetensors"]


def test_names_of_both_layouts_become_the_modules_own():
    expected = {
        "visual.blocks.0.attn.qkv.weight": (Half.VISION, "blocks.0.attn.qkv.weight"),
        "model.visual.blocks.0.attn.qkv.weight": (Half.VISION, "blocks.0.attn.qkv.weight"),
        "model.embed_tokens.weight": (Half.LANGUAGE, "model.embed_tokens.weight"),
        "model.language_model.embed_tokens.weight": (Half.LANGUAGE, "model.embed_tokens.weight"),
        "lm_head.weight": (Half.LANGUAGE, "lm_head.weight"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    }
    assert {name: FAMILY.locate(name) for name in expected} == expected
    with pytest.raises(CheckpointError, match=r"base_model\.model\.x.*adapter"):
        FAMILY.locate("base_model.model.x")


def test_tokens_of_a_grid():
    config = {"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}
    assert FAMILY.pixel_factor(config) == 28
    assert FAMILY.tokens_per_grid(config, (1, 74, 74)) == 1369


def test_unsupported_model_types_are_refused_with_the_supported_ones():
    for config in ({"model_type": "llama"}, {"model_type": ["x"]}, {}):
        with pytest.raises(CheckpointError, match=r"not supported; supported: .*qwen2_vl"):
            family_of(config)
