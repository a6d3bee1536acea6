"""The language service as tests run it: in this process or another, always behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass, field

import torch
from PIL import Image

from lm_service.app import load, serve
from lm_service.settings import LanguageSettings
from lookonce.core.identity import EmbeddingReference, embedding_key, image_digest
from lookonce.core.record import EMBEDDING, EmbeddingRecord
from lookonce.core.rpc.client import LanguageClient
from lookonce.models.checkpoint import open_checkpoint
from lookonce.models.tensors import view_of
from protos.lookonce.v1 import language_pb2
from tests.modules import load_vision_tower


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Tower:
    """A checkpoint's vision half, making records without a service around it."""

    def __init__(self, path):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.checkpoint = open_checkpoint(str(path))
        self.fingerprint = self.checkpoint.encoder_spec("float32").fingerprint()
        self._tower = load_vision_tower(self.checkpoint, torch.float32)
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(path)

    @torch.inference_mode()
    def record(self, image: Image.Image) -> tuple[EmbeddingReference, EmbeddingRecord]:
        inputs = self._processor(images=[image], return_tensors="pt")
        rows = self._tower(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        digest = image_digest(encoded(image))
        key = embedding_key(digest, self.fingerprint, self.checkpoint.min_pixels, self.checkpoint.max_pixels)
        grid = tuple(inputs["image_grid_thw"][0].tolist())
        reference = EmbeddingReference(key, self.fingerprint, digest, grid, len(rows), *image.size)
        return reference, record_of(reference, rows)


def record_of(reference: EmbeddingReference, rows: torch.Tensor, **changes) -> EmbeddingRecord:
    """A record of these rows; `changes` make it disagree with its reference."""
    fields = {
        name: getattr(reference, name) for name in ("key", "fingerprint", "image_digest", "grid_thw", "width", "height")
    }
    return EmbeddingRecord(**(fields | {"tokens": len(rows), "tensors": {EMBEDDING: view_of(rows)}} | changes))


@contextlib.asynccontextmanager
async def running(path, directory, **settings):
    """A client of a language service running in this loop, on a unix socket in `directory`."""
    address = f"unix:{directory}/lm.sock"
    chosen = LanguageSettings(**{"model": str(path), "listen": address, "device": "cpu", "dtype": "float32"} | settings)
    service = asyncio.create_task(serve(chosen, load(chosen)))
    client = LanguageClient(address)
    try:
        while not await client.healthy():
            assert not service.done(), service
            await asyncio.sleep(0.01)
        yield client
    finally:
        await client.close()
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)


def user(*parts, role="user"):
    """A message of texts and references."""
    return language_pb2.Message(
        role=role,
        parts=[
            language_pb2.Part(text=part) if isinstance(part, str) else language_pb2.Part(image=part.to_proto())
            for part in parts
        ],
    )


def asking(*messages, **sampling):
    sampling.setdefault("max_tokens", 8)
    return language_pb2.GenerateRequest(messages=messages, sampling=language_pb2.SamplingParameters(**sampling))


@dataclass
class Reply:
    """One whole answer."""

    text: str = ""
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finish: language_pb2.Finish | None = None


async def answers(client, request, timeout=60.0) -> list[Reply]:
    """The n answers, in order."""
    replies: dict[int, Reply] = {}
    async for event in client.generate(request, timeout=timeout):
        if event.HasField("delta"):
            reply = replies.setdefault(event.delta.index, Reply())
            assert reply.finish is None, "nothing may follow a finish"
            reply.text += event.delta.text
            reply.ids += event.delta.token_ids
            reply.logprobs += event.delta.logprobs
        else:
            replies[event.finish.index].finish = event.finish
    return [replies[index] for index in sorted(replies)]


async def answer(client, request, timeout=60.0) -> Reply:
    (reply,) = await answers(client, request, timeout)
    return reply
