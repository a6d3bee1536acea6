"""Clients of a whole system that go on asking while its parts come and go."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2

from tests.images import odd_files, photograph, save

SAMPLED = {"max_tokens": 8, "temperature": 0}


class Workers:
    """Threads that do their jobs over a gateway, again and again until the end; `results` of all, in order."""

    def __init__(self, url, jobs):
        """A job takes an HTTP client of the gateway at `url` and the number of its turn."""
        self._url, self.results = url, []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(jobs))
        self._jobs = [self._pool.submit(self._run, job, number) for number, job in enumerate(jobs)]

    def _run(self, job, turn):
        with httpx2.Client(base_url=self._url, timeout=120, verify=False) as client:
            while not self._stop.is_set():
                turn += 1
                self.results.append(job(client, turn))

    def wait_for_more(self, results=5, seconds=120):
        """Return once there are so many more results, of requests made after this call."""
        wanted, deadline = len(self.results) + results + len(self._jobs), time.monotonic() + seconds
        while len(self.results) < wanted:
            assert time.monotonic() < deadline, f"{len(self.results)} results, {wanted} wanted"
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        for job in self._jobs:
            job.result(120)
        self._pool.shutdown()


class Load(Workers):
    """Asks about one image from several threads. A result is a status and an error's code."""

    def __init__(self, system, image, workers=3):
        self.image, self.texts = image, set()
        super().__init__(system.gateways[0].url, [self._ask] * workers)

    def _ask(self, client, _):
        body = {"questions": ["What is it?"], "max_tokens": 3}
        reply = client.post(f"/v1/images/{self.image}/questions", json=body)
        answer = reply.json()["answers"][0] if reply.status_code == 200 else {}
        if "text" in answer:
            self.texts.add(answer["text"])
        if answer.get("error") or reply.is_error:
            time.sleep(0.05)
        return reply.status_code, (answer.get("error") or {}).get("code")


class Clients(Workers):
    """Whole answers, streams, choices and new images. A result is what went wrong, or None."""

    def __init__(self, system, workers=8):
        self._model = system.model
        self.images = [system.upload(data)["id"] for data in list(odd_files().values())[:4]]
        self._uploads = itertools.count()
        kinds = (self._answer, self._stream, self._score, self._upload)
        super().__init__(system.gateways[0].url, [self._about(kinds[n % len(kinds)]) for n in range(workers)])

    @property
    def failed(self):
        return [wrong for wrong in self.results if wrong]

    def _about(self, kind):
        def job(client, turn):
            wrong = kind(client, self.images[turn % len(self.images)])
            return wrong and (kind.__name__, wrong)

        return job

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
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            **SAMPLED,
        }
        text = client.post("/v1/chat/completions", json=body).text
        return None if "data: [DONE]" in text and '"error"' not in text else text

    def _upload(self, client, image):
        file = save(photograph("coffee", (60 + next(self._uploads), 60)), "PNG")
        reply = client.post("/v1/images", files={"file": file})
        return None if reply.status_code in (200, 201) else (reply.status_code, reply.text)


def roll(service):
    """Stopped by SIGTERM, as a rollout does, and started again."""
    assert service.terminate() == 0
    service.restart()
