"""The OpenAPI document: complete, its examples true, and every operation holds to it (schemathesis against a real
gateway: no 5xx, no status, media type or body that the document lacks, nothing accepted that it forbids)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.gateway.sweep import Sweep
from tests.processes import ROOT, ServiceProcess

ImageFile = Callable[..., bytes]
POLICY = ROOT / "examples" / "policies" / "shapes.yaml"
WITH_BODIES = (
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "POST /v1/systemone",
    "POST /v1/messages",
    "POST /api/chat",
    "POST /api/generate",
    "POST /v1/images/{image_id}/questions",
    "POST /v1/moderations",
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v1/images/search",
    "POST /v1/images",
    "PATCH /v1/images/{image_id}",
    "POST /v1/files",
    "POST /v1/batches",
)
OPERATIONS = (
    *WITH_BODIES,
    "GET /v1/images",
    "GET /v1/images/{image_id}",
    "DELETE /v1/images/{image_id}",
    "DELETE /v1/images/{image_id}/aliases/{alias}",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "GET /api/tags",
    "GET /v1/files",
    "GET /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "DELETE /v1/files/{file_id}",
    "GET /v1/batches",
    "GET /v1/batches/{batch_id}",
    "POST /v1/batches/{batch_id}/cancel",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /healthz",
    "GET /readyz",
    "GET /health",
    "GET /version",
    "GET /metrics",
)


@pytest.fixture(scope="module")
def strict(
    services: Services, retriever: ServiceProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway with everything switched on that fetches nothing from anywhere."""
    everything = (
        "--embed-lm",
        retriever.address,
        "--data-dir",
        str(tmp_path_factory.mktemp("data")),
        "--policy",
        str(POLICY),
    )
    with GatewayProcess(*services.arguments(), "--fetch-urls", "off", *everything) as process:
        yield process


@pytest.fixture(scope="module")
def sweep(strict: GatewayProcess, document: dict[str, Any], image_file: ImageFile) -> Sweep:
    return Sweep(strict.url, document, image_file)


@pytest.fixture(scope="module")
def document(strict: GatewayProcess) -> dict[str, Any]:
    with strict.client() as http:
        return http.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def resolve(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    for step in value["$ref"].split("/")[1:] if "$ref" in value else ():
        document = document[step]
    return document if "$ref" in value else value


def media(document: dict[str, Any], operation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """All bodies of an operation: whose, their media type, schema and examples."""
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield "request", kind, body
    for status, response in operation["responses"].items():
        for kind, body in resolve(document, response)["content"].items():
            yield status, kind, body


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})


def test_every_operation_is_described_with_schemas_errors_and_examples(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert {"uploadImage", "listImages", "askQuestions", "createChatCompletion", "getModel"} <= set(names)
    for name, operation in operations(document):
        assert operation["summary"] and operation["description"] and operation["tags"], name
        assert any(int(status) < 300 for status in operation["responses"]), name
        assert name.endswith(("/healthz", "/readyz", "/health")) or {"429", "500"} <= set(operation["responses"]), name
        for place, kind, body in media(document, operation):
            assert body.get("schema"), (name, place, kind)
            binary = kind in ("multipart/form-data", "application/octet-stream")
            assert binary or "example" in body or body.get("examples"), (name, place, kind)


def test_examples_are_what_the_schemas_say(document: dict[str, Any]) -> None:
    seen = 0
    for name, operation in operations(document):
        for place, kind, body in media(document, operation):
            check = validator(document, body["schema"])
            named = [example["value"] for example in body.get("examples", {}).values()]
            for example in [*named, *([body["example"]] if "example" in body else [])]:
                errors = [error.message for error in check.iter_errors(example)]
                assert not errors, (name, place, kind, errors)
                seen += 1
                if kind == "text/event-stream":
                    events = [line[6:] for line in example.splitlines() if line.startswith("data: ")]
                    assert (name.endswith(("/responses", "/messages")) or events.pop() == "[DONE]") and events
                    one = validator(document, body["schema"]["x-event"])
                    assert all(one.is_valid(json.loads(event)) for event in events), name
    assert seen > 40


def test_streamed_events_are_what_the_schemas_say(
    document: dict[str, Any], strict: GatewayProcess, image_file: ImageFile
) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True, "logprobs": True}
    ask = {"questions": ["What?", {"text": "Is it?", "choices": ["yes", "no"]}], "max_tokens": 2, "stream": True}
    with strict.client() as http:
        image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
        for path, template, body in (
            ("/v1/chat/completions", "/v1/chat/completions", chat | {"stream_options": {"include_usage": True}}),
            ("/v1/chat/completions", "/v1/chat/completions", chat),
            (
                "/v1/chat/completions",
                "/v1/chat/completions",
                chat | {"stream_options": {"continuous_usage_stats": True}},
            ),
            (f"/v1/images/{image}/questions", "/v1/images/{image_id}/questions", ask),
        ):
            schema = document["paths"][template]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
            one = validator(document, schema["x-event"])
            lines = http.post(path, json=body).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert events and lines[-2] == "data: [DONE]"
            for event in events:
                assert not [error.message for error in one.iter_errors(event)], event


def test_every_operation_holds_to_the_document(sweep: Sweep) -> None:
    assert sweep.labels == set(OPERATIONS)
    for label in OPERATIONS:
        assert sweep.run(label, cases=8)


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation_holds_to_the_document_in_many_cases(sweep: Sweep, label: str) -> None:
    sent = sweep.run(label, cases=500)
    assert sent >= 500 or label not in WITH_BODIES
