"""One vision service, one language service and one gateway for each worker, over a tiny random checkpoint."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import openai
import pytest
from PIL import Image

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import common_pb2, language_pb2, language_pb2_grpc, vision_pb2, vision_pb2_grpc
from tests.gateway.processes import GatewayProcess
from tests.processes import ServiceProcess
from tests.retrievers import gme


@dataclass
class Services:
    """The two model services and the store they share."""

    vision: ServiceProcess
    language: ServiceProcess
    store: str

    def encodes(self) -> int:
        """Forwards of an image since the vision service started."""
        return self.describe_vision().encodes

    def describe_vision(self) -> vision_pb2.VisionDescription:
        with grpc.insecure_channel(self.vision.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            return vision_pb2_grpc.VisionEncoderStub(channel).Describe(common_pb2.DescribeRequest(), timeout=60)

    def describe_language(self) -> language_pb2.LanguageDescription:
        with grpc.insecure_channel(self.language.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            return language_pb2_grpc.LanguageModelStub(channel).Describe(common_pb2.DescribeRequest(), timeout=60)

    def arguments(self) -> list[str]:
        return ["--vision", self.vision.address, "--lm", self.language.address]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def services(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    store = f"file://{tmp_path_factory.mktemp('embeddings')}"
    common = ("--model", str(checkpoint), "--store", store, "--log-level", "debug")
    vision = ServiceProcess("vision_service", *common)
    language = ServiceProcess("lm_service", *common, "--vision", vision.address, "--max-running", "4")
    with vision, language:
        yield Services(vision, language, store)


@pytest.fixture(scope="session")
def embedding_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GME's layout over the same tower."""
    return gme(checkpoint, tmp_path_factory.mktemp("retrieval") / "gme", is_matryoshka=True)


@pytest.fixture(scope="session")
def retriever(services: Services, embedding_model: Path) -> Iterator[ServiceProcess]:
    """A language service that makes vectors, beside the one that writes text."""
    common = ("--model", str(embedding_model), "--store", services.store, "--vision", services.vision.address)
    with ServiceProcess("lm_service", *common) as language:
        yield language


@pytest.fixture(scope="session")
def gateway(services: Services) -> Iterator[GatewayProcess]:
    with GatewayProcess(*services.arguments()) as process:
        yield process


@pytest.fixture
def http(gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    with gateway.client() as client:
        yield client


@pytest.fixture(scope="session")
def client(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=180) as client:
        yield client


_serial = itertools.count(1)


@pytest.fixture(scope="session")
def image_file() -> Callable[..., bytes]:
    """Makes a PNG that no other test has."""

    def make(width: int = 84, height: int = 56) -> bytes:
        number = next(_serial)
        image = Image.new("RGB", (width, height), (number * 37 % 256, number * 91 % 256, number % 256))
        image.putpixel((number % width, number // width % height), (255, 255, 255))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    return make
