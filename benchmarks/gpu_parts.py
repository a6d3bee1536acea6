"""What the stages of benchmarks.gpu are made of: engines, towers and systems whose weights are made on the device."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "L4": 0.3e12, "L40S": 0.864e12, "4090": 1.008e12}
"""Bytes a second, as their data sheets say; others are measured."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    size: str  # of the models whose weights are made here

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.bfloat16

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@contextmanager
def no_waits(setting: Setting) -> Iterator[None]:
    if not setting.on_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows(path: str, samples: Any, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    from PIL import Image

    from lookonce.models.checkpoint import Half, open_checkpoint

    checkpoint = open_checkpoint(path, needs=Half.VISION)
    encoder = checkpoint.family.load_encoder(checkpoint, dtype, device)
    patches = [encoder.prepare(Image.open(one.path), checkpoint.min_pixels, checkpoint.max_pixels) for one in samples]
    return [rows.float().cpu() for rows in encoder.encode(patches)]


async def greedy(
    path: str, rows: list[torch.Tensor], samples: Any, device: torch.device, dtype: torch.dtype
) -> list[list[int]]:
    """Tokens of answers to three questions about each sample, its embedding given."""
    from PIL import Image

    from lm_service.app import load
    from lm_service.engine.types import EmbeddingSource, Generation, Sampling
    from lm_service.prompt import Message, PromptBuilder
    from lm_service.settings import LanguageSettings
    from lookonce.core.identity import EmbeddingReference
    from lookonce.models.tensors import view_of

    name = str(dtype).removeprefix("torch.")
    budget = {"kv_bytes": 64 << 20, "prefix_bytes": 64 << 20, "engine": "packed"}
    settings = LanguageSettings.model_validate({"model": path, "device": str(device), "dtype": name, **budget})
    model = load(settings)
    family, config = model.checkpoint.family, model.checkpoint.config
    held: dict[bytes, torch.Tensor] = {}
    builder = PromptBuilder(
        model.template, family, config, context_length=2048, max_images=4, check_fingerprint=lambda reference: None
    )

    class Given:
        async def load(self, reference: EmbeddingReference, rows_of: Any) -> Any:
            return rows_of(view_of(held[reference.key])), EmbeddingSource.STORE

    await model.engine.start(Given(), lambda: None)
    answers = []
    for number, (sample, given) in enumerate(zip(samples, rows, strict=True)):
        image = Image.open(sample.path)
        own = model.checkpoint
        grid = family.image_grid(config, *image.size, own.min_pixels, own.max_pixels)
        key = number.to_bytes(32, "big")
        held[key] = given.reshape(-1, given.shape[-1])
        reference = EmbeddingReference(key, "0" * 64, key, grid, len(held[key]), *image.size)
        for question, _ in sample.questions[:3]:
            prompt = builder.build([Message("user", (reference, question))])
            tokens: list[int] = []
            async for event in model.engine.generate(Generation("q", prompt, Sampling(12))):
                tokens += getattr(event, "token_ids", ())
            answers.append(tokens)
    await model.engine.close()
    return answers


@contextmanager
def engine(setting: Setting, size: str, layers: int | None = None) -> Iterator[tuple[Callable[[], Any], Any]]:
    """A maker of packed engines over a language half of this size, its weights made on the device."""
    from dataclasses import replace

    from lm_service.engine.answer import TokenTable
    from lm_service.engine.packed.engine import PackedEngine
    from lm_service.engine.packed.options import PackedOptions
    from lookonce.models.qwen2_vl.architecture import SIZES
    from lookonce.models.qwen2_vl.config import FAMILY
    from lookonce.models.qwen2_vl.modules import TextModel
    from lookonce.models.qwen2_vl.text import Qwen2VLAdapter

    arch = SIZES[size]
    arch = replace(arch, layers=layers) if layers is not None else arch
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    text = {
        "hidden_size": arch.hidden, "intermediate_size": arch.ffn, "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads, "num_key_value_heads": arch.kv_heads, "vocab_size": arch.vocab,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": sections(arch.hidden // arch.heads)},
    }  # fmt: skip
    config = {"rms_norm_eps": 1e-6} | FAMILY.text_config(text | {"model_type": "qwen2_vl"})
    with torch.device("meta"):
        model, head = TextModel(config), torch.nn.Linear(arch.hidden, arch.vocab, bias=False)
    generator = torch.Generator(setting.device).manual_seed(0)
    for module in (model, head):
        module.to_empty(device=setting.device).to(dtype).requires_grad_(False)
        for name, weight in module.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02, generator=generator)
    model.rotary_emb = TextModel.rotary(config)
    head.weight = model.embed_tokens.weight
    adapter = Qwen2VLAdapter(model.eval(), head.eval())
    table = TokenTable([(number, b"a") for number in range(arch.vocab)])
    room = (8 << 30) if setting.on_gpu else (64 << 20)

    def make() -> PackedEngine:
        return PackedEngine(adapter, table, frozenset(), PackedOptions(kv_bytes=room, prefix_bytes=room))

    yield make, adapter


def sections(head_dim: int) -> list[int]:
    quarter = head_dim // 8
    return [quarter, (head_dim // 2 - quarter) // 2, head_dim // 2 - quarter - (head_dim // 2 - quarter) // 2]


def asked(images: int, questions: int, tokens: int, seed: int = 0) -> list[Any]:
    from benchmarks.bare import image, question
    from lm_service.engine.types import Generation, Sampling

    shown = [image(1 + seed + number) for number in range(images)]
    return [
        Generation("q", question(100 * number + n, one), Sampling(tokens, ignore_eos=True))
        for number, one in enumerate(shown)
        for n in range(questions)
    ]


async def ask_all(engine: Any, asked: list[Any]) -> None:
    async def one(request: Any) -> None:
        async for _ in engine.generate(request):
            pass

    await asyncio.gather(*map(one, asked))


async def started(engine: Any, adapter: Any) -> None:
    from benchmarks.bare import Images

    loader = Images(adapter.shape.hidden)
    loader.rows = loader.rows.to(adapter.shape.device, adapter.shape.dtype)
    await engine.start(loader)


async def step_seconds(engine: Any, adapter: Any, images: int, questions: int) -> float:
    """Of a decode step: what twelve more tokens take."""
    await started(engine, adapter)
    taken = []
    for tokens in (4, 16):
        await ask_all(engine, asked(images, questions, tokens))
        began, before = time.perf_counter(), engine.describe().steps
        await ask_all(engine, asked(images, questions, tokens))
        taken.append((time.perf_counter() - began, engine.describe().steps - before))
    await engine.close()
    (short, few), (long, many) = taken
    return (long - short) / max(1, many - few)


async def profiled(setting: Setting, engine: Any, adapter: Any, images: int, questions: int) -> dict[str, float]:
    """Kernels and copies of a step, where a GPU's profiler tells them."""
    await started(engine, adapter)
    await ask_all(engine, asked(images, questions, 8))
    if not setting.on_gpu:
        await engine.close()
        return {"steps": float(engine.describe().steps)}
    before = engine.describe().steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        await ask_all(engine, asked(images, questions, 8))
    steps = engine.describe().steps - before
    await engine.close()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum("Memcpy" in event.name for event in events)
    return {"kernels a step": (len(events) - copies) / steps, "copies a step": copies / steps, "steps": float(steps)}


async def survives(engine: Any) -> bool:
    """Whether others are answered after a step has run out of memory."""
    from lm_service.engine.packed.execution.runner import Runner
    from lookonce.core.errors import LookonceError

    await started(engine, engine._model)
    real, left = Runner.run, [3]

    def run(self: Any, batch: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("out of memory, as a test")
        return real(self, batch)

    Runner.run = run  # type: ignore[method-assign]
    try:
        with suppress(LookonceError):
            await ask_all(engine, asked(1, 1, 4))
    finally:
        Runner.run = real  # type: ignore[method-assign]
    await ask_all(engine, asked(1, 2, 4, seed=7))
    survived = not engine.failed
    await engine.close()
    return survived


async def ends(engine: Any) -> bool:
    """Whether an engine tells that it is unusable once its device has asserted."""
    from lookonce.core.errors import LookonceError

    ended = asyncio.Event()
    await started(engine, engine._model)
    engine._on_failure = ended.set
    table = torch.zeros(4, device="cuda")
    table[torch.tensor([99], device="cuda")]  # out of bounds: comes to light at the next wait
    for _ in range(6):
        with suppress(LookonceError):
            await ask_all(engine, asked(1, 1, 2))
        if ended.is_set():
            return True
    return ended.is_set()


def matrices_seconds(setting: Setting, adapter: Any) -> float:
    """32 rows times every matrix of layers and head, and nothing else: on a GPU a captured graph, replayed."""
    matrices = list({id(one): one for one in parameters(adapter) if one.dim() == 2}.values())
    rows = {one.shape[1]: torch.randn(32, one.shape[1], device=one.device, dtype=one.dtype) for one in matrices}

    def all_of_them() -> None:
        for one in matrices:
            torch.matmul(rows[one.shape[1]], one.t())

    all_of_them()
    replay: Callable[[], object] = all_of_them
    if setting.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        replay = graph.replay
    setting.wait()
    began = time.perf_counter()
    for _ in range(10):
        replay()
    setting.wait()
    return (time.perf_counter() - began) / 10


def language_bytes(adapter: Any) -> int:
    return sum({id(one): one.numel() * one.element_size() for one in parameters(adapter)}.values())


def parameters(adapter: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an adapter's attributes hold."""
    seen: set[int] = set()
    todo: list[Any] = [vars(adapter)]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.nn.Module):
            yield from one.parameters()
        elif isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (list, tuple)):
            todo += one
        elif hasattr(one, "__dict__") and type(one).__module__.startswith("lookonce"):
            todo.append(vars(one))


def bandwidth(setting: Setting) -> float:
    if setting.on_gpu:
        name = torch.cuda.get_device_name(setting.device)
        known = next((value for kind, value in BANDWIDTH.items() if kind in name), None)
        if known is not None:
            return known
    data = torch.ones((64 << 20) // 4, device=setting.device)
    data.sum()
    setting.wait()
    began = time.perf_counter()
    for _ in range(5):
        data.sum()
    setting.wait()
    return 5 * data.nbytes / (time.perf_counter() - began)


def encoder(setting: Setting, folder: Path) -> tuple[Any, Any]:
    """A tower of the size, of a checkpoint with few and small text layers."""
    from dataclasses import replace

    from lookonce.models.checkpoint import Half, open_checkpoint
    from lookonce.models.qwen2_vl.architecture import SIZES
    from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

    arch = SIZES[setting.size]
    arch = replace(arch, layers=1, ffn=64, vocab=512) if setting.on_gpu else arch
    path = make_random_checkpoint(folder / "tower", sizes={"tower": arch}, size="tower", dtype="bfloat16")
    checkpoint = open_checkpoint(str(path), needs=Half.VISION)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    return checkpoint.family.load_encoder(checkpoint, dtype, setting.device), checkpoint


@contextmanager
def up(setting: Setting, folder: Path) -> Iterator[str]:
    """`lookonce up` over a random checkpoint of the size (the bundled one on a CPU), on Valkey where there is one."""
    from tests.ports import free_port
    from tests.valkey import ValkeyServer

    command = [sys.executable, "-m", "lookonce", "up", "--port", str(port := free_port())]
    command += ["--data-dir", str(folder / "data"), "--device", setting.device.type]
    if setting.on_gpu:
        from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

        path = make_random_checkpoint(folder / "model", size=setting.size, dtype="bfloat16")
        command += ["--model", str(path), "--lm-kv-bytes", "8GiB", "--lm-prefix-bytes", "16GiB"]
    else:
        command += ["--lm-kv-bytes", "64MiB", "--lm-prefix-bytes", "64MiB"]
    with ValkeyServer() as valkey, (folder / "up.log").open("wb") as log:
        process = subprocess.Popen([*command, "--store", valkey.url], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            if until(lambda: b"is ready" in (folder / "up.log").read_bytes(), 180) is None:
                raise RuntimeError((folder / "up.log").read_text()[-2000:])
            yield url
        finally:
            process.terminate()
            process.wait(60)


def kill(folder: Path, service: str) -> bool:
    state = json.loads(next((folder / "data").glob("**/up.json")).read_text())
    os.kill(state["services"][service]["pid"], 9)
    return True


def until(true: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it is true; None: it never was."""
    import httpx2

    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if true():
                return round(time.monotonic() - began, 2)
        except (httpx2.TransportError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    return None


def picture(number: int) -> bytes:

    from PIL import Image, ImageDraw

    image = Image.new("RGB", (168, 112), (number * 37 % 255, 200, 90))
    ImageDraw.Draw(image).ellipse((20, 20, 60 + number % 40, 70), fill=(number * 91 % 255, 30, 160))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
