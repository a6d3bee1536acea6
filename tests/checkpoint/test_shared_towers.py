"""The fingerprint is that of the vision half, whatever else the checkpoint is and however it is stored."""

import json
import os
import shutil

import pytest

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.digest import remember_vision_weights, tensors_digest, vision_weights_of
from lookonce.models.checkpoint.headers import read_header
from lookonce.models.checkpoint.split import split_checkpoint
from tests.checkpoint.quantisers import gptq, quantised
from tests.checkpoint.towers import GPTQ, copy_with, edit, one_weight_changed, sharing, weights_of


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Read-only."""
    return sharing(tmp_path_factory.mktemp("towers"))


@pytest.fixture
def plain(towers, tmp_path):
    """A copy to change."""
    return shutil.copytree(towers["plain"], tmp_path / "plain")


def fingerprint(path, needs=None):
    return open_checkpoint(str(path), needs=needs).encoder_spec("float32").fingerprint()


def test_checkpoints_that_share_a_vision_half_have_one_fingerprint_and_identities_of_their_own(towers):
    opened = {name: open_checkpoint(str(path)) for name, path in towers.items()}
    assert len({one.identity for one in opened.values()}) == len(opened) == 7
    assert len({one.vision_weights for one in opened.values()}) == 1
    assert len({fingerprint(path, half) for path in towers.values() for half in (None, *Half)}) == 1


def test_one_weight_makes_another(towers, tmp_path):
    changed = one_weight_changed(towers["plain"], tmp_path / "changed")
    assert open_checkpoint(str(changed)).vision_weights != open_checkpoint(str(towers["plain"])).vision_weights
    assert fingerprint(changed) != fingerprint(towers["plain"])


@pytest.mark.parametrize("change", ["exchanged", "reshaped", "stored in half"])
def test_a_tensor_is_its_name_shape_and_dtype_too(towers, tmp_path, change):
    tensors = weights_of(towers["plain"])
    one, other = "visual.blocks.0.norm1.weight", "visual.blocks.0.norm2.weight"
    new = {
        "exchanged": {one: tensors[other], other: tensors[one]},
        "reshaped": {one: tensors[one].reshape(2, -1)},
        "stored in half": {one: tensors[one].astype("float16")},
    }[change]
    changed = copy_with(towers["plain"], tmp_path / "changed", **new)
    assert open_checkpoint(str(changed)).vision_weights != open_checkpoint(str(towers["plain"])).vision_weights


def test_how_a_quantised_tower_is_read_is_part_of_it(towers, tmp_path):
    """The same tensors, of which one version of GPTQ's format takes zeros as they are and the other adds one."""
    also, settings = r"visual\.blocks\.\d+\.mlp\.fc[12]\.weight", GPTQ | {"sym": False}
    path = quantised(towers["plain"], tmp_path / "made", gptq(sym=False), settings, also=also) / "quantised"
    first = open_checkpoint(str(path)).vision_weights
    assert first != open_checkpoint(str(towers["quantised"])).vision_weights
    edit(path / "config.json", quantization_config=settings | {"checkpoint_format": "gptq_v2"})
    assert open_checkpoint(str(path)).vision_weights != first
    edit(path / "config.json", quantization_config=settings | {"damp_percent": 0.1})
    assert open_checkpoint(str(path)).vision_weights == first


def test_how_images_are_prepared_makes_another(plain):
    first = fingerprint(plain)
    edit(plain / "preprocessor_config.json", max_pixels=5000)
    assert fingerprint(plain) == first
    edit(plain / "preprocessor_config.json", resample=2)
    assert fingerprint(plain) != first


def test_the_settings_of_the_tower_make_another(plain):
    first, config = fingerprint(plain), json.loads((plain / "config.json").read_text())
    edit(plain / "config.json", vision_config=config["vision_config"] | {"num_heads": 4})
    assert fingerprint(plain) != first


def test_golden_vector(tmp_path):
    """Of two tensors in a file written by hand."""
    header = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(12)))
    entries, _ = read_header(tmp_path / "x.safetensors")
    assert tensors_digest(entries) == "blake3:7e15b3c849a4286988e47320e6e01d35dc7dd5d96190154662047319d250c544"


def test_the_weights_are_read_once_and_again_when_they_have_changed(plain, tmp_path, monkeypatch):
    digest_memory = tmp_path / "memory"
    monkeypatch.setenv("LOOKONCE_CACHE_DIR", str(digest_memory))
    before = open_checkpoint(str(plain)).vision_weights
    file = plain / "model.safetensors"
    state = file.stat()
    entry = open_checkpoint(str(plain)).half_entries(Half.VISION)["blocks.0.attn.qkv.weight"]
    with open(file, "r+b") as stream:
        stream.seek(entry.offset)
        stream.write(bytes(4))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert open_checkpoint(str(plain)).vision_weights == before  # same path, size, mtime, inode: taken from memory
    os.utime(file, ns=(1, 1))
    assert open_checkpoint(str(plain)).vision_weights != before
    after = open_checkpoint(str(plain)).vision_weights
    for memo in (digest_memory / "digests").iterdir():
        memo.write_bytes(memo.read_bytes()[:40])
    assert open_checkpoint(str(plain)).vision_weights == after


def test_both_halves_of_a_split_state_the_weights(towers, tmp_path):
    for name in ("plain", "untied"):
        report = split_checkpoint(str(towers[name]), tmp_path / name)
        stated = [json.loads((tmp_path / name / half / "lookonce.json").read_text()) for half in Half]
        assert {one["vision_weights"] for one in stated} == {open_checkpoint(str(towers["plain"])).vision_weights}
        assert report.vision_weights == stated[0]["vision_weights"]
        assert {fingerprint(tmp_path / name / half) for half in Half} == {fingerprint(towers["plain"])}


def test_a_vision_half_whose_weights_are_not_those_that_were_split_is_found_out(towers, tmp_path):
    split_checkpoint(str(towers["plain"]), tmp_path / "out")
    changed = one_weight_changed(tmp_path / "out" / "vision", tmp_path / "changed")
    with pytest.raises(CheckpointError, match=r"lookonce\.json doesn't describe the weights beside it"):
        fingerprint(changed)


def test_a_half_that_was_split_before_weights_were_stated(towers, tmp_path):
    """Its vision half has them; its language half has to be told."""
    split_checkpoint(str(towers["plain"]), tmp_path / "out")
    for half in Half:
        file = tmp_path / "out" / half / "lookonce.json"
        stated = json.loads(file.read_text())
        del stated["vision_weights"]
        file.write_text(json.dumps(stated | {"format": 1}))
    assert fingerprint(tmp_path / "out" / "vision") == fingerprint(towers["plain"])
    language = open_checkpoint(str(tmp_path / "out" / "language"))
    assert language.vision_weights is None
    with pytest.raises(CheckpointError, match=r"no vision weights.*lookonce split.*--encoder-weights"):
        language.encoder_spec("float32")
    told = open_checkpoint(str(towers["plain"])).vision_weights
    assert language.encoder_spec("float32", vision_weights=told).fingerprint() == fingerprint(towers["plain"])


def test_what_a_host_found_out_of_a_hub_commit_is_remembered_for_that_commit():
    one, other = f"hub:acme/towers@{'1' * 40}", f"hub:acme/towers@{'2' * 40}"
    remember_vision_weights(one, "blake3:" + "a" * 64)
    assert vision_weights_of(one) == "blake3:" + "a" * 64
    assert vision_weights_of(other) is None
