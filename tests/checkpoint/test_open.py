"""Opening local directories: what is found, what identifies it, and a clear error for each way it can be broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lookonce.core.errors import CheckpointError, ErrorKind
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint


@pytest.fixture
def own(sharded, tmp_path) -> Path:
    """A copy of the sharded checkpoint to damage."""
    return shutil.copytree(sharded, tmp_path / "own")


def edit(file: Path, **changes) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def vision_only_shard(path: Path) -> Path:
    checkpoint = open_checkpoint(str(path))
    return next(f for f in checkpoint.files(Half.VISION) if f not in checkpoint.files(Half.LANGUAGE))


def test_each_half_names_its_tensors_and_only_its_files(sharded):
    checkpoint = open_checkpoint(str(sharded))
    assert checkpoint.halves == {Half.VISION, Half.LANGUAGE}
    assert "blocks.0.attn.qkv.weight" in checkpoint.half_entries(Half.VISION)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= checkpoint.half_entries(Half.LANGUAGE).keys()
    everything = set(sharded.glob("*.safetensors"))
    vision, language = set(checkpoint.files(Half.VISION)), set(checkpoint.files(Half.LANGUAGE))
    assert vision < everything and language < everything and vision | language == everything
    assert checkpoint.weight_bytes(Half.VISION) == 1_030_400
    assert (checkpoint.hidden_size, checkpoint.merge_size, checkpoint.dtype) == (64, 2, "float32")
    assert (checkpoint.min_pixels, checkpoint.max_pixels) == (3136, 12845056)
    assert checkpoint.family.special_tokens(checkpoint.config).image_id == 2048 - 2


def test_importing_and_opening_load_no_torch(tiny):
    code = (
        "import sys; from lookonce.models.checkpoint import open_checkpoint\n"
        "import lookonce.models.qwen2_vl.synthetic, lookonce.models.checkpoint.split\n"
        "print(open_checkpoint(sys.argv[1]).identity); sys.exit(bool({'torch','transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == open_checkpoint(str(tiny)).identity


def test_identity_follows_weights_and_config_and_nothing_else(own):
    def identity():
        return open_checkpoint(str(own)).identity

    first = identity()
    assert first.startswith("blake3:") and len(first) == 7 + 64
    (own / "README.md").write_text("hello")
    edit(own / "generation_config.json", temperature=0.5)
    assert identity() == first
    shard = sorted(own.glob("*.safetensors"))[-1]
    with open(shard, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=(1, 1))
    second = identity()
    assert second != first
    edit(own / "config.json", extra=1)
    assert identity() not in (first, second)


def test_identity_is_remembered_so_that_a_second_start_does_not_read_the_weights(own, digest_memory):
    before = open_checkpoint(str(own)).identity
    shard = sorted(own.glob("*.safetensors"))[0]
    state, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    with open(shard, "r+b") as stream:
        stream.write(data)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert open_checkpoint(str(own)).identity == before  # same path, size, mtime, inode: taken from memory
    shutil.rmtree(digest_memory)
    assert open_checkpoint(str(own)).identity != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 5}'])
def test_a_damaged_or_unwritable_memory_only_costs_time(own, tmp_path, monkeypatch, content):
    first = open_checkpoint(str(own)).identity
    monkeypatch.setenv("LOOKONCE_CACHE_DIR", str(tmp_path / "memory"))
    assert open_checkpoint(str(own)).identity == first
    for memo in (tmp_path / "memory" / "digests").iterdir():
        memo.write_text(content)
    assert open_checkpoint(str(own)).identity == first
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("LOOKONCE_CACHE_DIR", str(tmp_path / "file"))
    assert open_checkpoint(str(own)).identity == first


@pytest.mark.parametrize("damage", ["swapped", "a bit"])
def test_a_remembered_digest_is_its_own_files(own, tmp_path, monkeypatch, damage):
    first = open_checkpoint(str(own)).identity
    monkeypatch.setenv("LOOKONCE_CACHE_DIR", str(tmp_path / "memory"))
    assert open_checkpoint(str(own)).identity == first
    memos = sorted((tmp_path / "memory" / "digests").iterdir())
    contents = [memo.read_bytes() for memo in memos]
    assert len(memos) > 1
    for memo, content, other in zip(memos, contents, [*contents[1:], contents[0]], strict=True):
        memo.write_bytes(other if damage == "swapped" else content[:-1] + bytes([content[-1] ^ 1]))
    assert open_checkpoint(str(own)).identity == first


def test_the_fingerprint_depends_on_dtype_preprocessor_and_weights_but_not_on_pixel_bounds(own, tmp_path):
    spec = open_checkpoint(str(own)).encoder_spec("float32")
    fingerprint = spec.fingerprint()
    assert open_checkpoint(str(own), needs=Half.LANGUAGE).encoder_spec("float32").fingerprint() == fingerprint
    assert open_checkpoint(str(own)).encoder_spec("bfloat16").fingerprint() != fingerprint
    assert open_checkpoint(str(own)).encoder_spec("float32", "int8").fingerprint() != fingerprint
    edit(own / "preprocessor_config.json", max_pixels=5000)
    assert open_checkpoint(str(own)).encoder_spec("float32").fingerprint() == fingerprint
    edit(own / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert open_checkpoint(str(own)).encoder_spec("float32").fingerprint() != fingerprint
    other = make_random_checkpoint(tmp_path / "fine-tune", layout="nested", tied=False, shards=4, vocab=2048, seed=1)
    assert open_checkpoint(str(other)).encoder_spec("float32").fingerprint() != fingerprint
    with pytest.raises(CheckpointError, match=r"int4.*float32"):
        open_checkpoint(str(own)).encoder_spec("int4")


def test_preprocessor_defaults_are_those_of_transformers(own):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    (own / "preprocessor_config.json").write_text("{}")
    ours, theirs = open_checkpoint(str(own)).preprocessor, Qwen2VLImageProcessorPil()
    for key in ("image_mean", "image_std", "rescale_factor", "patch_size", "temporal_patch_size", "merge_size"):
        expected = getattr(theirs, key)
        assert ours[key] == (list(expected) if isinstance(expected, tuple) else expected), key
    assert ours["resample"] == int(theirs.resample)
    assert ours["size"] == dict(theirs.size)


def test_preprocessor_bounds_in_size_or_inside_processor_config(own):
    size = {"shortest_edge": 784, "longest_edge": 78400}
    edit(own / "preprocessor_config.json", min_pixels=None, max_pixels=None, size=size)
    assert (open_checkpoint(str(own)).min_pixels, open_checkpoint(str(own)).max_pixels) == (784, 78400)
    stored = json.loads((own / "preprocessor_config.json").read_text())
    (own / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        open_checkpoint(str(own))
    (own / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
    assert open_checkpoint(str(own)).max_pixels == 78400
    edit(own / "processor_config.json", image_processor=stored | {"size": None, "min_pixels": 10, "max_pixels": 5})
    with pytest.raises(CheckpointError, match=r"min_pixels 10 must be .* at most max_pixels 5"):
        open_checkpoint(str(own))


def broken(path: Path, match: str, needs: Half | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as raised:
        open_checkpoint(str(path), needs=needs)
    assert raised.value.kind is ErrorKind.CHECKPOINT_INVALID


def test_no_config(own):
    (own / "config.json").unlink()
    broken(own, r"own has no config\.json: not a checkpoint directory")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_config_that_is_not_a_json_object(own, content):
    (own / "config.json").write_text(content)
    broken(own, r"config\.json .*(JSON)")


def test_unsupported_model_type(own):
    edit(own / "config.json", model_type="llama")
    broken(own, "model_type 'llama' is not supported; supported: .*qwen2_vl")


def test_prequantised_weights(own):
    edit(own / "config.json", quantization_config={"quant_method": "aqlm"})
    broken(own, "quantization_config.*original checkpoint")


def test_disagreeing_widths(own):
    config = json.loads((own / "config.json").read_text())
    edit(own / "config.json", vision_config=config["vision_config"] | {"hidden_size": 128})
    with pytest.raises(CheckpointError, match=r"vision_config\.hidden_size 128 differs from .* 64"):
        _ = open_checkpoint(str(own)).hidden_size


def test_a_missing_shard_matters_only_to_the_half_it_holds(own):
    shard = vision_only_shard(own)
    shard.unlink()
    broken(own, f"{shard.name} is missing", Half.VISION)
    broken(own, f"{shard.name} is missing")
    checkpoint = open_checkpoint(str(own), needs=Half.LANGUAGE)
    assert checkpoint.halves == {Half.LANGUAGE}
    with pytest.raises(CheckpointError, match="holds only the language half, no vision weights"):
        checkpoint.files(Half.VISION)
    with pytest.raises(CheckpointError, match=f"{shard.name} missing.*lookonce split"):
        _ = checkpoint.identity


def test_a_truncated_shard(own):
    shard = vision_only_shard(own)
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    broken(own, f"{shard.name}: truncated: tensor .* but the file has {size - 1}; .*download it again")
    os.truncate(shard, 100)
    broken(own, f"{shard.name}: truncated or not safetensors")
    os.truncate(shard, 0)
    broken(own, f"{shard.name}: truncated or not safetensors")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[1]", "header cannot be parsed"),
        (b"\xff\xfe{", "header cannot be parsed"),
        (b'{"visual.a": 5}', "header cannot be parsed"),
        (b'{"visual.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "declares 4 bytes"),
        (b'{"visual.a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "declares -4 bytes"),
        (b'{"visual.a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "declares 4 bytes"),
        (b'{"visual.a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', "dtype 'X9'"),
    ],
)
def test_headers_that_declare_what_cannot_be(tiny, tmp_path, header, match):
    own = shutil.copytree(tiny, tmp_path / "own")
    (own / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    broken(own, match)


def test_pickled_weights_only(own):
    for file in own.glob("*.safetensors*"):
        file.unlink()
    broken(own, "has no model.safetensors and no model.safetensors.index.json")
    (own / "pytorch_model.bin").write_bytes(b"\x80\x04")
    broken(own, r"only pickled weights .*convert them to safetensors")


def test_an_index_that_lies(own):
    index = json.loads((own / "model.safetensors.index.json").read_text())
    name = "model.visual.merger.mlp.2.bias"
    for shard in ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 5):
        index["weight_map"][name] = shard
        (own / "model.safetensors.index.json").write_text(json.dumps(index))
        broken(own, "not a plain name of a .safetensors file")
    index["weight_map"][name] = index["weight_map"]["lm_head.weight"]
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    broken(own, f"tensor '{name}' is not in .*{index['weight_map'][name]}, where")
    (own / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    broken(own, "weight_map is missing or empty")


def test_several_files_without_an_index_are_read_by_their_headers(own):
    (own / "model.safetensors.index.json").unlink()
    assert open_checkpoint(str(own)).halves == set(Half)
    shutil.copy(sorted(own.glob("*.safetensors"))[0], own / "zz.safetensors")
    broken(own, r"is in both .* and .*zz\.safetensors")


def test_no_such_directory_and_a_revision_of_a_directory(tmp_path, tiny):
    for model in (str(tmp_path / "absent"), "./absent", "gpt2", "a/b/c", "a/../b"):
        with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
            open_checkpoint(model)
    with pytest.raises(CheckpointError, match=r"revision 'main' was given.*local directory"):
        open_checkpoint(str(tiny), revision="main")
