"""The OpenAPI document: complete, its examples true, and every operation holds to it (schemathesis against a real
gateway: no 5xx, no status, media type or body that the document lacks, nothing accepted that it forbids)."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

Picture = Callable[..., bytes]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MOST_TOKENS = 4  # of an answer: this is no test of the model
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def strict(services: Services) -> Iterator[GatewayProcess]:
    """A gateway that fetches nothing from anywhere."""
    with GatewayProcess(*services.arguments(), "--fetch-urls", "off") as process:
        yield process


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
        assert name.endswith(("/healthz", "/readyz")) or {"429", "500"} <= set(operation["responses"]), name
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
                    assert events.pop() == "[DONE]" and events
                    one = validator(document, body["schema"]["x-event"])
                    assert all(one.is_valid(json.loads(event)) for event in events), name
    assert seen > 40


def test_streamed_events_are_what_the_schemas_say(
    document: dict[str, Any], strict: GatewayProcess, picture: Picture
) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True, "logprobs": True}
    ask = {"questions": ["What?", {"text": "Is it?", "choices": ["yes", "no"]}], "max_tokens": 2, "stream": True}
    with strict.client() as http:
        image = http.post("/v1/images", files={"file": picture()}).json()["id"]
        for path, template, body in (
            ("/v1/chat/completions", "/v1/chat/completions", chat | {"stream_options": {"include_usage": True}}),
            ("/v1/chat/completions", "/v1/chat/completions", chat),
            (f"/v1/images/{image}/questions", "/v1/images/{image_id}/questions", ask),
        ):
            schema = document["paths"][template]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
            one = validator(document, schema["x-event"])
            lines = http.post(path, json=body).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert events and lines[-2] == "data: [DONE]"
            for event in events:
                assert not [error.message for error in one.iter_errors(event)], event


class Sweep:
    """Cases of every operation against one gateway, some of them with an image that is there."""

    def __init__(self, url: str, document: dict[str, Any], picture: Picture) -> None:
        self.url = url
        self.schema = schemathesis.openapi.from_dict(document)
        self.picture = picture
        self.session = requests.Session()
        self.session.trust_env = False
        self.image = ""
        self.sent: Counter[str] = Counter()

    def run(self, cases: int) -> None:
        for result in self.schema.get_all_operations():
            operation = result.ok()
            takes_input = operation.body or operation.query or operation.path_parameters
            for mode in MODES if operation.body or operation.query else MODES[:1]:
                self._operation(operation, mode, cases if takes_input else 1)

    def _operation(self, operation: Any, mode: GenerationMode, cases: int) -> None:
        checks = CHECKS + ([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])

        @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        def one(case: Any, known: bool) -> None:
            _tame(case.body)
            if known:
                self._make_known(case, mode)
            self.sent[operation.label] += 1
            response = case.call(base_url=self.url, session=self.session, timeout=60)
            case.validate_response(response, checks=checks)
            if operation.label == "DELETE /v1/images/{image_id}" and response.status_code == 200:
                self.image = ""

        one()

    def _make_known(self, case: Any, mode: GenerationMode) -> None:
        """Put in the place of made-up names and pictures ones that exist."""
        if "image_id" in (case.path_parameters or {}):
            if not self.image:
                upload = self.session.post(f"{self.url}/v1/images", files={"file": self.picture(28, 28)}, timeout=60)
                self.image = upload.json()["id"]
            case.path_parameters["image_id"] = self.image
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "data" in case.body:
            case.body = {**case.body, "data": base64.b64encode(self.picture(28, 28)).decode(), "url": None}


def _tame(body: Any) -> None:
    """Bound the tokens of valid bodies; invalid values stay as they are."""
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(body.get(name), int) and MOST_TOKENS < body[name] <= 1_000_000:  # beyond it is refused
            body[name] = MOST_TOKENS
    if isinstance(body.get("questions"), list):
        for item in body["questions"]:
            _tame(item)
    if ("messages" in body or "questions" in body) and not ("max_tokens" in body or "max_completion_tokens" in body):
        body["max_tokens"] = MOST_TOKENS


def test_every_operation_holds_to_the_document(
    strict: GatewayProcess, document: dict[str, Any], picture: Picture
) -> None:
    sweep = Sweep(strict.url, document, picture)
    sweep.run(cases=12)
    assert set(sweep.sent) == {name for name, _ in operations(document)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_operation_holds_to_the_document_in_many_cases(
    strict: GatewayProcess, document: dict[str, Any], picture: Picture
) -> None:
    sweep = Sweep(strict.url, document, picture)
    sweep.run(cases=500)
    for name, operation in operations(document):
        if "requestBody" in operation:
            assert sweep.sent[name] >= 500, sweep.sent
