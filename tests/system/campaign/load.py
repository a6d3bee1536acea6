"""Clients of every kind, asking at once until told to stop; each answer is judged as it comes."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.system.campaign.images import CHOICES, MAX_TOKENS, OPEN, Sample, questions
from tests.system.campaign.verdicts import STATUS_OF_CODE, Verdicts
from tests.system.cluster import data_url, image_part, text_part

BOUND = 60.0
"""Seconds within which every request must end, whatever happens: the gateways are started with less."""
HALF_SENT = (
    b"POST /v1/images HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n"
)
PAUSE, PAUSE_BROKEN = 0.02, 0.3  # seconds after a request of a client, and after one that broke


class Client:
    """One of many clients, with random choices of its own."""

    def __init__(self, seed: str, gateways: list[str], images: list[Sample], verdicts: Verdicts) -> None:
        self._rng = random.Random(seed)
        self._gateways = gateways
        self._images = images
        self._verdicts = verdicts
        self._http = httpx2.AsyncClient(timeout=BOUND + 30)
        self._operations: list[tuple[Callable[[str, Sample], Awaitable[str]], int]] = [
            (self.ask, 6),
            (self.ask_streaming, 3),
            (self.weigh, 4),
            (self.chat, 4),
            (self.chat_inline, 2),
            (self.chat_streaming, 4),
            (self.look, 2),
            (self.upload, 4),
            (self.delete_and_upload, 2),
            (self.leave_in_mid_body, 1),
            (self.leave_in_mid_stream, 2),
        ]

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until told to stop."""
        async with self._http:
            while not stop.is_set():
                (operation,) = self._rng.choices(*zip(*self._operations, strict=True))  # type: ignore[arg-type]
                gateway, image = self._rng.choice(self._gateways), self._rng.choice(self._images)
                outcome = await self.once(operation, gateway, image)
                await asyncio.sleep(PAUSE if outcome else PAUSE_BROKEN)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def once(self, operation: Callable[[str, Sample], Awaitable[str]], gateway: str, image: Sample) -> str | None:
        """One request, its outcome counted; None when it hung or broke."""
        name, start = operation.__name__, time.monotonic()
        facts = {"operation": name, "image": image.name, "gateway": gateway}
        try:
            async with asyncio.timeout(BOUND):
                outcome = await operation(gateway, image)
        except TimeoutError:
            outcome = None
            self._verdicts.accuse("hang", **facts)
        except httpx2.HTTPError as error:
            outcome = None
            self._verdicts.broken(start, error=repr(error), **facts)
        self._verdicts.slowest = max(self._verdicts.slowest, time.monotonic() - start)
        self._verdicts.note(name, outcome or "hung or broke")
        return outcome

    async def ask(self, gateway: str, image: Sample) -> str:
        """POST .../questions: some of all questions."""
        asked = self._rng.sample(questions(), self._rng.randint(1, 5))
        return await self._ask(gateway, image, asked, "ask")

    async def ask_all(self, gateway: str, image: Sample) -> str:
        """All of them."""
        return await self._ask(gateway, image, questions(), "ask_all")

    async def _ask(self, gateway: str, image: Sample, asked: list[dict[str, Any]], operation: str) -> str:
        start = time.monotonic()
        body = {"questions": asked, "temperature": 0}
        url = f"{gateway}/v1/images/{self._name(image)}/questions"
        reply = await self._http.post(url, json=body)
        if not self._succeeded(reply, reply.content, start, image, operation):
            return str(reply.status_code)
        answers = reply.json()["answers"]
        if [answer["id"] for answer in answers] != [question["id"] for question in asked]:
            self._verdicts.accuse("answers out of order", image=image.name)
        return self._judge(answers, image, start, operation)

    async def ask_streaming(self, gateway: str, image: Sample) -> str:
        """The same, each answer as soon as it is there."""
        start, asked = time.monotonic(), questions()
        body = {"questions": asked, "temperature": 0, "stream": True}
        events, outcome = await self._stream(gateway, f"/v1/images/{self._name(image)}/questions", body, image)
        answers = [event for event in events if "id" in event]
        if outcome == "whole" and sorted(answer["id"] for answer in answers) != sorted(q["id"] for q in asked):
            self._verdicts.accuse("answers missing from a stream that ended well", image=image.name)
        judged = self._judge(answers, image, start, "ask_streaming")
        return judged if outcome == "whole" else outcome

    async def weigh(self, gateway: str, image: Sample) -> str:
        """Questions with choices alone."""
        asked = [question for question in questions() if "choices" in question]
        return await self._ask(gateway, image, asked, "weigh")

    async def chat(self, gateway: str, image: Sample) -> str:
        """A chat completion on a kept image."""
        return await self._chat(gateway, image, f"lookonce:{self._name(image)}", "chat")

    async def chat_inline(self, gateway: str, image: Sample) -> str:
        """One that brings the image along: it must be answered whatever the store lost, unless it is being erased."""
        return await self._chat(gateway, image, data_url(image.data), "chat_inline")

    async def _chat(self, gateway: str, image: Sample, url: str, operation: str) -> str:
        start, question = time.monotonic(), self._rng.choice(OPEN)
        reply = await self._http.post(f"{gateway}/v1/chat/completions", json=_chat_body(url, question))
        gone = image if image.churned or not url.startswith("data:") else None
        if not self._succeeded(reply, reply.content, start, gone, operation):
            return str(reply.status_code)
        text = reply.json()["choices"][0]["message"]["content"]
        return self._judge_text(image, question, text, operation)

    async def chat_streaming(self, gateway: str, image: Sample) -> str:
        """A chat completion, read as it is written."""
        question = self._rng.choice(OPEN)
        body = _chat_body(f"lookonce:{self._name(image)}", question) | {"stream": True}
        events, outcome = await self._stream(gateway, "/v1/chat/completions", body, image)
        text = "".join(c["delta"].get("content") or "" for event in events for c in event.get("choices", ()))
        if outcome == "whole":
            return self._judge_text(image, question, text, "chat_streaming")
        if not image.is_text(question, text, whole=False):
            self._verdicts.accuse("wrong answer", operation="chat_streaming, cut", image=image.name, text=text)
        return outcome

    async def look(self, gateway: str, image: Sample) -> str:
        """GET: it is this image."""
        start = time.monotonic()
        reply = await self._http.get(f"{gateway}/v1/images/{self._name(image)}")
        if not self._succeeded(reply, reply.content, start, image, "look"):
            return str(reply.status_code)
        if reply.json()["id"] != image.id:
            self._verdicts.accuse("wrong image", image=image.name, found=reply.json()["id"], wanted=image.id)
        return "right"

    async def upload(self, gateway: str, image: Sample) -> str:
        """Upload the file (again), pinned and named."""
        async with image.changing:
            start, form = time.monotonic(), {"pinned": "true", "alias": image.name}
            files = {"file": ("image.png", image.data, "image/png")}
            reply = await self._http.post(f"{gateway}/v1/images", files=files, data=form)
            if not self._succeeded(reply, reply.content, start, None, "upload"):
                return str(reply.status_code)
            if reply.json()["id"] != image.id:
                self._verdicts.accuse("wrong image", image=image.name, found=reply.json()["id"], wanted=image.id)
            image.uploaded(start, time.monotonic(), self._verdicts)
            return "right"

    async def delete_and_upload(self, gateway: str, image: Sample) -> str:
        """Erase it, and upload it again at once."""
        if not image.churned:
            return await self.look(gateway, image)
        async with image.changing:
            image.may_be_gone(float("inf"))
            start = time.monotonic()
            try:
                reply = await self._http.delete(f"{gateway}/v1/images/{image.id}")
                outcome = "right" if self._succeeded(reply, reply.content, start, image, "delete") else "refused"
            finally:
                image.lost_until = time.monotonic()
        await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.5)))
        await self.once(self.upload, gateway, image)
        return outcome

    async def leave_in_mid_body(self, gateway: str, image: Sample) -> str:
        """Send half of an upload, and go."""
        at = urlsplit(gateway)
        _, writer = await self._connected(str(at.hostname), int(at.port or 80))
        try:
            writer.write(HALF_SENT + b'{"data": "' + b"A" * self._rng.choice((0, 100, 60_000)))
            await writer.drain()
            await asyncio.sleep(self._rng.choice((0.0, 0.05, 0.3)))
            if self._rng.random() < 0.5:
                writer.transport.abort()
        except OSError as error:
            raise httpx2.WriteError(str(error)) from error
        finally:
            writer.close()
        return "left"

    async def leave_in_mid_stream(self, gateway: str, image: Sample) -> str:
        """Read the first words of a long answer, and go."""
        start = time.monotonic()
        body = _chat_body(data_url(image.data), OPEN[0]) | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        async with self._http.stream("POST", f"{gateway}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                content = await reply.aread()
                self._succeeded(reply, content, start, image if image.churned else None, "leave_in_mid_stream")
                return str(reply.status_code)
            async for _ in reply.aiter_lines():
                break
        return "left"

    def _name(self, image: Sample) -> str:
        return self._rng.choice((image.id, image.name))

    @staticmethod
    async def _connected(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(host, port)
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error

    async def _stream(
        self, gateway: str, path: str, body: dict[str, Any], image: Sample
    ) -> tuple[list[dict[str, Any]], str]:
        """Events, and "whole", "failed" (an error event) or a status."""
        start, events = time.monotonic(), []
        async with self._http.stream("POST", gateway + path, json=body) as reply:
            if reply.status_code != 200:
                content = await reply.aread()
                self._succeeded(reply, content, start, image, path.rpartition("/")[2])
                return [], str(reply.status_code)
            self._verdicts.reply(200, reply.headers, operation=path)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return events, "failed" if events and set(events[-1]) == {"error"} else "whole"
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if set(event) == {"error"}:
                        status = STATUS_OF_CODE.get(str((event["error"] or {}).get("code")), 0)
                        self._verdicts.error(status, event, start, operation=path, image=image.name, streamed=True)
                    events.append(event)
        self._verdicts.broken(start, gateway=gateway, error="a stream ended without [DONE]", operation=path)
        return events, "cut"

    def _succeeded(
        self, reply: httpx2.Response, content: bytes, start: float, image: Sample | None, operation: str
    ) -> bool:
        """Whether it was 200; else the refusal is judged. `image` may be unknown if it may be gone."""
        facts = {"operation": operation, "image": image and image.name}
        self._verdicts.reply(reply.status_code, reply.headers, **facts)
        if reply.status_code in (200, 201):
            return True
        if reply.status_code == 404 and image is not None and start < image.certain_from:
            return False
        facts["request_id"] = reply.headers.get("x-request-id")
        if reply.status_code == 404 and image is not None:
            facts |= {
                "url": str(reply.url),
                "started": round(start - self._verdicts.began, 2),
                "certain": round(image.certain_from - self._verdicts.began, 2),
            }
            self._verdicts.accuse("a kept image is not found", body=content[:200], **facts)
            return False
        try:
            body = json.loads(content)
        except ValueError:
            body = content.decode(errors="replace")
        self._verdicts.error(reply.status_code, body, start, **facts)
        return False

    def _judge(self, answers: list[dict[str, Any]], image: Sample, start: float, operation: str) -> str:
        worst = "right"
        for answer in answers:
            kind, number = answer["id"][0], int(answer["id"][1:])
            error = answer.get("error")
            if error:
                status = STATUS_OF_CODE.get(str(error.get("code")), 0)
                if status == 404 and start < image.certain_from:
                    worst = "some 404"
                    continue
                facts = {"operation": operation, "image": image.name, "question": answer["id"]}
                self._verdicts.error(status, {"error": error}, start, **facts)
                worst = "some failed"
            elif kind == "o":
                self._judge_text(image, OPEN[number], answer["text"], operation)
            elif not image.is_score(CHOICES[number][0], answer["choices"]):
                question, found = CHOICES[number][0], answer["choices"]
                facts = {"question": question, "found": found, "true": image.scores[question]}
                self._verdicts.accuse("wrong answer", operation=operation, image=image.name, **facts)
        return worst

    def _judge_text(self, image: Sample, question: str, text: str, operation: str) -> str:
        if image.is_text(question, text):
            return "right"
        facts = {"question": question, "found": text, "true": image.texts[question]}
        self._verdicts.accuse("wrong answer", operation=operation, image=image.name, **facts)
        return "wrong"


def _chat_body(url: str, question: str) -> dict[str, Any]:
    content = [image_part(url), text_part(question)]
    message = {"role": "user", "content": content}
    return {"model": "lookonce", "messages": [message], "max_tokens": MAX_TOKENS, "temperature": 0}
