"""`split_checkpoint`: two whole halves, exact bytes, one fingerprint, nothing lost and nothing half done."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint


@pytest.fixture
def halves(sharded, tmp_path):
    split_checkpoint(str(sharded), tmp_path / "out")
    return tmp_path / "out"


def tensors(path):
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("max_shard_bytes", [4_000_000_000, 200_000, 1])
def test_every_tensor_is_in_one_half_byte_for_byte(sharded, tmp_path, max_shard_bytes):
    seen = []
    report = split_checkpoint(
        str(sharded), tmp_path / "out", max_shard_bytes=max_shard_bytes, progress=lambda *step: seen.append(step)
    )
    source, vision, language = tensors(sharded), tensors(tmp_path / "out/vision"), tensors(tmp_path / "out/language")
    assert not vision.keys() & language.keys()
    assert all(name.startswith("model.visual.") for name in vision)
    together = vision | language
    assert together.keys() == source.keys()
    assert all(together[name].tobytes() == source[name].tobytes() for name in source)
    for half in Half:
        assert len(list(report.paths[half].glob("*.safetensors"))) == report.shards[half]
        assert [step for step in seen if step[0] is half][-1][1:] == (report.weight_bytes[half],) * 2
        assert open_checkpoint(str(report.paths[half])).halves == {half}
    if max_shard_bytes == 1:
        assert report.shards == report.tensors


def test_the_fingerprint_is_the_same_from_the_whole_and_from_either_half(sharded, halves):
    whole = open_checkpoint(str(sharded))
    parts = [open_checkpoint(str(halves / half)) for half in Half]
    parts += [open_checkpoint(str(halves), needs=half) for half in Half]
    for part in parts:
        assert part.identity == whole.identity
        assert part.name == whole.name
        assert part.encoder_spec("bfloat16") == whole.encoder_spec("bfloat16")


def test_each_half_has_the_files_it_needs_and_no_others(halves, sharded):
    shared = {"config.json", "preprocessor_config.json", "lookonce.json"}
    assert {f.name for f in (halves / "vision").iterdir()} == shared | {"model.safetensors"}
    assert {f.name for f in (halves / "language").iterdir()} == shared | {
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (halves / "language/tokenizer.json").read_bytes() == (sharded / "tokenizer.json").read_bytes()


def test_the_other_half_only(halves):
    with pytest.raises(CheckpointError, match="holds only the language half, no vision weights; give the vision half"):
        open_checkpoint(str(halves / "language"), needs=Half.VISION)
    with pytest.raises(
        CheckpointError, match="holds only the vision half, no language weights; give the language half"
    ):
        open_checkpoint(str(halves / "vision"), needs=Half.LANGUAGE)
    with pytest.raises(CheckpointError, match=r"has no config\.json.*holds split halves: give one of .*vision"):
        open_checkpoint(str(halves))
    with pytest.raises(CheckpointError, match="no vision weights"):
        split_checkpoint(str(halves / "language"), halves.parent / "again")


def test_an_existing_directory_is_overwritten_only_when_told_and_only_if_it_is_a_split(tiny, halves, tmp_path):
    first = open_checkpoint(str(halves / "vision")).identity
    with pytest.raises(CheckpointError, match=r"not empty.*--force"):
        split_checkpoint(str(tiny), halves)
    assert open_checkpoint(str(halves / "vision")).identity == first
    split_checkpoint(str(tiny), halves, force=True)
    assert open_checkpoint(str(halves / "vision")).identity == open_checkpoint(str(tiny)).identity != first
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something other than an earlier split"):
        split_checkpoint(str(tiny), tmp_path / "papers", force=True)
    with pytest.raises(CheckpointError, match="is a file"):
        split_checkpoint(str(tiny), tmp_path / "papers/thesis.txt", force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "papers"]  # nothing temporary left


def test_a_source_is_never_replaced_by_its_own_split(tmp_path):
    source = make_random_checkpoint(tmp_path / "models/one")
    for out in (source, source.parent):
        with pytest.raises(CheckpointError, match="being split"):
            split_checkpoint(str(source), out, force=True)
    assert open_checkpoint(str(source)).halves == set(Half)


def test_a_failure_midway_leaves_no_trace(tiny, tmp_path):
    class DiskFullError(OSError):
        pass

    def progress(half, done, total):
        if half is Half.LANGUAGE:
            raise DiskFullError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written .No space left"):
        split_checkpoint(str(tiny), tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"half": "language"},
        {"identity": "blake3:00"},
        {"identity": "sha256:" + "0" * 64},
        {"format": 3},
        {"vision_weights": None},
        {"vision_weights": "blake3:00"},
        {"name": None},
    ],
)
def test_an_identity_file_that_does_not_fit(halves, change):
    file = halves / "vision" / "lookonce.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"lookonce\.json doesn't describe the weights beside it"):
        open_checkpoint(str(halves / "vision"))


def test_a_split_half_copied_elsewhere_keeps_its_identity(halves, sharded, tmp_path):
    shutil.copytree(halves / "language", tmp_path / "elsewhere")
    assert open_checkpoint(str(tmp_path / "elsewhere")).identity == open_checkpoint(str(sharded)).identity
