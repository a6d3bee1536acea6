"""Cases of one operation at a time, made by schemathesis from the OpenAPI document and sent to a real gateway, some of
them with images, files and batches that are there."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
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

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
MOST_TOKENS = 4  # of an answer: this is no test of the model
SECONDS = 60.0  # a case that takes longer has failed
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LINE = {"method": "POST", "url": "/v1/chat/completions"}


class Sweep:
    """Cases against one gateway. What is sent follows from the document alone, what is known is made anew when a case
    has removed it: a case fails or passes whatever came before it."""

    def __init__(self, url: str, document: dict[str, Any], image_file: Callable[..., bytes]) -> None:
        self.url = url
        self._operations = {item.ok().label: item.ok() for item in _schema(document).get_all_operations()}
        self._image_file = image_file
        self._session = requests.Session()
        self._session.trust_env = False
        self._known: dict[str, str] = {}

    @property
    def labels(self) -> set[str]:
        """The operations: "POST /v1/images" ..."""
        return set(self._operations)

    def run(self, label: str, cases: int) -> int:
        """Send that many valid cases of one operation, and as many invalid ones, if it takes any input; how many."""
        operation = self._operations[label]
        takes_input = operation.body or operation.query or operation.path_parameters
        modes = MODES if operation.body or operation.query else MODES[:1]
        return sum(self._run(operation, mode, cases if takes_input else 1) for mode in modes)

    def _run(self, operation: Any, mode: GenerationMode, cases: int) -> int:
        checks = CHECKS + ([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])
        sent = 0

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
            nonlocal sent
            assume(_can_be_sent(case))
            _tame(case.body)
            _shorten(operation.path, case.body)
            if known:
                self._make_known(case, mode)
            sent += 1
            response = case.call(base_url=self.url, session=self._session, timeout=SECONDS)
            case.validate_response(response, checks=checks)
            if operation.method.upper() == "DELETE" and response.status_code == 200:
                self._known.clear()

        one()
        return sent

    def _make_known(self, case: Any, mode: GenerationMode) -> None:
        """Put in the place of made-up names and images ones that exist."""
        makers = {"image_id": self._image, "file_id": self._file, "batch_id": self._batch, "alias": self._alias}
        makers["response_id"] = self._response
        for name in makers.keys() & (case.path_parameters or {}).keys():
            case.path_parameters[name] = makers[name]()
        if mode is not GenerationMode.POSITIVE or not isinstance(case.body, dict):
            return
        if "data" in case.body:
            case.body = {**case.body, "data": base64.b64encode(self._image_file(28, 28)).decode(), "url": None}
        if "input_file_id" in case.body:
            case.body = {**case.body, "input_file_id": self._file()}

    def _image(self) -> str:
        return self._keep("image", "/v1/images", files={"file": self._image_file(28, 28)}, data={"alias": "known"})

    def _alias(self) -> str:
        self._image()
        return "known"

    def _file(self) -> str:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        line = json.dumps(_LINE | {"custom_id": "one", "body": body})
        return self._keep("file", "/v1/files", files={"file": ("in.jsonl", line)}, data={"purpose": "batch"})

    def _batch(self) -> str:
        wanted = {"input_file_id": self._file(), "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return self._keep("batch", "/v1/batches", json=wanted)

    def _response(self) -> str:
        return self._keep("response", "/v1/responses", json={"input": "Hi", "max_output_tokens": 1})

    def _keep(self, kind: str, path: str, **body: Any) -> str:
        if kind not in self._known:
            reply = self._session.post(self.url + path, timeout=SECONDS, **body)
            reply.raise_for_status()
            self._known[kind] = reply.json()["id"]
        return self._known[kind]


def _schema(document: dict[str, Any]) -> Any:
    return schemathesis.openapi.from_dict(document)


def _can_be_sent(case: Any) -> bool:
    """An empty list is no field of a form: what was to be an invalid one would arrive as none."""
    form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return not form or all(value not in ([], {}) for value in case.body.values())


def _tame(body: Any) -> None:
    """Bound the tokens of valid bodies; invalid values stay as they are."""
    if not isinstance(body, dict):
        return
    for name in (*_LENGTHS, "n"):
        if isinstance(body.get(name), int) and MOST_TOKENS < body[name] <= 1_000_000:  # beyond it is refused
            body[name] = MOST_TOKENS
    if isinstance(body.get("questions"), list):
        for item in body["questions"]:
            _tame(item)


def _shorten(path: str, body: Any) -> None:
    """Bound answers that a valid body leaves open; null is no bound either."""
    if not isinstance(body, dict):
        return
    if path.startswith("/api/"):
        if body.get("options") is None:
            body["options"] = {}
        if isinstance(body["options"], dict) and body["options"].get("num_predict", -1) in (None, -1, -2, 0):
            body["options"]["num_predict"] = MOST_TOKENS
    elif path == "/v1/responses" and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = MOST_TOKENS
    elif (
        path != "/v1/messages"
        and ("messages" in body or "questions" in body)
        and all(body.get(name) is None for name in _LENGTHS)
    ):
        body["max_tokens"] = MOST_TOKENS
