"""Downloads go through the real hub library to a local server, which records what was asked for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.adapter import open_adapter
from lookonce.models.qwen2_vl.config import FAMILY
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.checkpoint.hub_server import Hub
from tests.checkpoint.loras import adapter

OPEN = """
import json, sys
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.core.errors import CheckpointError
try:
    needs = Half(sys.argv[2]) if sys.argv[2] else None
    checkpoint = open_checkpoint(sys.argv[1], needs=needs, revision=sys.argv[3] or None)
except CheckpointError as error:
    sys.exit(error.message)
print(json.dumps({"name": checkpoint.name, "identity": checkpoint.identity, "halves": sorted(checkpoint.halves),
    "path": str(checkpoint.path),
    "files": [f.name for f in checkpoint.files(Half(sys.argv[2] or "vision"))],
    "weights": (weights := checkpoint.vision_weights),
    "fingerprint": weights and checkpoint.encoder_spec("float32").fingerprint()}))
"""
SHARED = {"config.json", "preprocessor_config.json", "model.safetensors.index.json"}
TEXT = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}


@pytest.fixture
def hub(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "repository")
    (tmp_path / "repository" / "README.md").write_text("never needed")
    server = Hub(tmp_path / "repository")
    yield server
    server.close()


@pytest.fixture
def environment(hub, tmp_path):
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    quiet["LOOKONCE_CACHE_DIR"] = str(tmp_path / "digests")
    return keep | quiet | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


@pytest.fixture
def opened(environment):
    def run(needs, model="acme/model", revision="", url=None, command=()):
        place = {"HF_ENDPOINT": url} if url else {}
        command = [sys.executable, *(command or ("-c", OPEN, model, needs, revision))]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | place)

    return run


@pytest.fixture
def large(hub):
    """Name and size of a shard that holds the vision half alone, so long that it is written in several pieces."""
    checkpoint = open_checkpoint(str(hub.directory))
    file = min(set(checkpoint.files(Half.VISION)) - set(checkpoint.files(Half.LANGUAGE)))
    with open(file, "ab") as stream:
        stream.write(os.urandom(25 << 20))
    return file.name, file.stat().st_size


@pytest.mark.parametrize("half", list(Half))
def test_only_the_shards_of_the_half_are_downloaded_all_at_one_commit(hub, opened, sharded, half):
    needed = {file.name for file in open_checkpoint(str(sharded)).files(half)}
    assert 0 < len(needed) < 4
    done = opened(half.value)
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == needed | SHARED | (TEXT if half is Half.LANGUAGE else set())
    assert hub.revisions() == {hub.commit}
    seen = json.loads(done.stdout)
    assert (seen["name"], seen["identity"]) == ("acme/model", f"hub:acme/model@{hub.commit}")
    assert seen["halves"] == [half.value]
    assert set(seen["files"]) == needed


def test_planning_downloads_settings_only(hub, opened):
    done = opened("", command=("-m", "lookonce", "plan", "--model", "acme/model", "--gpus", "24"))
    assert done.returncode == 0, done.stderr
    assert "lookonce up --model acme/model --vision-device cuda:0" in done.stdout
    assert hub.fetched() == SHARED


def test_planning_refuses_what_the_index_shows_to_be_quantised(hub, opened):
    index = hub.directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.layers.0.mlp.up_proj.qweight": "model.safetensors"}}))
    done = opened("", command=("-m", "lookonce", "plan", "--model", "acme/model", "--gpus", "24"))
    assert done.returncode == 1 and "the weights are quantised by AWQ" in done.stderr


def test_planning_takes_quantised_tensors_by_their_names(hub, opened):
    index, config = (hub.directory / name for name in ("model.safetensors.index.json", "config.json"))
    places = json.loads(index.read_text())["weight_map"]
    for name in [name for name in places if name.endswith("_proj.weight") and "layers" in name]:
        shard = places.pop(name)
        places |= {name.removesuffix("weight") + ending: shard for ending in ("qweight", "qzeros", "scales")}
    index.write_text(json.dumps({"weight_map": places}))
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": stated}))
    done = opened("", command=("-m", "lookonce", "plan", "--model", "acme/model", "--gpus", "24"))
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == SHARED


OPEN_ADAPTER = """
import sys
from lookonce.models.checkpoint import Half
from lookonce.models.checkpoint.adapter import open_adapter
from lookonce.models.qwen2_vl.config import FAMILY
print(open_adapter(sys.argv[1], FAMILY).digest(Half.LANGUAGE))
"""


def test_an_adapter_of_the_hub(hub, opened):
    shutil.rmtree(hub.directory)
    adapter(hub.directory, {"model.layers.0.self_attn.q_proj": (64, 64)})
    here = open_adapter(str(hub.directory), FAMILY)
    done = opened("", command=("-c", OPEN_ADAPTER, "acme/model"))
    assert done.stdout.strip() == here.digest(Half.LANGUAGE), done.stderr
    assert hub.fetched() == {"adapter_config.json", "adapter_model.safetensors"}
    refused = opened("language")
    assert "acme/model is a LoRA adapter of Qwen/Qwen2-VL-2B-Instruct" in refused.stderr
    assert "--model Qwen/Qwen2-VL-2B-Instruct and this with --adapter acme/model" in refused.stderr


def test_both_halves_agree_and_a_second_start_and_an_offline_one_download_nothing(hub, opened):
    untold = json.loads(opened("language").stdout)
    assert (untold["weights"], untold["fingerprint"]) == (None, None)
    vision, language = (json.loads(opened(half.value, revision=hub.commit).stdout) for half in Half)
    assert vision["fingerprint"] == language["fingerprint"] is not None, "this host has opened the vision half since"
    assert json.loads(opened("", revision="main").stdout)["halves"] == ["language", "vision"]
    hub.requests.clear()
    assert json.loads(opened("vision", revision="main").stdout)["identity"] == vision["identity"]
    assert hub.fetched() == set()
    hub.close()
    offline = opened("vision", revision="main")
    assert json.loads(offline.stdout)["fingerprint"] == vision["fingerprint"]


def test_unreachable_with_nothing_or_only_the_other_half_cached(hub, opened):
    dead = "http://127.0.0.1:9"
    done = opened("vision", url=dead)
    assert done.returncode == 1
    assert "acme/model is not in the hub cache and the hub can't be reached" in done.stderr
    assert opened("vision").returncode == 0
    done = opened("language", url=dead)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "reached" in done.stderr


def test_a_cache_that_cannot_be_written_is_named(opened, tmp_path):
    (tmp_path / "hf").write_text("a file where a directory is needed")
    done = opened("vision")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the hub cache {tmp_path}/hf/hub can't be written (Not a directory)" in done.stderr


def test_unknown_gated_and_pickled_repositories(hub, opened):
    cases = [({"model": "acme/absent"}, "acme/absent was not found on the hub: check the spelling")]
    cases.append(({"revision": "v9"}, "acme/model has no revision 'v9' on the hub"))
    for arguments, message in cases:
        done = opened("vision", **arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    hub.gated = True
    done = opened("vision")
    assert done.returncode == 1 and "acme/model is gated: accept its terms" in done.stderr
    hub.gated, hub.commit = False, "beef" + "0" * 36  # a new commit: what a commit holds never changes
    for file in hub.directory.glob("*.safetensors*"):
        file.unlink()
    done = opened("vision")
    assert done.returncode == 1 and "only pickled weights" in done.stderr and "Traceback" not in done.stderr


def test_a_download_that_is_killed_in_mid_file_goes_on_where_it_ended(hub, environment, opened, large):
    name, size = large
    hub.stalls[name] = 22 << 20
    process = subprocess.Popen([sys.executable, "-c", OPEN, "acme/model", "vision", ""], env=environment)
    assert hub.stalled.wait(60)
    (partial,) = until(lambda: list(Path(environment["HF_HOME"]).rglob("blobs/*.incomplete")))
    kept = until(lambda: size_of(partial) >= 20 << 20 and size_of(partial))
    process.kill()
    process.wait()
    hub.stalls.clear()
    before = hub.sent[name]
    done = opened("vision")
    assert done.returncode == 0, done.stderr
    assert hub.sent[name] - before == size - kept
    stored = Path(environment["HF_HOME"]) / f"hub/models--acme--model/snapshots/{hub.commit}" / name
    assert stored.read_bytes() == (hub.directory / name).read_bytes()
    assert not partial.exists()
    again = hub.sent.copy()
    assert opened("vision").returncode == 0 and hub.sent == again


@pytest.mark.slow  # the hub library tries six times, a second apart
@pytest.mark.parametrize(("fault", "said"), [("stalls", "the download stalled"), ("cuts", "the connection to the hub")])
def test_a_download_that_stalls_or_breaks_off_ends_in_a_sentence_and_goes_on(
    hub, environment, opened, large, fault, said
):
    name, size = large
    getattr(hub, fault)[name] = 22 << 20
    done = opened("vision")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1] and "run it again" in done.stderr.splitlines()[-1]
    (partial,) = Path(environment["HF_HOME"]).rglob("blobs/*.incomplete")
    getattr(hub, fault).clear()
    before, kept = hub.sent[name], size_of(partial)
    assert kept >= 20 << 20
    assert opened("vision").returncode == 0
    assert hub.sent[name] - before == size - kept


def test_a_damaged_rest_of_an_earlier_download_is_found_out(hub, environment, opened, large):
    name, _ = large
    hub.tags[name] = hashlib.sha256((hub.directory / name).read_bytes()).hexdigest()
    blobs = Path(environment["HF_HOME"]) / "hub/models--acme--model/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.tags[name]}.incomplete").write_bytes(bytes(1 << 20))
    done = opened("vision")
    assert done.returncode == 1 and "was damaged, and is removed; run it again" in done.stderr
    assert opened("vision").returncode == 0


def test_a_snapshot_given_as_a_directory_is_the_hub_model(hub, environment, opened):
    by_id = json.loads(opened("").stdout)
    snapshot = Path(environment["HF_HOME"]) / f"hub/models--acme--model/snapshots/{hub.commit}"
    assert json.loads(opened("", model=str(snapshot)).stdout) == by_id
    link = Path(environment["HF_HOME"]) / "model"
    link.symlink_to(snapshot)
    assert json.loads(opened("vision", model=str(link)).stdout)["fingerprint"] == by_id["fingerprint"]
    # A file that was put there by hand is not the repository's.
    config = snapshot / "config.json"
    content = config.read_bytes()
    config.unlink()
    config.write_bytes(content + b"\n")
    other = json.loads(opened("", model=str(snapshot)).stdout)
    assert other["identity"].startswith("blake3:") and other["fingerprint"] == by_id["fingerprint"]


@pytest.fixture
def mixed(hub):
    """Name of the one file that holds both halves."""
    shutil.rmtree(hub.directory)
    make_random_checkpoint(hub.directory, size="small", vocab=40960)
    return "model.safetensors"


def test_of_a_file_that_holds_both_halves_one_half_alone_is_read(hub, environment, opened, mixed):
    whole = open_checkpoint(str(hub.directory))
    fingerprints = set()
    for half in Half:
        before = hub.sent[mixed]
        done = opened(half.value)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        fingerprints.add(seen["fingerprint"])
        assert (seen["halves"], seen["identity"]) == ([half.value], f"hub:acme/model@{hub.commit}")
        assert 0 <= hub.sent[mixed] - before - whole.weight_bytes(half) <= 200_000, "the half, and the header"
        part = open_checkpoint(seen["path"], needs=half)
        assert tensors(part, half) == tensors(whole, half)
    assert len(fingerprints) == 1
    hub.requests.clear()
    before = hub.sent[mixed]
    for half in Half:
        assert opened(half.value).returncode == 0
    assert hub.sent[mixed] == before, "a second start reads nothing"
    hub.close()
    assert opened("vision").returncode == 0


def test_a_half_whose_download_was_killed_goes_on_where_it_ended(hub, environment, opened, mixed):
    whole = open_checkpoint(str(hub.directory))
    last = max(entry.offset + entry.nbytes for entry in whole.half_entries(Half.LANGUAGE).values())
    hub.stalls[mixed] = last - (1 << 20)
    process = subprocess.Popen([sys.executable, "-c", OPEN, "acme/model", "language", ""], env=environment)
    assert hub.stalled.wait(60)
    (partial,) = until(lambda: list(Path(environment["HF_HOME"]).rglob("halves/*/*/*.incomplete")))
    until(lambda: size_of(partial) > 1 << 20)
    process.kill()
    process.wait()
    hub.stalls.clear()
    before, kept = hub.sent[mixed], size_of(partial)
    done = opened("language")
    assert done.returncode == 0, done.stderr
    assert hub.sent[mixed] - before <= whole.weight_bytes(Half.LANGUAGE) - kept + 400_000
    assert tensors(open_checkpoint(json.loads(done.stdout)["path"]), Half.LANGUAGE) == tensors(whole, Half.LANGUAGE)


def test_a_server_without_ranges_sends_the_file_whole(hub, opened, mixed):
    hub.ranges = False
    done = opened("vision")
    assert done.returncode == 0, done.stderr
    assert hub.sent[mixed] >= (hub.directory / mixed).stat().st_size
    assert json.loads(done.stdout)["halves"] == ["language", "vision"]


def tensors(checkpoint, half):
    """Dtype, shape and bytes of every tensor of a half."""
    found = {}
    for name, entry in checkpoint.half_entries(half).items():
        with open(entry.file, "rb") as stream:
            stream.seek(entry.offset)
            found[name] = (entry.dtype, entry.shape, stream.read(entry.nbytes))
    return found


def size_of(file):
    return file.stat().st_size


def until(look, seconds=60):
    """What `look` answers, once it answers something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
