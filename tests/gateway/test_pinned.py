"""Pinned images outlive any number of others, and a full room for them says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

LOW = {"questions": ["What?"], "max_tokens": 1, "detail": "low"}


def upload(http: httpx2.Client, data: bytes, **fields: str) -> httpx2.Response:
    return http.post("/v1/images", files={"file": data}, data=fields)


def test_pinned_images_are_not_evicted_and_their_room_is_bounded(
    services: Services, tmp_path: Path, image_file: Callable[..., bytes]
) -> None:
    budgets = ("--store-bytes", "64KiB", "--pinned-bytes", "20KiB")  # a dozen entries of at least a page, and four
    arguments = (*services.arguments(), "--store", f"file://{tmp_path}", *budgets, "--low-detail-pixels", "3136")
    with GatewayProcess(*arguments) as gateway, gateway.client() as http:
        kept = [upload(http, image_file(), pinned="true", alias=f"kept-{number}").json()["id"] for number in range(3)]
        later = upload(http, image_file()).json()["id"]
        assert http.patch(f"/v1/images/{later}", json={"pinned": True}).json()["pinned"] is True
        passing = [upload(http, image_file()).json()["id"] for _ in range(20)]
        refused = upload(http, image_file(), pinned="true")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "pinned"
        refused = http.patch(f"/v1/images/{passing[-1]}", json={"pinned": True})
        assert refused.status_code == 400 and "no room for more pinned" in refused.json()["error"]["message"]
        assert http.get(f"/v1/images/{passing[-1]}").json()["pinned"] is False
    with GatewayProcess(*arguments) as gateway, gateway.client() as http:  # one that remembers nothing
        for name in ("kept-0", "kept-1", "kept-2", later):
            assert http.get(f"/v1/images/{name}").raise_for_status().json()["pinned"] is True
            answer = http.post(f"/v1/images/{name}/questions", json=LOW).raise_for_status().json()["answers"][0]
            assert answer["receipt"]["embedding"] == "miss", "encoded from the kept file"
        listed = [image["id"] for image in http.get("/v1/images?limit=100").json()["data"]]
        assert set(listed) > {*kept, later} and len(listed) < 24
        assert http.delete("/v1/images/kept-0").json()["deleted"]
        assert http.patch(f"/v1/images/{later}", json={"pinned": False}).json()["pinned"] is False
        for _ in range(2):
            assert upload(http, image_file(), pinned="true").status_code == 200
        assert http.get("/v1/images/kept-0").status_code == 404
