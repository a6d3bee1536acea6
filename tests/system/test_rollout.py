"""A new checkpoint takes over under load: no request fails, and no answer comes from the halves of two checkpoints.

Fast with services in this process that compute nothing, slow with real ones."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx2
import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import image_digest
from lookonce.core.rpc.server import Server, ServerOptions
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import common_pb2, language_pb2, language_pb2_grpc, vision_pb2, vision_pb2_grpc
from tests.images import photograph, save
from tests.processes import ServiceProcess
from tests.system.clients import Workers
from tests.system.cluster import GatewayProcess
from tests.valkey import ValkeyServer

QUESTION = {"questions": ["What is it?"], "max_tokens": 6, "temperature": 0}
NAMES = ("coffee", "chelsea", "rocket", "astronaut")


class Pair:
    """Both halves of one checkpoint, as services of their own on the common store."""

    def __init__(self, model, store):
        common = ("--model", str(model), "--store", store, "--device", "cpu", "--dtype", "float32")
        self.vision = ServiceProcess("vision_service", *common)
        self.language = ServiceProcess("lm_service", *common, "--vision", self.vision.address)
        self.vision.wait_ready()
        self.language.wait_ready()

    def line(self, name, weight):
        return f"{name} weight={weight} vision={self.vision.address} lm={self.language.address}\n"

    def close(self):
        self.language.terminate()
        self.vision.terminate()
        self.language.close()
        self.vision.close()


class Caller(Workers):
    """Questions over all images, now and then a new one. A result is what an answer says; `failed` holds the rest."""

    def __init__(self, url, images):
        self.images, self.failed = images, []
        super().__init__(url, [self._ask] * 4)

    def _ask(self, client, turn):
        image = self.images[turn % len(self.images)]
        reply = client.post(f"/v1/images/{image}/questions", json=QUESTION)
        answer = reply.json()["answers"][0] if reply.status_code == 200 else {"error": reply.text}
        if turn % 10 == 0:
            file = save(photograph("coffee", (84 + turn, 84)), "PNG")
            uploaded = client.post("/v1/images", files={"file": file})
            if uploaded.status_code != 200:
                self.failed.append((uploaded.status_code, uploaded.text))
        if answer.get("error"):
            self.failed.append((reply.status_code, answer["error"]))
            return None, image, "", ""
        bill = answer["receipt"]
        return bill["variant"], image, answer["text"], bill["fingerprint"]

    def count(self, variant):
        return sum(one[0] == variant for one in self.results)


def until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def isolated(model, files, tmp_path):
    """What one checkpoint says of each image when it is the only one there is."""
    store = f"file://{tmp_path}"
    pair = Pair(model, store)
    try:
        gateway = GatewayProcess("--vision", pair.vision.address, "--lm", pair.language.address, "--store", store)
        gateway.wait_ready()
        said = {}
        with httpx2.Client(base_url=gateway.url, timeout=120, verify=False) as client:
            for data in files:
                image = client.post("/v1/images", files={"file": data}).json()["id"]
                answer = client.post(f"/v1/images/{image}/questions", json=QUESTION).json()["answers"][0]
                said[image] = (answer["text"], answer["receipt"]["fingerprint"])
        gateway.close()
        return said
    finally:
        pair.close()


class VisionHalf(vision_pb2_grpc.VisionEncoderServicer):
    """Makes references whose fingerprint is one letter throughout."""

    def __init__(self, letter):
        self.fingerprint = letter * 64

    async def Describe(self, request, context):
        return vision_pb2.VisionDescription(fingerprint=self.fingerprint, max_image_bytes=1 << 20)

    async def Encode(self, request, context):
        digest = image_digest(request.image)
        reference = common_pb2.ImageReference(
            key=digest[:31] + self.fingerprint[:1].encode(), fingerprint=self.fingerprint, image_digest=digest,
            grid=common_pb2.Grid(t=1, h=4, w=4), tokens=4, width=56, height=56,
        )  # fmt: skip
        yield vision_pb2.EncodeResponse(result=vision_pb2.EncodeResult(reference=reference, stored=True))


class LanguageHalf(language_pb2_grpc.LanguageModelServicer):
    """Answers with the letter; refuses every other's references."""

    def __init__(self, letter):
        self.letter, self.fingerprint = letter, letter * 64

    async def Describe(self, request, context):
        model = common_pb2.ModelDescription(name="model", started_at=time.time())
        return language_pb2.LanguageDescription(model=model, fingerprints=[self.fingerprint], context_length=100)

    async def Generate(self, request, context):
        for message in request.messages:
            for part in message.parts:
                if part.HasField("image") and part.image.fingerprint != self.fingerprint:
                    raise LookonceError(ErrorKind.FINGERPRINT_MISMATCH, "another's reference")
        yield language_pb2.GenerateEvent(delta=language_pb2.Delta(text=self.letter, token_ids=[1]))
        receipt = language_pb2.LanguageReceipt(fingerprint=self.fingerprint)
        yield language_pb2.GenerateEvent(finish=language_pb2.Finish(reason=language_pb2.STOP, receipt=receipt))


@contextlib.asynccontextmanager
async def halves(letter, folder):
    """A line of the variants' file, but for its weight, with both services running."""
    servers = []
    for kind, add, servicer in (
        ("v", vision_pb2_grpc.add_VisionEncoderServicer_to_server, VisionHalf(letter)),
        ("l", language_pb2_grpc.add_LanguageModelServicer_to_server, LanguageHalf(letter)),
    ):
        server = Server(ServerOptions(f"unix:{folder}/{kind}-{letter}"))
        add(servicer, server.grpc)
        servers.append((server, await server.start()))
        await server.set_serving(True)
    yield f"{letter} weight={{}} vision={servers[0][1]} lm={servers[1][1]}\n"
    for server, _ in servers:
        await server.grpc.stop(None)


@pytest.mark.slow
async def test_no_answer_mixes_two_models_while_their_weights_change(tmp_path):
    file, failed, answered = tmp_path / "variants", [], []

    async def ask(client, turn):
        image = images[turn % len(images)]
        if turn % 5 == 0:
            upload = await client.post("/v1/images", files={"file": save(photograph("coffee", (40 + turn, 40)), "PNG")})
            image = upload.json().get("id", "none")
        reply = await client.post(f"/v1/images/{image}/questions", json={"questions": ["What is it?"]})
        answer = reply.json()["answers"][0] if reply.status_code == 200 else {"error": reply.text}
        if answer.get("error"):
            failed.append(answer["error"])
        else:
            answered.append((answer["text"], answer["receipt"]["variant"], answer["receipt"]["fingerprint"][:1]))

    async def load(client, start):
        for turn in range(start, 100_000, 2):
            await ask(client, turn)

    async def by(*letters):
        """Until the last 20 answers are by all of these and no other."""
        async with asyncio.timeout(60):
            while {text for text, *_ in answered[-20:]} != set(letters):
                assert not failed, failed
                await asyncio.sleep(0.02)

    async with halves("a", tmp_path) as old, contextlib.AsyncExitStack() as stack:
        file.write_text(old.format(1))
        gateway = GatewayProcess("--variants-file", str(file), "--store", f"file://{tmp_path}/store")
        stack.callback(gateway.close)
        await asyncio.to_thread(gateway.wait_ready)
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=gateway.url, timeout=60))
        files = [save(photograph(name, (150 + n, 100)), "PNG") for n in range(3) for name in NAMES]
        images = [(await client.post("/v1/images", files={"file": data})).json()["id"] for data in files]
        async with halves("b", tmp_path) as new:
            tasks = [asyncio.create_task(load(client, start)) for start in range(2)]
            await by("a")
            file.write_text(old.format(1) + new.format(1))
            await by("a", "b")
            file.write_text(new.format(1))
            await by("b")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert failed == []
    assert all(text == variant == fingerprint for text, variant, fingerprint in answered)


@pytest.mark.slow
def test_from_one_fine_tune_to_another_under_load(tmp_path):
    first = make_random_checkpoint(tmp_path / "first", max_pixels=100 * 28 * 28, seed=1)
    second = make_random_checkpoint(tmp_path / "second", max_pixels=100 * 28 * 28, seed=2)
    files = [save(photograph(name, (150, 100)), "PNG") for name in NAMES]
    truth = {"old": isolated(first, files, tmp_path / "a"), "new": isolated(second, files, tmp_path / "b")}
    assert all(truth["old"][image] != truth["new"][image] for image in truth["old"]), "two models must be told apart"
    with ValkeyServer() as valkey:
        old = Pair(first, valkey.url)
        file = tmp_path / "variants"
        file.write_text(old.line("old", 100))
        gateway = GatewayProcess("--variants-file", str(file), "--store", valkey.url)
        gateway.wait_ready()
        try:
            with httpx2.Client(base_url=gateway.url, timeout=120, verify=False) as client:
                images = [client.post("/v1/images", files={"file": data}).json()["id"] for data in files]
            with Caller(gateway.url, images) as caller:
                until(lambda: caller.count("old") > 20)
                new = Pair(second, valkey.url)
                file.write_text(old.line("old", 50) + new.line("new", 50))
                until(lambda: caller.count("new") > 5)
                file.write_text(old.line("old", 0) + new.line("new", 100))
                until(lambda: {one[0] for one in caller.results[-30:]} == {"new"})
                file.write_text(new.line("new", 100))
                caller.wait_for_more(40)  # past the moment at which the gateway has read the file
                old.close()
                caller.wait_for_more(40)
            new.close()
        finally:
            gateway.close()
    assert caller.failed == []
    assert caller.count("old") > 20 and caller.count("new") > 40
    for variant, image, text, fingerprint in caller.results:
        assert (text, fingerprint) == truth[variant][image]
