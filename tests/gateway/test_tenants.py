"""Two tenants: a walk over every operation of the OpenAPI document with names of what is another's. An operation that
is new, or takes a new kind of name, fails here until it is told what to expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import httpx2
import pytest

from tests.gateway.batching import CHAT, begin, chat_line, ended, image_part, jsonl, results
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import ROOT

RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
KEYS = {"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"}
MADE_UP = {
    "image_id": "img_" + "a" * 52,
    "alias": "nobodys",
    "file_id": "file-" + "0" * 32,
    "batch_id": "batch_" + "0" * 32,
    "response_id": "resp_" + "0" * 32,
}
OF_NOBODY = {"model"}  # names in paths that belong to no tenant
TAKES_JSON = {  # how each operation that takes JSON names what is somebody's
    "/v1/images": lambda names: {},
    "/v1/images/{image_id}": lambda names: {"pinned": True},
    "/v1/images/{image_id}/questions": lambda names: {"questions": ["What?"], "max_tokens": 1},
    "/v1/chat/completions": lambda names: chat_line("", image_part(f"lookonce:{names['image_id']}"))["body"],
    "/v1/moderations": lambda names: {"input": [image_part(f"lookonce:{names['image_id']}")]},
    "/v1/batches": lambda names: {
        "input_file_id": names["file_id"],
        "endpoint": CHAT,
        "completion_window": "24h",
    },
    "/v1/responses": lambda names: {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": f"lookonce:{names['image_id']}"}]}],
        "max_output_tokens": 1,
    },
    "/v1/messages": lambda names: {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "file", "file_id": names["image_id"]}}],
            }
        ],
        "max_tokens": 1,
    },
    "/api/chat": lambda names: {
        "model": "lookonce",
        "messages": [{"role": "user", "content": "What?", "images": [f"lookonce:{names['image_id']}"]}],
        "options": {"num_predict": 1},
    },
    "/api/generate": lambda names: {
        "model": "lookonce",
        "prompt": "What?",
        "images": [f"lookonce:{names['image_id']}"],
        "options": {"num_predict": 1},
    },
    "/v1/systemone": lambda names: {"state": "names nobody", "questions": {"q": {"type": "noul"}}},
    "/v1/embeddings": lambda names: {"input": {"image": names["image_id"]}},
    "/v1/rerank": lambda names: {"query": {"image": names["image_id"]}, "documents": ["a"]},
    "/v1/images/search": lambda names: {"query": {"image": names["image_id"]}},
}
NO_MODEL = ("/v1/embeddings", "/v1/rerank", "/v1/images/search")
"""What this gateway has no model for: whoever's image it is. With one: tests/gateway/test_embeddings.py."""


@dataclass
class World:
    red: httpx2.Client
    blue: httpx2.Client
    document: dict[str, Any]
    owned: dict[str, list[str]]  # red's names by the parameter that takes them

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for path, methods in self.document["paths"].items():
            for method, operation in methods.items():
                yield path, method.upper(), operation

    def belongings(self) -> list[Any]:
        """All that red can see, as red sees it."""
        paths = ("/v1/images", "/v1/files", "/v1/batches", *(f"/v1/images/{name}" for name in self.owned["image_id"]))
        contents = [self.red.get(f"/v1/files/{file}/content").content for file in self.owned["file_id"]]
        made = [self.red.get(f"/v1/responses/{name}").json() for name in self.owned["response_id"]]
        return [*(self.red.get(path).json() for path in paths), *contents, *made]


@pytest.fixture(scope="module")
def world(
    services: Services, tmp_path_factory: pytest.TempPathFactory, image_file: Callable[..., bytes]
) -> Iterator[World]:
    policy = ROOT / "examples" / "policies" / "shapes.yaml"
    everything = ("--data-dir", str(tmp_path_factory.mktemp("data")), "--policy", str(policy))
    with ExitStack() as stack:
        gateway = stack.enter_context(GatewayProcess(*services.arguments(), *everything, env=KEYS))
        red, blue = (stack.enter_context(gateway.client(key)) for key in (RED, BLUE))
        image = red.post("/v1/images", files={"file": image_file()}, data={"alias": "ours", "pinned": "true"}).json()
        good, bad = chat_line("good", image_part("lookonce:ours")), chat_line("bad", colour="red")
        batch = ended(red, begin(red, jsonl(good, bad)))
        files = [batch[f"{kind}_file_id"] for kind in ("input", "output", "error")]
        assert all(files)
        made = red.post("/v1/responses", json={"input": "What?", "max_output_tokens": 1}).json()
        owned = {
            "response_id": [made["id"]],
            "image_id": [image["id"], "ours"],
            "alias": ["ours"],
            "file_id": files,
            "batch_id": [batch["id"]],
        }
        yield World(red, blue, red.get("/openapi.json").json(), owned)


SECRET = (
    "The code of the vault is four, seven, nine, one, and nobody but the three of us may ever come to know it. " * 3
)
OTHERS = ["Zebras and quaggas " * 18, "Perhaps it rains tomorrow. " * 12, "Nine men went to mow a meadow. " * 11]


def cached(reply: httpx2.Response) -> list[int]:
    """Reused prompt tokens of each answer, as usage and receipt say alike."""
    body = reply.json()
    assert reply.status_code == 200, body
    answers = body.get("answers") or [body]
    told = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    if "receipt" in body:
        assert told == [body["receipt"]["cached_tokens"]]
    return told


def chat(client: httpx2.Client, *texts: str) -> list[int]:
    """Ask the last of the texts, after one that is the system's, if there are two."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "system"), texts[::-1], strict=False)]
    messages.reverse()
    return cached(client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}))


def question(client: httpx2.Client, image: str, system: str) -> list[int]:
    """Of one that is scored, then of one that is answered in words."""
    asked = [{"text": "Is it red?", "choices": ["yes", "no"]}, "What colour is it?"]
    url = f"/v1/images/{image}/questions"
    replies = [client.post(url, json={"system": system, "questions": [item], "max_tokens": 2}) for item in asked]
    return [count for reply in replies for count in cached(reply)]


def upload(client: httpx2.Client, data: bytes) -> dict[str, Any]:
    reply = client.post("/v1/images", files={"file": data})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_no_count_tells_what_another_asked(world: World, image_file: Callable[..., bytes]) -> None:
    cold = [chat(world.blue, text) for text in OTHERS][-1]
    first = chat(world.red, SECRET)
    assert chat(world.red, SECRET) > first, "the same tenant finds its own"
    assert chat(world.blue, SECRET) == cold
    assert chat(world.blue, SECRET[:160]) > cold, "now it is blue's own, too"
    chat(world.red, "A system prompt: " + SECRET, "What is it?")
    cold = [chat(world.blue, text, "What is it?") for text in (OTHERS[1], OTHERS[0])][-1]
    assert chat(world.blue, "A system prompt: " + SECRET, "What is it?") == cold

    data = image_file()
    ours, theirs = upload(world.red, data), upload(world.blue, data)
    assert (ours["cached"], theirs["cached"]) == (False, False) and ours["id"] != theirs["id"]
    before = question(world.red, ours["id"], SECRET)
    assert sum(question(world.red, ours["id"], SECRET)) > sum(before)
    assert question(world.blue, theirs["id"], SECRET) == before


def test_what_tenants_share_is_told_apart(services: Services, image_file: Callable[..., bytes]) -> None:
    """Embeddings are one thing, what was asked about them is another."""
    for prefixes in (False, True):
        env = KEYS | {"LOOKONCE_GATEWAY_SHARE_EMBEDDINGS": "true", "LOOKONCE_GATEWAY_SHARE_PREFIXES": str(prefixes)}
        with (
            GatewayProcess(*services.arguments(), env=env) as gateway,
            gateway.client(RED) as red,
            gateway.client(BLUE) as blue,
        ):
            data, text = image_file(), f"{prefixes}: {SECRET}"
            ours, theirs = upload(red, data), upload(blue, data)
            assert (ours["cached"], theirs["cached"]) == (False, True)
            cold = [chat(blue, other) for other in OTHERS][-1]
            assert chat(red, text) < chat(red, text)
            assert (chat(blue, text) > cold) is prefixes
            before = question(red, ours["id"], text)
            assert (sum(question(blue, theirs["id"], text)) > sum(before)) is prefixes


def test_one_tenant_without_a_secret_loses_nothing(gateway: GatewayProcess) -> None:
    with gateway.client() as one, gateway.client() as other:
        first = chat(one, "Everybody: " + SECRET)
        assert chat(other, "Everybody: " + SECRET) > first


def names_in(place: str, operation: dict[str, Any]) -> list[str]:
    return [item["name"] for item in operation.get("parameters", ()) if item["in"] == place]


def test_no_path_leads_to_what_is_anothers(world: World) -> None:
    before = world.belongings()
    walked = 0
    for path, method, operation in world.operations():
        names = names_in("path", operation)
        assert set(names) <= world.owned.keys() | OF_NOBODY, f"{method} {path} takes a new kind of name"
        if not names or set(names) <= OF_NOBODY:
            continue
        for values in product(*(world.owned[name] for name in names)):
            mine = dict(zip(names, values, strict=True))
            replies = []
            for chosen in (mine, {name: MADE_UP[name] for name in names}):
                body = TAKES_JSON[path](MADE_UP) if method in ("POST", "PATCH") and path in TAKES_JSON else None
                replies.append(world.blue.request(method, path.format(**chosen), json=body))
            assert replies[0].status_code == replies[1].status_code == 404, (method, path, replies[0].text)
            assert replies[0].json() == replies[1].json(), (method, path)
            walked += 1
    assert walked >= 15
    assert world.belongings() == before


def test_no_list_and_no_page_shows_what_is_anothers(world: World) -> None:
    secrets = [name for names in world.owned.values() for name in names if name != "ours"]
    seen = 0
    for path, method, operation in world.operations():
        if method != "GET" or "{" in path:
            continue
        replies = [world.blue.get(path)]
        if "after" in names_in("query", operation):
            replies += [world.blue.get(path, params={"after": name}) for name in (*secrets, *MADE_UP.values())]
            assert len({(reply.status_code, reply.text) for reply in replies[1:]}) == 1, path
            assert replies[1].status_code in (400, 404)
            seen += 1
        for reply in replies:
            assert not any(secret in reply.text for secret in secrets), path
    assert seen >= 3


def test_no_body_uses_what_is_anothers(world: World) -> None:
    before = world.belongings()
    taking = {
        path
        for path, _, operation in world.operations()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert taking == TAKES_JSON.keys(), "an operation with a body that this test doesn't know"
    asking = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate")
    asking += ("/v1/moderations", "/v1/batches")
    for path in (*asking, *NO_MODEL):
        made_up = world.blue.post(path, json=TAKES_JSON[path](MADE_UP))
        assert made_up.status_code == (400 if path in NO_MODEL else 404), made_up.text
        for image, file in product(world.owned["image_id"], world.owned["file_id"]):
            reply = world.blue.post(path, json=TAKES_JSON[path]({"image_id": image, "file_id": file}))
            assert (reply.status_code, reply.json()) == (made_up.status_code, made_up.json()), path
    assert world.belongings() == before


def test_no_line_of_a_batch_uses_what_is_anothers(world: World) -> None:
    images = world.owned["image_id"]
    lines = [chat_line(image, image_part(f"lookonce:{image}")) for image in images]
    state = ended(world.blue, begin(world.blue, jsonl(*lines)))
    bad = results(world.blue, state, "error")
    assert {name: line["response"]["status_code"] for name, line in bad.items()} == dict.fromkeys(images, 404)
    asked = {"questions": ["What?"], "max_tokens": 1}
    lines = [
        {"custom_id": image, "method": "POST", "url": f"/v1/images/{image}/questions", "body": asked}
        for image in images
    ]
    state = ended(world.blue, begin(world.blue, jsonl(*lines), "/v1/images/{id}/questions"))
    bad = results(world.blue, state, "error")
    assert {name: line["response"]["status_code"] for name, line in bad.items()} == dict.fromkeys(images, 404)
