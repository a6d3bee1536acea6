"""Which service fits on which device, from a model's size alone. Formulas and assumptions: docs/operations.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lookonce.families import Half
from lookonce.sizing import DTYPE_BYTES, ModelSize

GIB = 1 << 30
HEADROOM = 0.10
"""Of a device, left free."""
GPU_RUNTIME = 3 * GIB // 4
"""What CUDA, its kernels and its allocator take, in each process."""
CPU_RUNTIME = 400 << 20
"""What a process on the CPU holds beside its model."""
QUANTIZED = (False, True)
BATCH_PATCHES = 16384
BURST_TOKENS = 2048
L1_BYTES = 256 << 20
MAX_RUNNING = 128
"""The services' defaults of the settings of these names."""


@dataclass(frozen=True)
class Device:
    """A GPU or the CPU, and its bytes."""

    name: str  # "cuda:0" | "cpu"
    bytes: int

    @property
    def usable(self) -> int:
        """Bytes within the headroom."""
        return int(self.bytes * (1 - HEADROOM))

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        return self.name == "cpu"


@dataclass(frozen=True)
class Workload:
    """What is asked."""

    image_tokens: int
    question_tokens: int  # question and answer together
    concurrency: int  # questions under way at once


@dataclass(frozen=True)
class Need:
    """Bytes that one service takes on its device."""

    weights: int
    working: int  # activations, logits, embeddings at hand
    runtime: int
    least_kv: int = 0  # for one image's prefix and the questions under way

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.working + self.runtime + self.least_kv


@dataclass(frozen=True)
class Choice:
    """Where one service runs, and how."""

    device: Device
    dtype: str
    int8: bool


@dataclass(frozen=True)
class Placement:
    """Both services placed; `spare` is what its device leaves the language service for KV beyond the least."""

    vision: Choice
    language: Choice
    vision_need: Need
    language_need: Need
    spare: int

    @property
    def fits(self) -> bool:
        """Whether nothing is over."""
        return self.spare >= 0

    @property
    def kv_bytes(self) -> int:
        """All KV there is room for."""
        return self.language_need.least_kv + max(self.spare, 0)


def vision_need(size: ModelSize, choice: Choice, work: Workload) -> Need:
    """Weights, and the activations of the largest batch: two rows of the width and three of the MLP for each patch."""
    dims = size.architecture
    patches = max(BATCH_PATCHES, size.patches(work.image_tokens))
    row = dims.vision_width * (2 + 3 * dims.mlp_ratio) * DTYPE_BYTES[choice.dtype]
    weights = size.halves[Half.VISION].weight_bytes(choice.dtype, int8=choice.int8)
    return Need(weights, patches * row, _runtime(choice))


def language_need(size: ModelSize, choice: Choice, work: Workload) -> Need:
    """Weights; the activations of a prefill burst, logits of all sequences in float32 twice, embeddings at hand; KV."""
    dims = size.architecture
    burst = BURST_TOKENS * (4 * dims.hidden + 3 * dims.ffn) * DTYPE_BYTES[choice.dtype]
    logits = 2 * 4 * MAX_RUNNING * dims.vocab
    tokens = work.image_tokens + work.concurrency * work.question_tokens
    return Need(
        size.halves[Half.LANGUAGE].weight_bytes(choice.dtype, int8=choice.int8),
        burst + logits + L1_BYTES,
        _runtime(choice),
        size.kv_bytes(tokens, choice.dtype),
    )


def placements(size: ModelSize, devices: Sequence[Device], work: Workload, dtype: str | None) -> list[Placement]:
    """Every way to place the two services, best first: those that fit; unquantised; most room for KV. Of quantised
    ways, only those that nothing unquantised stands for."""
    found = [
        _place(
            size, Choice(vision, _dtype(vision, dtype), False), Choice(language, _dtype(language, dtype), int8), work
        )
        for vision, language in _pairs(devices)
        for int8 in QUANTIZED
    ]
    plain = {_key(item) for item in found if item.fits and not item.language.int8}
    useful = [item for item in found if not item.language.int8 or (_key(item) not in plain and item.fits)]
    return sorted(useful, key=_rank)


def _rank(item: Placement) -> tuple[bool, bool, bool, int]:
    on_cpu = item.language.device.is_cpu or item.vision.device.is_cpu
    return (not item.fits, on_cpu, item.language.int8, -item.spare)


def _key(item: Placement) -> tuple[str, str]:
    return item.vision.device.name, item.language.device.name


def _pairs(devices: Sequence[Device]) -> Iterator[tuple[Device, Device]]:
    """All pairs, those that differ only between devices of one size once."""
    seen = set()
    for vision in devices:
        for language in devices:
            kind = (vision.is_cpu, vision.bytes, language.is_cpu, language.bytes, vision is language)
            if kind not in seen:
                seen.add(kind)
                yield vision, language


def _place(size: ModelSize, vision: Choice, language: Choice, work: Workload) -> Placement:
    seeing, saying = vision_need(size, vision, work), language_need(size, language, work)
    spare = language.device.usable - saying.total
    if vision.device is language.device:
        spare -= seeing.total
    elif seeing.total > vision.device.usable:
        spare = min(spare, vision.device.usable - seeing.total)
    return Placement(vision, language, seeing, saying, spare)


def _dtype(device: Device, wanted: str | None) -> str:
    """What `auto` is taken to be: bfloat16 on a GPU, float32 on a CPU."""
    return wanted or ("float32" if device.is_cpu else "bfloat16")


def _runtime(choice: Choice) -> int:
    return CPU_RUNTIME if choice.device.is_cpu else GPU_RUNTIME
