"""A prefix that is there before the first question, and one that text before the image keeps from being shared."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

ImageFile = Callable[..., bytes]
CHAT = "/v1/chat/completions"


def first_question(http: httpx2.Client, image: str) -> dict[str, Any]:
    body = {"questions": ["What is this?"], "max_tokens": 1}
    receipt: dict[str, Any] = http.post(f"/v1/images/{image}/questions", json=body).json()["answers"][0]["receipt"]
    return receipt


@pytest.mark.parametrize("form", ["form", "json"])
def test_an_upload_may_fill_the_prefix(
    http: httpx2.Client, services: Services, image_file: ImageFile, form: str
) -> None:
    before = services.encodes()
    cold = http.post("/v1/images", files={"file": image_file()}).json()
    assert "prefilled" not in cold and first_question(http, cold["id"])["prefix"] == "miss"
    data = image_file()
    if form == "form":
        filled = http.post("/v1/images", files={"file": data}, data={"prefill": "true"}).json()
    else:
        filled = http.post("/v1/images", json={"data": base64.b64encode(data).decode(), "prefill": True}).json()
    assert filled["prefilled"] is True
    receipt = first_question(http, filled["id"])
    assert (receipt["prefix"], receipt["embedding"]) == ("hit", "hit") and receipt["cached_tokens"] >= filled["tokens"]
    assert services.encodes() == before + 2
    wrong = http.post("/v1/images", files={"file": data}, data={"prefill": "perhaps"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "prefill"


def asked(http: httpx2.Client, image: str, text: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": f"lookonce:{image}"}
    messages = [{"role": "user", "content": [{"type": "text", "text": text}, part]}]
    answer = http.post(CHAT, json={"messages": messages, "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_text_before_the_image_is_told_and_may_be_laid_behind_it(http: httpx2.Client, image_file: ImageFile) -> None:
    image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    for text in ("What is this?", "And which colour is it?"):
        receipt = asked(http, image, text)["receipt"]
        assert receipt["text_first"] is True and receipt["prefix"] == "miss"
    asked(http, image, "What is this?", image_first=True)
    laid = asked(http, image, "And which colour is it?", image_first=True)
    assert laid["receipt"]["prefix"] == "hit" and "text_first" not in laid["receipt"]
    part = {"type": "image_url", "image_url": f"lookonce:{image}"}
    content = [part, {"type": "text", "text": "And which colour is it?"}]
    by_hand = http.post(CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 2}).json()
    assert by_hand["choices"] == laid["choices"] and "text_first" not in by_hand["receipt"]


def test_a_gateway_may_do_so_by_itself(services: Services, image_file: ImageFile) -> None:
    with GatewayProcess(*services.arguments(), "--image-first") as gateway, gateway.client() as http:
        image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
        asked(http, image, "What is this?")
        assert asked(http, image, "Which colour?")["receipt"]["prefix"] == "hit"
        assert asked(http, image, "Which colour?", image_first=False)["receipt"]["text_first"] is True
