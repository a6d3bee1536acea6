"""A stock vLLM server whose vision tower was never built answers from our store: `make test-vllm`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from lookonce_vllm.filler import Filler
from PIL import Image

from lookonce.core.record import EMBEDDING, TensorView, parse_record
from lookonce.core.rpc.client import VisionClient
from lookonce.core.sample_images import bundled_samples
from tests.processes import ServiceProcess
from tests.unsplit import Unsplit
from tests.valkey import ValkeyServer
from tests.vllm.stock import PYTHON, ROOT, StockServer, environment, transfer

pytestmark = pytest.mark.vllm


class System:
    """Valkey, a vision service and a stock vLLM server over one checkpoint."""

    def __init__(
        self, valkey: ValkeyServer, vision: ServiceProcess, server: StockServer, model: Path, shelf: Path
    ) -> None:
        self.valkey, self.vision, self.server, self.model, self.shelf = valkey, vision, server, model, shelf
        self.redis = redis.Redis(port=valkey.port)

        self.loop = asyncio.new_event_loop()
        self.filler = self.loop.run_until_complete(self._filler())

    async def _filler(self) -> Filler:
        return Filler(self.vision.address)

    def part(self, image: bytes) -> dict[str, Any]:
        """The message part that stands for the image, once it is in the store."""
        return self.loop.run_until_complete(self.filler.part(image))

    def close(self) -> None:
        self.loop.run_until_complete(self.filler.close())
        self.loop.close()

    def encodes(self) -> int:
        """How many images the vision service has encoded."""

        async def describe() -> int:
            client = VisionClient(self.vision.address)
            try:
                return int((await client.describe(timeout=30)).encodes)
            finally:
                await client.close()

        return self.loop.run_until_complete(describe())

    def stored(self, part: dict[str, Any]) -> tuple[str, bytes]:
        """The name and the value in Redis of the embedding that a part names."""
        name = f"lookonce:embeddings:{part['uuid']}"
        value = self.redis.get(name)
        assert isinstance(value, bytes)
        return name, value

    def rewrite(self, part: dict[str, Any], rows: np.ndarray[Any, Any]) -> None:
        """Store other rows under the part's key, in a record that is whole."""
        name, value = self.stored(part)
        record = parse_record(value, bytes.fromhex(part["uuid"]))
        view = TensorView("F32", rows.shape, memoryview(np.ascontiguousarray(rows, dtype="<f4")).cast("B"))
        self.redis.set(name, replace(record, tensors={EMBEDDING: view}).serialize())


def ask(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def drawn(seed: int, size: tuple[int, int] = (168, 112)) -> bytes:
    """A small image that no other test has."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model, shelf = ROOT / "lookonce/data/shapes", tmp_path_factory.mktemp("shelf")
    with ValkeyServer() as valkey:
        vision = ServiceProcess("vision_service", "--model", str(model), "--store", valkey.url)
        config = transfer(valkey.url, wait_s=1.0, shelf_bytes=1 << 20, shelf=str(shelf), vision=[vision.address])
        server = StockServer(model, tmp_path_factory.mktemp("vllm"), config)
        with vision, server:
            system = System(valkey, vision, server.wait_ready(), model, shelf)
            yield system
            system.close()


@pytest.fixture(scope="module")
def unsplit(system: System) -> Unsplit:
    return Unsplit(system.model)


def test_answers_are_those_of_the_whole_model_and_nothing_is_encoded_twice(system: System, unsplit: Unsplit) -> None:
    for sample in bundled_samples():
        image = Image.open(sample.path).convert("RGB")
        for question, _ in sample.questions[:3]:
            part = system.part(sample.path.read_bytes())
            expected = unsplit.answer([("user", [image, question])], 16)
            assert system.server.chat([part, ask(question)]) == expected, (sample.path.name, question)
    assert system.encodes() == len(bundled_samples())


def test_two_images_in_one_request(system: System, unsplit: Unsplit) -> None:
    paths = [sample.path for sample in bundled_samples()[:2]]
    images = [Image.open(path).convert("RGB") for path in paths]
    parts = [system.part(path.read_bytes()) for path in paths]
    text = "How many shapes are there?"
    assert system.server.chat([*parts, ask(text)]) == unsplit.answer([("user", [*images, text])], 16)


def test_what_is_wrong_ends_its_own_request_only(system: System) -> None:
    """Beside each of them a right one is answered as ever."""
    good, text = system.part(drawn(1)), ask("What is this?")
    expected = system.server.chat([good, text])
    width = parse_record(system.stored(good)[1], bytes.fromhex(good["uuid"])).tensors[EMBEDDING].shape[1]

    nan, narrow, short, damaged, foreign = (system.part(drawn(seed)) for seed in range(2, 7))
    tokens = parse_record(system.stored(nan)[1], bytes.fromhex(nan["uuid"])).tokens
    rows = np.ones((tokens, width), np.float32)
    rows[1, 1] = np.nan
    system.rewrite(nan, rows)
    system.rewrite(narrow, np.ones((tokens, width // 2), np.float32))
    short_grid = short | {"image_embeds": {"image_grid_thw": [1, 4, 4]}}
    name, value = system.stored(damaged)
    system.redis.set(name, value[:-1] + bytes([value[-1] ^ 1]))
    system.redis.set(system.stored(foreign)[0], system.stored(good)[1])

    wrong = {
        "missing": (good | {"uuid": "ab" * 32}, "the store has none"),
        "no key": (good | {"uuid": "hello"}, "must be an embedding key"),
        "not finite": (nan, "not all of its numbers are finite"),
        "width": (narrow, f"its rows have width {width // 2}, the model takes {width}"),
        "grid": (short_grid, "its grid and rows are"),
    }
    with ThreadPoolExecutor() as pool:
        for which, (part, reason) in wrong.items():
            beside = pool.submit(system.server.chat, [good, text])
            assert reason in system.server.refuses([part, text]), which
            assert beside.result() == expected, which
    for part in (damaged, foreign):  # dropped, and fetched from the vision service that made it
        assert system.server.chat([part, text])
        assert parse_record(system.stored(part)[1], bytes.fromhex(part["uuid"]))


def test_a_false_grid_does_not_spoil_the_prefix_of_others(system: System) -> None:
    """The KV of the image is there, so its rows are not needed: positions would be those of the false grid."""
    part, text = system.part(drawn(10, (224, 112))), ask("How many shapes are there?")
    expected = system.server.chat([part, text])
    t, h, w = part["image_embeds"]["image_grid_thw"]
    assert h != w
    turned = part | {"image_embeds": {"image_grid_thw": [t, w, h]}}
    assert "its grid and rows are" in system.server.refuses([turned, text])
    assert system.server.chat([part, text]) == expected


def test_rows_under_the_key_of_another_image_are_refused(system: System) -> None:
    """vLLM takes the uuid's word for it."""
    torch = pytest.importorskip("torch")
    part, text = system.part(drawn(11)), ask("What is this?")
    t, h, w = part["image_embeds"]["image_grid_thw"]
    file = io.BytesIO()
    torch.save(torch.zeros(t * h * w // 4, 128), file)
    grid = io.BytesIO()
    torch.save(torch.tensor([t, h, w]), grid)
    forged = {
        "image_embeds": base64.b64encode(file.getvalue()).decode(),
        "image_grid_thw": base64.b64encode(grid.getvalue()).decode(),
    }
    assert "only_references" in system.server.refuses([part | {"image_embeds": forged}, text])
    assert system.server.chat([part, text]) == Unsplit(system.model).answer(
        [("user", [Image.open(io.BytesIO(drawn(11))), "What is this?"])], 16
    )


def test_a_store_that_dies_costs_nothing_while_a_vision_service_lives(system: System) -> None:
    known, text = system.part(drawn(20)), ask("What is this?")
    expected = system.server.chat([known, text])
    unknown, other = system.part(drawn(21)), system.part(drawn(22))
    with system.vision.frozen():
        system.valkey.kill()
        assert system.server.chat([known, text]) == expected
    assert system.server.chat([unknown, text])
    system.valkey.start(system.valkey.port)
    assert system.server.chat([other, text])
    assert system.stored(other), "what a vision service had is in the store again"


def test_a_store_and_a_vision_service_that_are_gone(system: System) -> None:
    gone, text = system.part(drawn(30)), ask("What is this?")
    system.redis.delete(system.stored(gone)[0])
    system.vision.restart()
    assert "the store has none" in system.server.refuses([gone, text])
    assert system.server.chat([system.part(drawn(30)), text])


def test_more_images_than_the_shelf_holds(system: System) -> None:
    """1 MiB of shelf, 40 images at once: what is in use is not evicted, and the rest is bounded."""
    parts, text = [system.part(drawn(100 + number, (560, 560))) for number in range(40)], ask("What is this?")
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda part: system.server.chat([part, text], 4), parts))
        assert list(pool.map(lambda part: system.server.chat([part, text], 4), parts)) == first
    kept = [path.stat().st_size for path in system.shelf.glob("lookonce-vllm-*/*")]
    assert sum(kept) <= (1 << 20) + max(kept)


def test_the_server_holds_no_vision_weights(system: System, tmp_path: Path) -> None:
    """The names of all parameters, asked of the worker itself."""
    (tmp_path / "names.py").write_text("def names(model): return [name for name, _ in model.named_parameters()]\n")
    script = tmp_path / "parameters.py"
    script.write_text(
        "import json, sys\n"
        "from names import names\n"
        "from vllm import LLM\n"
        "if __name__ == '__main__':\n"
        "    print('NAMES', json.dumps(LLM(**json.loads(sys.argv[1])).apply_model(names)[0]))\n"
    )
    options = {
        "model": str(system.model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "ec_transfer_config": transfer(system.valkey.url),
    }
    env = environment() | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [PYTHON, script, json.dumps(options)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("NAMES ")), None)
    assert line is not None, done.stderr[-4000:]
    names = json.loads(line.removeprefix("NAMES "))
    assert names
    assert not [name for name in names if "visual" in name]


@pytest.mark.parametrize(
    ("config", "args", "reason"),
    [
        ({"ec_connector_extra_config": {"stor": "x"}}, [], "ec_connector_extra_config"),
        ({"ec_connector_extra_config": {"store": "htp://x"}}, [], "scheme 'htp' is not known"),
    ],
)
def test_a_wrong_configuration_ends_the_start_with_the_option_s_name(
    config: dict[str, Any], args: list[str], reason: str, tmp_path: Path
) -> None:
    server = StockServer(ROOT / "lookonce/data/shapes", tmp_path, transfer("redis://127.0.0.1:1") | config, *args)
    with server, pytest.raises(AssertionError, match="did not start"):
        server.wait_ready()
    assert reason in server.log
