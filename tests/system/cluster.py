"""Whole systems of real processes for tests: any number of each service on one store, spoken to over REST."""

from __future__ import annotations

import base64
import io
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx2
from PIL import Image

from protos.lookonce.v1 import common_pb2, vision_pb2_grpc
from tests.ports import free_port
from tests.processes import START_SECONDS, Process, ServiceProcess


class GatewayProcess(Process):
    """`python -m gateway` on a free port, which it keeps; ready when all behind it is."""

    def __init__(self, *args: str, host: str = "127.0.0.1", **how: Any) -> None:
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        super().__init__("gateway", "--host", host, "--port", str(self.port), *args, **how)
        self.process = self._spawn()

    def ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=10, verify=False).status_code == 200
        except httpx2.TransportError:
            return False


class System:
    """`visions` vision services, `languages` language services and `gateways` gateways on one checkpoint and store."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        visions: int = 1,
        languages: int = 1,
        gateways: int = 1,
        store: str | None = None,
        vision_args: tuple[str, ...] = (),
        language_args: tuple[str, ...] = (),
        language_python: str = sys.executable,  # of another environment
        language_model: Path | None = None,  # a half; None: the whole checkpoint
        gateway_args: tuple[str, ...] = (),
        key: str | None = None,  # an API key, where the gateways' arguments say that they want one
    ) -> None:
        self.store = store = store or f"file://{folder}/store"
        common = ("--model", str(model), "--store", store, "--device", "cpu", "--dtype", "float32")
        self._stack = ExitStack()
        self.visions = [self._own(ServiceProcess("vision_service", *common, *vision_args)) for _ in range(visions)]
        seen = ",".join(one.address for one in self.visions)
        args = ("--model", str(language_model or model), *common[2:], "--vision", seen, *language_args)
        self.languages = [
            self._own(ServiceProcess("lm_service", *args, python=language_python)) for _ in range(languages)
        ]
        for service in (*self.visions, *self.languages):
            service.wait_ready()
        heard = ",".join(one.address for one in self.languages)
        args = ("--vision", seen, "--lm", heard, "--store", store, *gateway_args)
        self.gateways = [self._own(GatewayProcess(*args)) for _ in range(gateways)]
        for gateway in self.gateways:
            gateway.wait_ready()
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.http = httpx2.Client(base_url=self.gateways[0].url, timeout=120, headers=headers)
        self._stack.callback(self.http.close)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def _own(self, process: Any) -> Any:
        self._stack.callback(process.close)
        return process

    def upload(self, data: bytes) -> dict[str, Any]:
        """POST /v1/images; the image object."""
        reply = self.http.post("/v1/images", files={"file": ("image", data)})
        assert reply.status_code in (200, 201), reply.text
        return reply.json()

    def ask(self, image: str, questions: list[Any], **options: Any) -> list[dict[str, Any]]:
        """POST /v1/images/{id}/questions; the answers."""
        reply = self.http.post(f"/v1/images/{image}/questions", json={"questions": questions, **options})
        assert reply.status_code == 200, reply.text
        return reply.json()["answers"]

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """POST /v1/chat/completions; the completion."""
        body = {"model": self.model, "messages": messages, "temperature": 0, **options}
        reply = self.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def wait_whole(self, seconds: float = START_SECONDS) -> None:
        """Return once the gateway sees every service serving; it notices a restarted one within seconds."""
        deadline = time.monotonic() + seconds
        while (state := self.http.get("/readyz").json())["status"] != "ready":
            assert time.monotonic() < deadline, state
            time.sleep(0.1)

    def encodes(self) -> int:
        """Forwards of an image, over the vision services, since each started."""
        return sum(self.describe(vision).encodes for vision in self.visions)

    @staticmethod
    def describe(vision: ServiceProcess) -> Any:
        """Describe of one vision service."""
        with grpc.insecure_channel(vision.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            return vision_pb2_grpc.VisionEncoderStub(channel).Describe(common_pb2.DescribeRequest(), timeout=60)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> System:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            for process in (*self.visions, *self.languages, *self.gateways):
                tail = process.log.splitlines()[-30:]
                print(f"--- {getattr(process, 'module', 'gateway')}", *tail, sep="\n")
        self.close()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """The bytes as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    """An OpenAI image part."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """An OpenAI text part."""
    return {"type": "text", "text": text}
