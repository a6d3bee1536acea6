"""Which service fits on which device, from a model's size alone. Formulas and assumptions: docs/operations.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lookonce.cli.vllm_environment import tensor_parallel_sizes
from lookonce.core.dtypes import auto_dtype
from lookonce.core.layer_split import Share, consecutive, spread
from lookonce.models.registry import Half
from lookonce.models.sizing import DTYPE_BYTES, ModelSize

GIB = 1 << 30
HEADROOM = 0.10
"""Of a device, left free."""
GPU_RUNTIME = 3 * GIB // 4
"""What CUDA, its kernels and its allocator take, in each process."""
CPU_RUNTIME = 400 << 20
"""What a process on the CPU holds beside its model."""
BATCH_PATCHES = {True: 2048, False: 16384}  # by whether on a CPU
BURST_TOKENS = 4096
TENSOR_CACHE_BYTES = 256 << 20
MAX_RUNNING = 128
"""The services' defaults of the settings of these names; a test holds them equal."""


@dataclass(frozen=True)
class Device:
    """A GPU or the CPU, and its bytes."""

    name: str  # "cuda:0" | "cpu"
    bytes: int

    @property
    def usable(self) -> int:
        return int(self.bytes * (1 - HEADROOM))

    @property
    def is_cpu(self) -> bool:
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
    working: int  # activations, logits, embeddings at hand: on each device
    runtime: int  # on each device
    least_kv: int = 0  # for one image's prefix and the questions under way
    devices: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.least_kv + self.devices * (self.working + self.runtime)


@dataclass(frozen=True)
class VllmPlacement:
    """The language half over so many equal GPUs by vLLM, the vision service on one of its own, or on the last of them;
    `kv_bytes` are what all of them have for KV."""

    tensor_parallel: int
    vision: str
    dtype: str
    memory_share: float  # of each GPU, what vLLM may fill
    need: int  # bytes on each GPU: weights, activations, runtime
    kv_bytes: int
    least_kv: int

    @property
    def fits(self) -> bool:
        return self.kv_bytes >= self.least_kv


@dataclass(frozen=True)
class Choice:
    """Where one service runs, and how."""

    device: Device
    dtype: str
    int8: bool
    further: tuple[Device, ...] = ()  # more devices its layers are spread over
    layers: tuple[int, ...] = ()  # on each of them, if there are more

    @property
    def devices(self) -> tuple[Device, ...]:
        """All, in the order of the layers."""
        return self.device, *self.further

    @property
    def where(self) -> str:
        """The device, or the value of device_map."""
        return self.mapped([device.name for device in self.devices])

    def mapped(self, names: Sequence[str]) -> str:
        """The same on devices of these names."""
        if not self.further:
            return names[0]
        return ",".join(str(Share(*pair)) for pair in zip(names, consecutive(self.layers), strict=True))


@dataclass(frozen=True)
class Placement:
    """Both services placed; `spare` is what its devices leave the language service for KV beyond the least."""

    vision: Choice
    language: Choice
    vision_need: Need
    language_need: Need
    spare: int

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def kv_bytes(self) -> int:
        return self.language_need.least_kv + max(self.spare, 0)


def vision_need(size: ModelSize, choice: Choice, work: Workload) -> Need:
    """Weights, and the activations of the largest batch."""
    patches = max(BATCH_PATCHES[choice.device.is_cpu], size.patches(work.image_tokens))
    working = patches * size.dimensions.patch_numbers * DTYPE_BYTES[choice.dtype]
    weights = size.halves[Half.VISION].weight_bytes(choice.dtype, int8=choice.int8)
    return Need(weights, working, _runtime(choice))


def language_need(size: ModelSize, choice: Choice, work: Workload) -> Need:
    """Weights; the activations of a prefill burst, logits of all sequences in float32 twice, embeddings at hand; KV."""
    dims = size.dimensions
    burst = BURST_TOKENS * (4 * dims.hidden + 3 * dims.ffn) * DTYPE_BYTES[choice.dtype]
    logits = 2 * 4 * MAX_RUNNING * dims.vocabulary
    tokens = work.image_tokens + work.concurrency * work.question_tokens
    states = (1 + 2 * work.concurrency) * size.state_bytes(choice.dtype)  # steps write theirs beside what they read
    return Need(
        size.halves[Half.LANGUAGE].weight_bytes(choice.dtype, int8=choice.int8),
        burst + logits + TENSOR_CACHE_BYTES,
        _runtime(choice),
        size.kv_bytes(tokens, choice.dtype) + states,
        len(choice.devices),
    )


def placements(size: ModelSize, devices: Sequence[Device], work: Workload, dtype: str | None) -> list[Placement]:
    """Every way to place the two services, best first: those that fit; unquantised; most room for KV. Of quantised
    ways, only those that nothing unquantised stands for; ways over several GPUs only where no single one will do. What
    the family can't be served as is none."""
    found = [
        _place(size, _choice(size, vision, dtype), _choice(size, language, dtype, int8), work)
        for vision, language in _pairs(devices)
        for int8 in _int8(size)
    ]
    on_one = any(item.fits and not item.language.int8 and not item.language.device.is_cpu for item in found)
    if not on_one and not size.dimensions.recurrent:
        found += _spread_placements(size, devices, work, dtype)
    plain = {_key(item) for item in found if item.fits and not item.language.int8}
    useful = [item for item in found if not item.language.int8 or (_key(item) not in plain and item.fits)]
    return sorted(useful, key=_rank)


def _int8(size: ModelSize) -> tuple[bool, ...]:
    return (False, True) if size.dimensions.int8 else (False,)


def _rank(item: Placement) -> tuple[bool, bool, bool, bool, int]:
    on_cpu = item.language.device.is_cpu or item.vision.device.is_cpu
    return (not item.fits, on_cpu, item.language.int8, bool(item.language.further), -item.spare)


def _choice(size: ModelSize, device: Device, dtype: str | None, int8: bool = False) -> Choice:
    return Choice(device, dtype or auto_dtype("cpu" if device.is_cpu else "cuda", size.stored), int8)


def _key(item: Placement) -> tuple[str, str]:
    return item.vision.device.name, " ".join(device.name for device in item.language.devices)


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
    of_vision, of_language = vision_need(size, vision, work), language_need(size, language, work)
    spare = language.device.usable - of_language.total
    if vision.device is language.device:
        spare -= of_vision.total
    elif of_vision.total > vision.device.usable:
        spare = min(spare, vision.device.usable - of_vision.total)
    return Placement(vision, language, of_vision, of_language, spare)


def _spread_placements(
    size: ModelSize, devices: Sequence[Device], work: Workload, dtype: str | None
) -> list[Placement]:
    """The language service over all GPUs, or all but the vision service's; in int8 if it fits in no other way."""
    gpus = [device for device in devices if not device.is_cpu]
    sets = {vision: (gpus, [gpu for gpu in gpus if gpu is not vision]) for vision in _unlike(devices)}
    ways = [(vision, chosen) for vision, both in sets.items() for chosen in both]
    ways = [way for at, way in enumerate(ways) if 1 < len(way[1]) <= size.dimensions.layers and way not in ways[:at]]
    found: list[Placement] = []
    for int8 in _int8(size):
        if not any(item.fits for item in found):
            found += [
                _place_spread(size, _choice(size, vision, dtype), _choice(size, chosen[0], dtype, int8), chosen, work)
                for vision, chosen in ways
            ]
    return found


def _unlike(devices: Sequence[Device]) -> list[Device]:
    """Devices of which no two are of one size with others both before and behind them."""
    ends = (devices[0], devices[-1])
    inner = {(device.is_cpu, device.bytes): device for device in reversed(devices) if device not in ends}
    return [device for device in devices if device in ends or device in inner.values()]


def _place_spread(
    size: ModelSize, vision: Choice, language: Choice, devices: Sequence[Device], work: Workload
) -> Placement:
    """As the service spreads its layers (`lookonce.core.layer_split`), knowing what else is on each device."""
    layers = size.dimensions.layers
    language = replace(language, further=tuple(devices[1:]))
    of_vision, of_language = vision_need(size, vision, work), language_need(size, language, work)
    table = size.table_parameters * DTYPE_BYTES[language.dtype]
    free_bytes = [device.usable - of_language.working - of_language.runtime for device in devices]
    free_bytes[0] -= table
    free_bytes[-1] -= 0 if size.tied else table
    for at, device in enumerate(devices):
        free_bytes[at] -= of_vision.total if device is vision.device else 0
    counts = [len(part) for part in spread(free_bytes, layers)]
    weights, least = size.layer_bytes(language.dtype, int8=language.int8), of_language.least_kv // layers
    left = [room - count * (weights + least) for room, count in zip(free_bytes, counts, strict=True)]
    if vision.device not in devices:
        left.append(min(0, vision.device.usable - of_vision.total))
    # KV is the same for every layer: the device with least for each of its own bounds all
    spare = min(left) if min(left) < 0 else min(one * layers // count for one, count in zip(left, counts, strict=False))
    return Placement(vision, replace(language, layers=tuple(counts)), of_vision, of_language, spare)


def vllm_placements(
    size: ModelSize, devices: Sequence[Device], work: Workload, dtype: str | None
) -> list[VllmPlacement]:
    """Ways to share the layers over the GPUs, the largest first: fewest first. Weights and KV are divided evenly,
    activations and runtime are not; KV heads that are fewer than GPUs are repeated."""
    gpus = sorted((device for device in devices if not device.is_cpu), key=lambda device: -device.bytes)
    dims, found = size.dimensions, []
    for count in tensor_parallel_sizes(dims.heads, dims.kv_heads, len(gpus)) if gpus else ():
        smallest, alone = gpus[count - 1], count < len(gpus)
        choice = _choice(size, smallest, dtype)
        need, vision = language_need(size, choice, work), vision_need(size, choice, work)
        room = smallest.usable - (0 if alone else vision.total)
        each = need.weights // count + need.working + need.runtime
        found.append(
            VllmPlacement(
                tensor_parallel=count,
                vision=(gpus[-1] if alone else smallest).name,
                dtype=choice.dtype,
                memory_share=max(0, math.floor(100 * room / smallest.bytes)) / 100,
                need=each,
                kv_bytes=max(0, room - each) * count // max(1, count // dims.kv_heads),
                least_kv=need.least_kv,
            )
        )
    return found


def _runtime(choice: Choice) -> int:
    return CPU_RUNTIME if choice.device.is_cpu else GPU_RUNTIME
