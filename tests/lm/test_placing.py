"""device_map: which layers go where, what does not fit, and a service whose layers lie on two (stand-in) devices."""

from __future__ import annotations

import math

import pytest
import torch

from lm_service.engine.packed import device_map
from lm_service.engine.packed.device_map import place, wanted
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.layer_split import layers_of, parse, spread
from lookonce.core.stores import open_store
from lookonce.models.checkpoint.headers import TensorEntry
from lookonce.models.registry import Half, family_of
from tests import standin
from tests.cli import published
from tests.images import photograph
from tests.lm.split import answer, asking, running, user

GIB = 1 << 30
CAT = photograph("chelsea", (225, 150))


@pytest.fixture
def gpus(monkeypatch):
    """Eight devices that are taken to be there."""
    monkeypatch.setattr(device_map, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def tensors(name: str) -> dict[str, TensorEntry]:
    """What the language half of a published size consists of, and no file."""
    config = published.config(name)
    family = family_of(config)
    shapes = family.tensor_shapes(config, Half.LANGUAGE, head=not family.tied_head(config))
    return {tensor: TensorEntry(None, tensor, "BF16", shape, 0, 0) for tensor, shape in shapes.items()}


def homes(name: str, device_map: str, free: dict[str, float]):
    return place(
        wanted("auto", device_map), tensors(name), torch.bfloat16, free=lambda device: int(free[str(device)] * GIB)
    )


def test_layers_go_where_most_room_is_left_for_their_kv(gpus):
    home = homes("72B", "cuda:0,cuda:1", {"cuda:0": 79, "cuda:1": 79})
    assert str(home) == "cuda:0=0-39,cuda:1=40-79"
    assert (
        home.of("model.embed_tokens.weight") == home.of("model.layers.39.mlp.up_proj.weight") == torch.device("cuda:0")
    )
    assert home.of("model.layers.40.input_layernorm.weight") == home.of("lm_head.weight") == torch.device("cuda:1")
    # A device with less room, be it that another service is on it, gets fewer; the last as many less as its head takes.
    assert str(homes("72B", "cuda:0,cuda:1", {"cuda:0": 60, "cuda:1": 95})) == "cuda:0=0-30,cuda:1=31-79"
    assert str(homes("7B", "cuda:1,cuda:0,cuda:3", {"cuda:0": 8, "cuda:1": 8, "cuda:3": 8})) == (
        "cuda:1=0-8,cuda:0=9-18,cuda:3=19-27"
    )


def test_auto_takes_all_gpus_and_the_cpu_where_there_is_none(gpus, monkeypatch):
    home = homes("72B", "auto", {f"cuda:{index}": 20 for index in range(8)})
    assert [str(device) for device in home.devices] == [f"cuda:{index}" for index in range(8)]
    counts = [len(part) for part in home.layers]
    assert sum(counts) == 80 and counts[0] < max(counts) and counts[-1] < max(counts), "embedding and head take room"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(device_map, "choose_device", lambda name: torch.device("cpu"))
    assert str(homes("72B", "auto", {"cpu": 512})) == "cpu"


def test_int8_layers_take_half_the_room(gpus):
    asked, free = wanted("auto", "cuda:0,cuda:1"), {"cuda:0": 40, "cuda:1": 40}
    with pytest.raises(LookonceError, match="more than its memory has free"):
        homes("72B", "cuda:0,cuda:1", free)
    home = place(asked, tensors("72B"), torch.bfloat16, "int8", free=lambda device: free[str(device)] * GIB)
    assert (
        str(home) == "cuda:0=0-39,cuda:1=40-79"
        and home.of_layers == [torch.device("cuda:0")] * 40 + [torch.device("cuda:1")] * 40
    )
    assert home.of_unquantized("model.layers.79.mlp.up_proj.weight") == torch.device("cpu")
    assert home.of_unquantized("lm_head.weight") == torch.device("cuda:1")


def test_layers_as_given(gpus):
    home = homes("2B", "cuda:0=0-4,cpu=5-27", {"cuda:0": 2, "cpu": 60})
    assert str(home) == "cuda:0=0-4,cpu=5-27"
    # A tied head is the embedding, and stays with it.
    assert home.of("model.embed_tokens.weight") == torch.device("cuda:0") and "lm_head.weight" not in tensors("2B")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cuda:0;cuda:1", "neither a device nor DEVICE=FIRST-LAST"),
        ("", "neither a device"),
        ("cuda,cuda:0", "cuda:0 is named twice"),
        ("cuda:0=0-39,cuda:1", "give every device its layers, or none"),
        ("cuda:0=0-39,cuda:1=41-79", "layer 40 must come next, not 41-79"),
        ("cuda:0=0-39,cuda:1=40-39", "layer 40 must come next"),
        ("cuda:0=0-39,cuda:1=40-99", "the model's layers are 0-79"),
        (",".join(f"cuda:{index}" for index in range(81)), "81 devices for 80 layers"),
        ("cuda:0,cuda:1", "42 of 80 layers on cuda:0 are 11.0 GiB more than its memory has free"),
        ("cuda:0=0-19,cuda:1=20-79", "60 of 80 layers on cuda:1"),
    ],
)
def test_what_cannot_be_is_said_with_the_settings_name(gpus, text, said):
    with pytest.raises(LookonceError) as caught:
        homes("72B", text, {f"cuda:{index}": 60 for index in range(81)} | {"cuda:1": 55})
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT and caught.value.param == "device_map"
    assert said in caught.value.message and f"device_map {text!r}" in caught.value.message


@pytest.mark.parametrize(
    ("device", "device_map", "said"),
    [
        ("auto", "cuda:0,cuda:1", "no usable CUDA GPU here"),
        ("auto", "toaster,cpu", "device 'toaster' is not one of"),
        ("cpu", "cpu,cuda:0", "device and device_map are both set"),
    ],
)
def test_devices_that_are_not_there(device, device_map, said):
    with pytest.raises(LookonceError, match=said) as caught:
        wanted(device, device_map)
    assert caught.value.param == "device_map"


@pytest.mark.parametrize(("rooms", "layers"), [([7, 7], 5), ([1, 10], 11), ([24, 80, 80], 28), ([-3, 5], 4)])
def test_no_other_spread_leaves_more_room_for_each_layer(rooms, layers):
    def least(counts):
        return min(room / count for room, count in zip(rooms, counts, strict=True))

    def splits(total, parts):
        if parts == 1:
            yield (total,)
            return
        for first in range(1, total - parts + 2):
            yield from ((first, *rest) for rest in splits(total - first, parts - 1))

    found = spread(rooms, layers)
    assert found[0].start == 0 and found[-1].stop == layers
    if min(rooms) > 0:
        best = max(map(least, splits(layers, len(rooms))))
        assert math.isclose(least(list(map(len, found))), best)
    assert layers_of("x", parse(",".join(f"cuda:{i}" for i in range(len(rooms)))), layers) is None


async def test_a_service_over_two_devices(checkpoint_path, unsplit, tower, tmp_path, monkeypatch):
    """From the setting to the answer: the unsplit model's, with an image, by way of both devices."""
    monkeypatch.setattr(device_map, "choose_device", lambda name: standin.device(int(name[-1])))
    url = f"file://{tmp_path}/store"
    reference, record = tower.record(CAT)
    store = open_store(url)
    await store.put(reference.key, record.serialize())
    await store.close()
    standin.COPIES.clear()
    settings = {"device": "auto", "device_map": "standin:0,standin:1", "kv_bytes": 8 << 20, "prefix_bytes": 8 << 20}
    async with running(checkpoint_path, tmp_path, store=url, **settings) as client:
        assert (await client.describe()).model.device == "standin:0=0-0,standin:1=1-1"
        reply = await answer(client, asking(user(reference, "What is this?")))
    assert reply.ids == unsplit.answer_ids([("user", [CAT, "What is this?"])], 8)
    assert standin.COPIES["standin:0", "standin:1"] > standin.COPIES["cpu", "standin:1"]
