"""Images as a resource, through the public door."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

ImageFile = Callable[..., bytes]


def upload(http: httpx2.Client, data: bytes) -> dict:
    response = http.post("/v1/images", files={"file": ("../../etc/passwd", data, "image/png")})
    assert response.status_code == 200, response.text
    return response.json()


def test_upload_encodes_at_once_and_the_same_bytes_have_the_same_id(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    data, before = image_file(), services.encodes()
    first = upload(http, data)
    assert first["object"] == "image" and first["status"] == "ready"
    assert (first["width"], first["height"], first["bytes"]) == (84, 56, len(data))
    assert first["tokens"] == 6 and first["cached"] is False
    assert first["expires_at"] > first["created_at"]
    encoded = base64.b64encode(data).decode()
    for body in ({"data": encoded}, {"data": f"data:image/png;base64,{encoded}"}):
        again = http.post("/v1/images", json=body).json()
        assert again["id"] == first["id"] and again["cached"] is True
    assert services.encodes() == before + 1
    looked = http.get(f"/v1/images/{first['id']}").json()
    assert looked["tokens"] == 6 and looked["id"] == first["id"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "data", "invalid_value"),
        ({"data": "AAAA", "url": "https://example.com/a.png"}, "data", "invalid_value"),
        ({"url": "https://127.0.0.1/a.png"}, "url", "invalid_image_url"),
        ({"data": "not base64!"}, "data", "invalid_value"),
        ({"data": "QUJD\nRA=="}, "data", "invalid_value"),
        ({"data": "data:image/png,plain"}, "data", "invalid_value"),
        ({"data": base64.b64encode(b"no image at all").decode()}, "data", "invalid_image"),
        ({"data": "AAAA", "embedding": [1.0]}, "embedding", "unknown_parameter"),
    ],
)
def test_bad_uploads_name_the_field(http: httpx2.Client, body: dict, param: str, code: str) -> None:
    response = http.post("/v1/images", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_form_takes_one_field_called_file(http: httpx2.Client, image_file: ImageFile) -> None:
    assert http.post("/v1/images", files={"image": image_file()}).json()["error"]["param"] == "image"
    assert http.post("/v1/images", files={"file": b""}).json()["error"]["param"] == "file"
    wrong = http.post("/v1/images", content=b"x", headers={"content-type": "text/plain"})
    assert wrong.status_code == 415


def test_delete_erases_and_others_are_not_found(http: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    data = image_file()
    image = upload(http, data)
    http.post(f"/v1/images/{image['id']}/questions", json={"questions": ["what?"], "max_tokens": 2})
    erased = http.delete(f"/v1/images/{image['id']}")
    assert erased.json() == {"id": image["id"], "object": "image", "deleted": True, "complete": True}
    for response in (
        http.get(f"/v1/images/{image['id']}"),
        http.delete(f"/v1/images/{image['id']}"),
        http.post(f"/v1/images/{image['id']}/questions", json={"questions": ["still there?"]}),
        http.get("/v1/images/img_short"),
        http.get("/v1/images/img_" + "a" * 52),
    ):
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"
    before = services.encodes()
    assert upload(http, data)["cached"] is False
    assert services.encodes() == before + 1


def test_a_deletion_is_seen_by_another_gateway(services: Services, image_file: ImageFile, tmp_path: Path) -> None:
    arguments = [*services.arguments(), "--store", f"file://{tmp_path}"]
    with (
        GatewayProcess(*arguments) as one,
        GatewayProcess(*arguments) as two,
        one.client() as first,
        two.client() as second,
    ):
        identifier = upload(first, image_file())["id"]
        ask = {"questions": ["what is it?"], "max_tokens": 2}
        assert second.post(f"/v1/images/{identifier}/questions", json=ask).status_code == 200
        assert first.delete(f"/v1/images/{identifier}").json()["complete"] is True
        assert _eventually_missing(second, identifier)


def _eventually_missing(http: httpx2.Client, identifier: str) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if http.get(f"/v1/images/{identifier}").status_code == 404:
            return True
        time.sleep(0.1)
    return False
