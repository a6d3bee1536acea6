"""Checkpoints and running services shared by the vision tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image
from skimage import data

from lookonce.core.rpc.client import VisionClient
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.processes import ServiceProcess
from vision_service.app import load, running
from vision_service.images import Decoder
from vision_service.settings import VisionSettings


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("vision") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def photographs():
    return [Image.fromarray(image) for image in (data.astronaut(), data.coffee(), data.chelsea())]


@pytest.fixture(scope="session")
def noise():
    """An image of random pixels of a size."""

    def make(width, height, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="module")
def service(checkpoint_path):
    with ServiceProcess("vision_service", "--model", str(checkpoint_path)) as process:
        yield process


@pytest.fixture
async def client(service):
    client = VisionClient(service.address)
    yield client
    await client.close()


@pytest.fixture
def decoding(monkeypatch) -> Iterator[threading.Event]:
    """Services in this process decode only while it is set, as it is at first."""
    allowed, decoded = threading.Event(), Decoder.decoded

    def wait_and_decode(self, data, use):
        allowed.wait()
        return decoded(self, data, use)

    monkeypatch.setattr(Decoder, "decoded", wait_and_decode)
    allowed.set()
    yield allowed
    allowed.set()


@asynccontextmanager
async def in_process(path, **fields):
    """A client of the service run in this process, over a real socket: a start without the seconds of imports."""
    settings = VisionSettings(model=str(path), listen="127.0.0.1:0", dtype="float32", **fields)
    async with running(settings, load(settings)) as server:
        client = VisionClient(server.address)
        try:
            yield client
        finally:
            await client.close()
            await server.grpc.stop(None)
