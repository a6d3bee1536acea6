"""Values under the wrong key, cut, changed, of another kind or tenant, in every store: never a wrong answer, and all is
whole again once it was asked for."""

from __future__ import annotations

import re
import time

import httpx2
import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import photograph, save
from tests.system.cluster import System
from tests.system.stored_values import DAMAGES, EmbeddedValues, RedisValues, kind
from tests.valkey import PATIENT, ValkeyServer

KEYS = {"red": "red-key-of-32-characters-0123456", "blue": "blue-key-of-32-characters-012345"}
NO_MEMORY = ("--l1-bytes", "1", "--prefix-bytes", "50KiB")
"""Of the language service: one prefix at most, so that questions about another image read the store."""
IMAGES = {"red": 4, "blue": 2}
QUESTION = {"questions": [{"text": "What is it?", "choices": ["a cat", "a cup", "a car"]}]}


@pytest.fixture(scope="module", params=["redis", pytest.param("embedded", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    """A running system, and the values that it has stored."""
    folder = tmp_path_factory.mktemp("wrong")
    model = make_random_checkpoint(folder / "model", max_pixels=60 * 28 * 28)
    keys = folder / "keys"
    keys.write_text("".join(f"{tenant}={key}\n" for tenant, key in KEYS.items()))
    keys.chmod(0o600)
    options = {
        "gateway_args": ("--api-keys-file", str(keys), "--secret", "a secret of the gateways, long enough"),
        "language_args": NO_MEMORY,
    }
    with ValkeyServer() as valkey, valkey.client() as client:
        store = f"{valkey.url}?{PATIENT}" if request.param == "redis" else f"file://{folder}/store"
        values = RedisValues(client) if request.param == "redis" else EmbeddedValues(folder / "store")
        with System(model, folder, store=store, key=KEYS["red"], **options) as system:
            yield system, values


class Tenant:
    """One tenant's images, by the name each has; what is right to say about them was learnt at first."""

    def __init__(self, system, name, count):
        self.http = httpx2.Client(
            base_url=system.gateways[0].url, timeout=120, headers={"authorization": f"Bearer {KEYS[name]}"}
        )
        sizes = [(190 + 28 * number, 150 + len(name)) for number in range(count)]
        self.files = {f"{name}-{number}": save(photograph("coffee", size), "PNG") for number, size in enumerate(sizes)}
        self.ids = {}
        self.right = {}

    def upload(self):
        for number, (name, data) in enumerate(self.files.items()):
            fields = {"alias": name} | ({"pinned": "true"} if number % 2 else {})
            reply = self.http.post("/v1/images", files={"file": ("a.png", data)}, data=fields)
            assert reply.status_code == 200, reply.text
            self.ids[name] = reply.json()["id"]

    def learn(self):
        for name in self.files:
            self.right[name] = self.ask(name)
        assert len({str(answer) for answer in self.right.values()}) == len(self.files), "no answer tells two apart"

    def ask(self, identifier):
        reply = self.http.post(f"/v1/images/{identifier}/questions", json=QUESTION)
        if reply.status_code == 404:
            return None
        assert reply.status_code == 200, reply.text
        answer = reply.json()["answers"][0]
        assert "choices" in answer, answer
        return {choice: round(p, 5) for choice, p in answer["choices"].items()}

    def check(self, lost_too):
        """Ask of every image by each of its names; what is lost is a miss, and allowed only if so said."""
        for name, right in self.right.items():
            for identifier in (name, self.ids[name]):
                assert self.ask(identifier) == right or (lost_too and self.ask(identifier) is None), identifier
            shown = self.http.get(f"/v1/images/{name}")
            assert (shown.status_code == 200 and shown.json()["id"] == self.ids[name]) or lost_too, shown.text
        listed = {image["id"] for image in self.http.get("/v1/images").json()["data"]}
        assert listed <= set(self.ids.values()), "another's image is listed"
        assert lost_too or listed == set(self.ids.values())


@pytest.fixture(scope="module")
def tenants(place):
    found = [Tenant(place[0], name, count) for name, count in IMAGES.items()]
    for tenant in found:
        tenant.upload()
        tenant.learn()
    yield found
    for tenant in found:
        tenant.http.close()


def corrupt(system):
    """Values that failed, as the gateway's metrics say."""
    text = system.http.get("/metrics").text
    return sum(float(found) for found in re.findall(r"^lookonce_store_corrupt_total\{.*\} (\S+)$", text, re.MULTILINE))


QUICK = {"swapped", "of another kind", "cut", "a bit in the middle"}


@pytest.mark.parametrize(
    "damage", [pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in DAMAGES]
)
def test_no_wrong_value_makes_a_wrong_answer_and_all_heals(place, tenants, damage):
    system, values = place
    before = values.read()
    kinds = {kind(one) for one in before}
    assert kinds == {"record", "file", "alias", "index", "embedding"}
    counted = corrupt(system)
    for where, value in DAMAGES[damage](before).items():
        values.write(where, value)
    time.sleep(1.1)  # the gateway has believed its records for a second
    for tenant in tenants:
        tenant.check(lost_too=True)
    assert corrupt(system) > counted
    for tenant in tenants:
        tenant.upload()
    for tenant in tenants:
        tenant.check(lost_too=False)
    counted = corrupt(system)
    for tenant in tenants:
        tenant.check(lost_too=False)
    assert corrupt(system) == counted, "nothing is left that fails"
    after = values.read()
    assert not [where for where, value in after.items() if value == DAMAGES[damage](before).get(where)], (
        "left as it was"
    )
    assert {place for place in before if kind(place) != "index"} <= after.keys(), "all of it is there again"


def test_the_encoder_repairs_the_store_from_its_memory(place, tenants):
    system, values = place
    encodes = system.encodes()
    before = {where: value for where, value in values.read().items() if where[0] == "embeddings"}
    for where, value in DAMAGES["swapped"](before).items():
        values.write(where, value)
    for tenant in tenants:
        tenant.check(lost_too=False)
    assert system.encodes() == encodes, "the right ones were in the encoder's memory"
    assert {where: value for where, value in values.read().items() if where[0] == "embeddings"} == before


@pytest.mark.slow
def test_a_restarted_encoder_makes_them_again(place, tenants):
    system, values = place
    before = {where: value for where, value in values.read().items() if where[0] == "embeddings"}
    for where, value in DAMAGES["swapped"](before).items():
        values.write(where, value)
    system.visions[0].restart()
    system.languages[0].restart()
    deadline = time.monotonic() + 90
    while system.http.get("/readyz").json()["status"] != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for tenant in tenants:
        tenant.check(lost_too=False)
    assert {where: value for where, value in values.read().items() if where[0] == "embeddings"} == before
