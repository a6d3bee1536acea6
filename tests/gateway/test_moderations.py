"""Moderations: the policy file, OpenAI's shape, scores that are probabilities, one Score call for each input."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from gateway.schemas.responses import ModerationObject
from lookonce.core.process import PERMANENT_EXIT
from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL, GatewayProcess
from tests.processes import ROOT

ImageFile = Callable[..., bytes]
POLICY = """
system: You check images and texts.
rules:
  - id: star
    question: "Does this {input} contain a star? Answer yes or no."
    threshold: 0.000001
    severity: low
    follow_up: What is shown?
    follow_up_tokens: 4
  - id: how-many
    question: How many people are there?
    choices: [none, one, many]
    positive: [one, many]
    threshold: 1.0
    severity: critical
    applies_to: [image]
  - id: rude
    question: Is this text rude?
    threshold: 1.0
    applies_to: [text]
  - id: poster
    question: Is this a poster?
    applies_to: [image]
    image_size: {min_width: 2000}
"""


@pytest.fixture(scope="module")
def judge(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(POLICY)
    with GatewayProcess(*services.arguments(), "--policy", str(path), "--fetch-urls", "off") as process:
        yield process


@pytest.fixture
def judged(judge: GatewayProcess) -> Iterator[httpx2.Client]:
    with judge.client() as client:
        yield client


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_openais_client_works_unchanged(judge: GatewayProcess, image_file: ImageFile) -> None:
    with openai.OpenAI(base_url=f"{judge.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        text = client.moderations.create(input="A star.")
        parts = client.moderations.create(
            model="omni-moderation-latest",
            input=[
                {"type": "text", "text": "A star."},
                {"type": "image_url", "image_url": {"url": data_url(image_file())}},
            ],
        )
        several = client.moderations.create(input=["A star.", "No star."])
    assert len(text.results) == len(parts.results) == 1 and len(several.results) == 2
    assert text.id.startswith("modr-") and text.model == MODEL and text.results[0].flagged is True
    scores = parts.results[0].category_scores.model_dump(exclude_unset=True)
    assert set(scores) == {"star", "how-many", "rude", "poster"} and scores.pop("poster") == 0  # it is too small
    assert all(0 < score < 1 for score in scores.values())
    types = parts.results[0].category_applied_input_types.model_dump(exclude_unset=True)
    assert types == {"star": ["image", "text"], "how-many": ["image"], "rude": ["text"], "poster": []}


def test_scores_are_the_probabilities_that_questions_get(judged: httpx2.Client, image_file: ImageFile) -> None:
    image = judged.post("/v1/images", files={"file": image_file()}).json()["id"]
    part = {"type": "image_url", "image_url": {"url": f"lookonce:{image}"}}
    answer = judged.post("/v1/moderations", json={"input": [part]}).json()
    ModerationObject.model_validate(answer)
    (result,) = answer["results"]
    questions = [
        {"text": "Does this image contain a star? Answer yes or no.", "choices": ["yes", "no"]},
        {"text": "How many people are there?", "choices": ["none", "one", "many"]},
    ]
    body = {"questions": questions, "system": "You check images and texts."}
    star, many = judged.post(f"/v1/images/{image}/questions", json=body).json()["answers"]
    assert result["category_scores"]["star"] == pytest.approx(star["choices"]["yes"], rel=1e-3)
    assert result["category_scores"]["how-many"] == pytest.approx(1 - many["choices"]["none"], rel=1e-3)
    assert result["category_scores"]["rude"] == 0 and result["category_applied_input_types"]["rude"] == []
    assert result["categories"] == {"star": True, "how-many": False, "rude": False, "poster": False}
    assert result["follow_ups"].keys() == {"star"} and len(result["follow_ups"]["star"]) == 1
    assert result["flagged"] is True and result["severity"] == "low"
    assert result["receipt"]["embedding"] == "hit"


def test_the_highest_score_of_the_parts_counts(judged: httpx2.Client) -> None:
    texts = ["A quiet afternoon.", "Nine stars and a moon."]
    single = [
        judged.post("/v1/moderations", json={"input": text}).json()["results"][0]["category_scores"]["star"]
        for text in texts
    ]
    together = judged.post("/v1/moderations", json={"input": [{"type": "text", "text": text} for text in texts]}).json()
    assert single[0] != single[1]
    assert together["results"][0]["category_scores"]["star"] == pytest.approx(max(single), rel=1e-3)


def test_a_new_image_is_encoded_once_at_the_size_of_the_policy(
    services: Services, image_file: ImageFile, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"max_pixels: 12544\n{POLICY}")
    with GatewayProcess(*services.arguments(), "--policy", str(path)) as process, process.client() as http:
        files = [image_file(336, 224), image_file(56, 56)]
        body = {"input": [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]}
        before = services.encodes()
        first, again = (http.post("/v1/moderations", json=body).json()["results"][0] for _ in range(2))
        assert services.encodes() == before + len(files)
        assert (first["receipt"]["embedding"], again["receipt"]["embedding"]) == ("miss", "hit")
        assert again["category_scores"] == first["category_scores"]
        (large,) = (image for image in http.get("/v1/images").json()["data"] if image["width"] == 336)
        assert large["tokens"] <= 12544 // 28**2  # of 96
        body["input"][0]["min_pixels"] = 20_000
        error = http.post("/v1/moderations", json=body).json()["error"]
        assert error["param"] == "input.0.min_pixels" and "12544" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "input", "'input' is required"),
        ({"input": ""}, "input", "at least 1 characters"),
        ({"input": []}, "input", "at least 1 items"),
        ({"input": "a", "categories": []}, "categories", "unknown field 'categories'"),
        ({"input": ["a", 3]}, "input.1", "must be a string"),
        ({"input": [{"type": "audio"}]}, "input.0.type", "must be 'text' or 'image_url'"),
        ({"input": [{"type": "text", "text": "a", "x": 1}]}, "input.0.x", "unknown field"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            "input.0.image_url.url",
            "must be an https:",
        ),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
            "input.0.image_url.url",
            "switched off",
        ),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
            "input.0.image_url.url",
            "",
        ),
    ],
)
def test_bad_requests_name_the_field(judged: httpx2.Client, body: dict, param: str, text: str) -> None:
    response = judged.post("/v1/moderations", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param and text in response.json()["error"]["message"]


def test_another_model_is_not_found(judged: httpx2.Client) -> None:
    response = judged.post("/v1/moderations", json={"input": "a", "model": "gpt-9"})
    assert response.status_code == 404 and response.json()["error"]["param"] == "model"


def test_without_a_policy_it_says_how_to_get_one(http: httpx2.Client) -> None:
    response = http.post("/v1/moderations", json={"input": "a"})
    assert response.status_code == 400 and "--policy" in response.json()["error"]["message"]


def test_a_bad_policy_ends_the_start(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("categories:\n- id: a\n")
    command = [sys.executable, "-m", "gateway", "--port", "0", *services.arguments(), "--policy", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == PERMANENT_EXIT
    assert f"gateway: error: the policy file {path}, line 2: 'categories.0.question' is required" in done.stderr
