"""docs/api.md: its commands run against a real gateway, all of them, and it speaks of every route."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.schemas.neutral import AnswerFields, PartFields, RequestFields
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.images import photograph, save
from tests.processes import ROOT, ServiceProcess

PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def with_vectors(services: Services, retriever: ServiceProcess) -> Iterator[GatewayProcess]:
    with GatewayProcess(*services.arguments(), "--embed-lm", retriever.address) as process:
        yield process


@pytest.fixture
def place(with_vectors: GatewayProcess, tmp_path: Path) -> dict:
    (tmp_path / "door.jpg").write_bytes(save(photograph("coffee", (112, 84)), "JPEG"))
    env = {**os.environ, "URL": with_vectors.url, "KEY": "none-0123456789abcdef", "no_proxy": "*"}
    return {"cwd": tmp_path, "env": {**env, "PYTHONPATH": str(ROOT)}}


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def test_curl_commands_run(place: dict) -> None:
    done = subprocess.run(["bash", "-e", "-c", blocks("sh")], **place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for sign in ('"aliases":["front-door","door"]', '"choices":{"yes":', "data: [DONE]", '"complete":true', "# HELP"):
        assert sign in done.stdout, sign


def test_python_samples_run(place: dict) -> None:
    upload = 'ai.post("/images", cast_to=object, body={"data": DATA, "alias": "front-door"})'
    alias = f'import base64\nDATA = base64.b64encode(open("door.jpg", "rb").read()).decode()\n{upload}\n'
    first, rest = re.split(r"(?<=api_key=key\)\n)(?=\n*image = )", blocks("python"), maxsplit=1)
    command = [sys.executable, "-c", first + alias + rest]
    done = subprocess.run(command, **place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "['front-door', 'door']" in done.stdout and done.stdout.count("True") >= 1


def test_every_operation_has_its_place(gateway: GatewayProcess) -> None:
    with gateway.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
    for path in paths:
        assert path.replace("{image_id}", "{id}") in PAGE, path


def test_every_field_that_asks_for_nothing_is_told() -> None:
    told = set(re.findall(r"`([a-z_]+)`", PAGE.partition("### Fields that ask for nothing")[2].partition("\n## ")[0]))
    fields = {*RequestFields.model_fields, *AnswerFields.model_fields, *PartFields.model_fields}
    assert told == fields
