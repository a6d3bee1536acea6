"""One whole system of real processes, over a tiny random checkpoint, and clients of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import lookonce
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.system.cluster import GatewayProcess, System, encoded

KEY = "a-key-of-tests-0123456789"


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model = make_random_checkpoint(tmp_path_factory.mktemp("client") / "tiny", size="tiny")
    with System(model, tmp_path_factory.mktemp("client-store")) as running:
        yield running


@pytest.fixture(scope="session")
def another_gateway(system: System) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts gateways over the same services."""
    started: list[GatewayProcess] = []

    def start(*args: str, env: dict[str, str] | None = None) -> GatewayProcess:
        vision, language = system.visions[0].address, system.languages[0].address
        started.append(GatewayProcess("--vision", vision, "--lm", language, *args, env=env))
        return started[-1]

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def url(system: System) -> str:
    return system.gateways[0].url


@pytest.fixture
def client(url: str) -> Iterator[lookonce.Client]:
    with lookonce.Client(url, timeout=60) as client:
        yield client


_serial = itertools.count(1)


@pytest.fixture(scope="session")
def new_image() -> Callable[..., Image.Image]:
    """Draws an image that no other test has."""

    def make(width: int = 84, height: int = 56) -> Image.Image:
        number = next(_serial)
        image = Image.new("RGB", (width, height), (number * 53 % 256, number * 101 % 256, number % 256))
        image.putpixel((number % width, number // width), (255, 255, 255))
        return image

    return make


@pytest.fixture
def file(new_image: Callable[..., Image.Image], tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(new_image()))
    return path
