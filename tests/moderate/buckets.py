"""Servers that speak S3's and Google Cloud Storage's JSON API, each a process of its own on this machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from types import TracebackType

import httpx2

from tests.ports import free_port

START_SECONDS = 120.0
BUCKET = "images"


class BucketServer(ABC):
    """A server with one bucket; `env` leads the product to it. A context manager."""

    scheme: str
    env: dict[str, str]
    _command: tuple[str, ...]

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._home = tempfile.TemporaryDirectory(prefix="lookonce-test-")
        self.env = {"HOME": self._home.name}
        command = [part.format(port=self.port) for part in self._command]
        self._log = tempfile.NamedTemporaryFile(prefix="lookonce-test-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen([sys.executable, "-m", *command], stdout=self._log, stderr=self._log)
        self.client = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def at(self, name: str) -> str:
        """The URL of an object or prefix."""
        return f"{self.scheme}://{BUCKET}/{name}"

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Make an object."""

    @abstractmethod
    def make_bucket(self) -> None:
        """Make BUCKET."""

    def __enter__(self) -> BucketServer:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.make_bucket()
            except httpx2.TransportError:
                assert self._process.poll() is None and time.monotonic() < deadline, self._command
                time.sleep(0.05)
            else:
                return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.client.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._home.cleanup()


class S3(BucketServer):
    """Moto's."""

    scheme = "s3"
    _command = ("moto.server", "-H", "127.0.0.1", "-p", "{port}")

    def __init__(self) -> None:
        super().__init__()
        self.env |= {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> None:
        self.client.put(f"/{BUCKET}").raise_for_status()

    def put(self, name: str, data: bytes) -> None:
        self.client.put(f"/{BUCKET}/{name}", content=data, headers={"x-amz-acl": "public-read"}).raise_for_status()

    def accept_anybody(self, anybody: bool) -> None:
        """Whether keys are looked at: there are none that would be accepted."""
        count = b"inf" if anybody else b"0"
        reply = self.client.post("/moto-api/reset-auth", content=count, headers={"content-type": "text/plain"})
        reply.raise_for_status()


class Gcs(BucketServer):
    """gcp-storage-emulator."""

    scheme = "gs"
    _command = ("gcp_storage_emulator", "start", "-H", "127.0.0.1", "--port", "{port}", "--in-memory", "--quiet")

    def __init__(self) -> None:
        super().__init__()
        self.env |= {"STORAGE_EMULATOR_HOST": self.url}

    def make_bucket(self) -> None:
        self.client.post("/storage/v1/b", json={"name": BUCKET}).raise_for_status()

    def put(self, name: str, data: bytes) -> None:
        where = f"/upload/storage/v1/b/{BUCKET}/o"
        self.client.post(where, params={"uploadType": "media", "name": name}, content=data).raise_for_status()
