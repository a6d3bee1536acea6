"""The report of `lookonce plan`, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lookonce.cli.capacity import Choice, Placement, VllmPlacement, Workload
from lookonce.core.units import format_size
from lookonce.models.registry import Half
from lookonce.models.sizing import Economics, ModelSize, question_flops

PREFIX_SHARE = 0.75
"""Of the room for KV, kept for prefixes; the rest is for answers under way."""
_QUESTIONS = (1, 10, 100)
_WARM = ((0.0, 0.0), (0.0, 0.9), (0.5, 0.9), (0.9, 0.99), (0.99, 0.99))


def needs(
    size: ModelSize, work: Workload, width: int, height: int, dtype: str, stored: Mapping[Half, tuple[int, str]]
) -> Iterator[str]:
    """What each part of the system needs, wherever it runs. `stored` is bytes and form of the halves in the files."""
    vision, language = size.halves[Half.VISION], size.halves[Half.LANGUAGE]
    for name, half in (("vision weights", vision), ("language weights", language)):
        small = f"; in int8 {format_size(half.weight_bytes(dtype, int8=True))}" if size.dimensions.int8 else ""
        plain = format_size(half.weight_bytes(dtype))
        yield f"{name:<20}{plain:>10}  {half.parameters:,} parameters in {dtype}{small}"
    for kind, (nbytes, form) in sorted(stored.items()):
        if " " in form:  # quantised
            yield f"{f'{kind}, stored as':<20}{format_size(nbytes):>10}  {form}; dequantised when it is loaded"
    image = size.kv_bytes(work.image_tokens, dtype)
    yield f"{'KV per image':<20}{format_size(image):>10}  {work.image_tokens} tokens ({width}x{height})"
    question = size.kv_bytes(work.question_tokens, dtype)
    yield f"{'KV per question':<20}{format_size(question):>10}  {work.question_tokens} tokens of question and answer"
    yield f"{'KV per token':<20}{format_size(size.kv_bytes(1, dtype)):>10}"
    if state := size.state_bytes(dtype):
        yield f"{'recurrent state':<20}{format_size(state):>10}  of each prefix; twice that of each running sequence"
    record = size.embedding_bytes(work.image_tokens, dtype)
    yield f"{'store, 1,000 images':<20}{format_size(1000 * record):>10}  {format_size(record)} each, in {dtype}"


def table(found: Sequence[Placement], work: Workload, size: ModelSize) -> Iterator[str]:
    """One line for each placement."""
    names = [item.language.where + (" int8" if item.language.int8 else "") for item in found]
    width = max(18, *map(len, names))
    yield f"{'vision on':<12}{'need':>10}   {'language on':<{width}}{'need':>10}   verdict"
    for item, language in zip(found, names, strict=True):
        if item.fits:
            prefixes = int(item.kv_bytes * PREFIX_SHARE)
            of_image = size.kv_bytes(work.image_tokens, item.language.dtype) + size.state_bytes(item.language.dtype)
            images = prefixes // max(1, of_image)
            verdict = f"fits; {format_size(item.kv_bytes)} for KV, {images} images stay warm"
        else:
            verdict = f"{format_size(-item.spare)} too little"
        of_vision, of_language = format_size(item.vision_need.total), format_size(item.language_need.total)
        yield f"{item.vision.device.name:<12}{of_vision:>10}   {language:<{width}}{of_language:>10}   {verdict}"


def economics(size: ModelSize, work: Workload, prompt_tokens: int) -> Iterator[str]:
    """Work saved, by questions per image and by hit rates."""
    yield "questions per image   unsplit   with embeddings kept   with prefixes kept too   (work of encode and prefill)"
    for questions in _QUESTIONS:
        work_of = Economics.of(size, work.image_tokens, prompt_tokens, questions)
        kept, all_kept = work_of.unsplit / work_of.embeddings, work_of.unsplit / work_of.prefixes
        yield f"{questions:>19}   {'1.0 x':>7}   {kept:>18.1f} x   {all_kept:>20.1f} x"
    yield "prefix hits   embedding hits of the rest   work of one question"
    for prefix_hits, embedding_hits in _WARM:
        cost = question_flops(
            size, work.image_tokens, prompt_tokens, prefix_hits=prefix_hits, embedding_hits=embedding_hits
        )
        yield f"{prefix_hits:>10.0%}   {embedding_hits:>26.0%}   {cost / 1e12:>13.2f} TFLOP"


def commands(
    item: Placement, model: str, revision: str | None, adapter: str | None, store: str | None
) -> Iterator[str]:
    """How to start it: on one machine, and service by service."""
    prefixes = int(item.kv_bytes * PREFIX_SHARE)
    running = item.kv_bytes - prefixes
    further = {"revision": revision, "adapter": adapter}
    which = " ".join([f"--model {model}", *(f"--{name} {value}" for name, value in further.items() if value)])
    memory = f"kv-bytes {_mib(running)}", f"prefix-bytes {_mib(prefixes)}"
    yield "# on one machine"
    parts = [f"lookonce up {which}"]
    for name, choice in (("vision", item.vision), ("lm", item.language)):
        parts.append(f"--{name}-device{'-map' if choice.further else ''} {choice.where} --{name}-dtype {choice.dtype}")
        if choice.int8:
            parts.append(f"--{name}-quantization int8")
    parts += [f"--lm-{setting}" for setting in memory]
    parts += [f"--store {store}"] if store else []
    yield " ".join(parts)
    yield "# on machines of their own (and API keys for the gateway: docs/operations.md)"
    where = store or "redis://STORE:6379"
    yield _service("vision_service", item.vision, which, f"--listen 0.0.0.0:50051 --store {where}")
    tail = f"--listen 0.0.0.0:50052 --store {where} --vision VISION:50051 " + " ".join(f"--{one}" for one in memory)
    yield _service("lm_service", item.language, which, tail)
    yield f"python -m gateway --host 0.0.0.0 --vision VISION:50051 --lm LANGUAGE:50052 --store {where}"


def vllm(ways: Sequence[VllmPlacement], model: str, revision: str | None) -> Iterator[str]:
    """A line for each number of GPUs that may share the layers, and the command of the first that fits."""
    yield f"{'tensor parallel':<17}{'need on each':>13}{'memory share':>14}   verdict"
    for way in ways:
        short = format_size(way.least_kv - way.kv_bytes)
        verdict = f"fits; {format_size(way.kv_bytes)} for KV" if way.fits else f"{short} too little for KV"
        yield f"{way.tensor_parallel:<17}{format_size(way.need):>13}{way.memory_share:>14.2f}   {verdict}"
    best = next((way for way in ways if way.fits), None)
    if best is not None:
        which = f"--model {model}" + (f" --revision {revision}" if revision else "")
        parallel = f"--tensor-parallel {best.tensor_parallel} --gpu-memory-share {best.memory_share:.2f}"
        yield f"lookonce up {which} --engine vllm {parallel} --vision-device {best.vision}"


def _service(module: str, choice: Choice, which: str, tail: str) -> str:
    flag = "--device-map" if choice.further else "--device"
    # alone on its machine
    device = "cpu" if choice.device.is_cpu else choice.mapped([f"cuda:{at}" for at, _ in enumerate(choice.devices)])
    small = " --quantization int8" if choice.int8 else ""
    return f"python -m {module} {which} {flag} {device} --dtype {choice.dtype}{small} {tail}"


def _mib(size: int) -> str:
    return f"{size >> 20}MiB"
