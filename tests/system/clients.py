"""Clients of a whole system that go on asking while its parts come and go."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2

from tests.pictures import odd_files, photograph, save

SAMPLED = {"max_tokens": 8, "temperature": 0}


class Clients:
    """Ask about images over the first gateway until told to stop: whole answers, streams, choices and new pictures."""

    def __init__(self, system, workers=8):
        self.system, self.done, self.failed = system, 0, []
        self.images = [system.upload(data)["id"] for data in list(odd_files().values())[:4]]
        self._pictures = itertools.count()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        kinds = (self._answer, self._stream, self._score, self._upload)
        self._jobs = [self._pool.submit(self._run, kinds[n % len(kinds)], n) for n in range(workers)]

    def _run(self, kind, turn):
        with httpx2.Client(base_url=self.system.gateways[0].url, timeout=120) as client:
            while not self._stop.is_set():
                turn += 1
                wrong = kind(client, self.images[turn % len(self.images)])
                if wrong:
                    self.failed.append((kind.__name__, wrong))
                self.done += 1

    def _answer(self, client, image):
        return self._wrong(client.post(f"/v1/images/{image}/questions", json={"questions": ["What is it?"], **SAMPLED}))

    def _score(self, client, image):
        questions = [{"text": "Is it?", "choices": ["yes", "no"]}]
        return self._wrong(client.post(f"/v1/images/{image}/questions", json={"questions": questions}))

    @staticmethod
    def _wrong(reply):
        if reply.status_code != 200:
            return reply.status_code, reply.text
        return reply.json()["answers"][0].get("error")

    def _stream(self, client, image):
        content = [
            {"type": "image_url", "image_url": {"url": f"lookonce:{image}"}},
            {"type": "text", "text": "What is it?"},
        ]
        body = {
            "model": self.system.model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            **SAMPLED,
        }
        text = client.post("/v1/chat/completions", json=body).text
        return None if "data: [DONE]" in text and '"error"' not in text else text

    def _upload(self, client, image):
        picture = save(photograph("coffee", (60 + next(self._pictures), 60)), "PNG")
        reply = client.post("/v1/images", files={"file": picture})
        return None if reply.status_code in (200, 201) else (reply.status_code, reply.text)

    def wait_for_more(self, requests, seconds=120):
        """Return once so many more requests are over."""
        wanted, deadline = self.done + requests, time.monotonic() + seconds
        while self.done < wanted:
            assert time.monotonic() < deadline, f"{self.done} requests, {wanted} wanted"
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        for job in self._jobs:
            job.result(120)
        self._pool.shutdown()


def roll(service):
    """Stopped by SIGTERM, as a rollout does, and started again."""
    assert service.terminate() == 0
    service.restart()
