"""Batches as tests make them: lines, files, and waiting for what becomes of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx2

from gateway.schemas.batch_bodies import BatchObject
from tests.processes import START_SECONDS

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(name: str, *content: Any, url: str = CHAT, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(content) or "Say it."}]
    body = {"messages": messages, "max_tokens": 3, "temperature": 0, **options}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def jsonl(*lines: Any) -> bytes:
    return b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"


def begin(http: httpx2.Client, data: bytes, endpoint: str = CHAT) -> str:
    file = http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": endpoint, "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body)
    assert batch.status_code == 200, batch.text
    return str(batch.json()["id"])


def until(
    http: httpx2.Client, batch: str, done: Callable[[dict[str, Any]], bool], seconds: float = START_SECONDS
) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = http.get(f"/v1/batches/{batch}").json()
        if done(state):
            return state
        time.sleep(0.05)
    raise AssertionError(f"the batch is still {state}")


def ended(http: httpx2.Client, batch: str) -> Any:
    state = until(http, batch, lambda state: state["status"] in ENDED)
    BatchObject.model_validate(state)
    return state


def results(http: httpx2.Client, state: dict[str, Any], which: str) -> dict[str, Any]:
    """Lines of the output or error file by custom_id; no id may be there twice."""
    if state[f"{which}_file_id"] is None:
        return {}
    text = http.get(f"/v1/files/{state[f'{which}_file_id']}/content").text
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found
