"""One of two replicas is killed under load: nobody is told of it before a first token, and it is left alone until it is
back."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import photograph, save
from tests.system.cluster import System, image_part, text_part

QUESTION = {"text": "Is it?", "choices": ["yes", "no"]}
QUICK_RETRIES = 40  # of calls that were under way when the replica died, or begun before that was noticed


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    with System(make_random_checkpoint(folder / "model"), folder, visions=2, languages=2) as system:
        yield system


class Load:
    """Requests of every kind from several threads, until told to stop."""

    def __init__(self, system):
        self._system = system
        self._url = system.gateways[0].url
        self._images = [system.upload(image_file(number))["id"] for number in range(8)]
        self._stop = threading.Event()
        self._serial = iter(range(100, 10_000))
        self.outcomes: Counter[str] = Counter()

    def run(self):
        with httpx2.Client(base_url=self._url, timeout=120) as http:
            turns = [self.generate, self.score, self.stream, self.encode]
            while not self._stop.is_set():
                for image in self._images:
                    for turn in turns:
                        self.outcomes[f"{turn.__name__}: {turn(http, image)}"] += 1

    def generate(self, http, image):
        body = {"questions": ["What?"], "max_tokens": 3}
        return http.post(f"/v1/images/{image}/questions", json=body).status_code

    def score(self, http, image):
        return http.post(f"/v1/images/{image}/questions", json={"questions": [QUESTION]}).status_code

    def encode(self, http, _image):
        return http.post("/v1/images", files={"file": image_file(next(self._serial))}).status_code

    def stream(self, http, image):
        """Whole, or cut after a first token."""
        content = [image_part(f"lookonce:{image}"), text_part("What?")]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                return reply.status_code
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
        events = [json.loads(line) for line in lines]
        tokens = sum(bool(choice["delta"].get("content")) for event in events for choice in event.get("choices", ()))
        if any("error" in event for event in events):
            return "cut after a token" if tokens else "cut before a token"
        return 200

    def __enter__(self):
        self._threads = ThreadPoolExecutor(4)
        self._running = [self._threads.submit(self.run) for _ in range(4)]
        return self

    def __exit__(self, *error):
        self._stop.set()
        for running in self._running:
            running.result(180)


def image_file(number):
    return save(photograph("coffee", (60 + number % 97, 60 + number // 97)), "PNG")


def retries(system):
    text = system.http.get("/metrics").text
    return sum(float(n) for n in re.findall(r"^lookonce_gateway_retries_total\{[^}]*\} (\S+)$", text, re.M))


@pytest.mark.slow
@pytest.mark.parametrize("half", ["languages", "visions"])
def test_nobody_is_told_of_a_replica_that_was_killed_and_it_is_left_alone_until_it_is_back(system, half):
    victim = getattr(system, half)[0]
    system.wait_whole()
    before = retries(system)
    with Load(system) as load:
        time.sleep(3)
        victim.kill()
        time.sleep(2)
        noticed = retries(system)
        time.sleep(8)  # longer than any pause between two looks at it
        assert retries(system) == noticed, "requests were put at stake for a dead replica"
        victim.restart()
        time.sleep(6)
    assert noticed - before <= QUICK_RETRIES
    outcomes = dict(load.outcomes)
    assert {outcome.partition(": ")[2] for outcome in outcomes} <= {"200", "cut after a token"}, outcomes
    assert all(outcomes.get(f"{kind}: 200", 0) > 5 for kind in ("generate", "score", "stream", "encode")), outcomes
    system.wait_whole()
