"""`lookonce plan`: what a model needs and where it fits, before anything but its config is downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lookonce.cli.console import fail, say
from lookonce.core.errors import LookonceError, invalid
from lookonce.core.units import split_list

if TYPE_CHECKING:
    from lookonce.cli.capacity import Device, Placement, Workload
    from lookonce.models.sizing import ModelSize

HELP = """Say what a model needs and which placement fits; reads its config, no weights.

\b
  lookonce plan --model Qwen/Qwen2-VL-7B-Instruct --gpus 24,80
  lookonce plan --model ./my-finetune --ram 64 --image 1280x960
  lookonce plan --model Qwen/Qwen2-VL-72B-Instruct --gpus 80,80,80 --json
  lookonce plan --model Qwen/Qwen2-VL-72B-Instruct --gpus 80,80,80,80 --engine vllm

Prints weights, KV and store by image, question and 1,000 images; each placement with its verdict; what hits save; and
the commands that start the best one. A language half that no single GPU holds is spread over several. Exit status 1
when nothing fits. docs/operations.md has the formulas.
"""
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def plan(
    model: Annotated[str, typer.Option(envvar="LOOKONCE_MODEL", metavar="MODEL", help="Local directory or hub id.")],
    revision: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_REVISION", metavar="VALUE", help="Branch, tag or commit of a hub id.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(envvar="LOOKONCE_ADAPTER", metavar="ADAPTER", help="LoRA adapter to merge: directory or hub id."),
    ] = None,
    gpus: Annotated[str, typer.Option(metavar="GIB,...", help="Memory of each GPU, in GiB.")] = "",
    ram: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.1, help="Memory for services on the CPU; unset: none do.")
    ] = None,
    image: Annotated[str, typer.Option(metavar="WxH", help="Size of an image, in pixels.")] = "1024x1024",
    question_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a question.")] = 30,
    answer_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Questions under way at once.")] = 32,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16, float16; unset: as the services choose."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="ENGINE", help="vllm: the language half by vLLM, over how many GPUs and what share.")
    ] = "auto",
    store: Annotated[str | None, typer.Option(metavar="URL", help="Store, for the commands.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON.")] = False,
) -> None:
    """Plan a placement."""
    from lookonce.cli import plan_report
    from lookonce.cli.capacity import Workload, placements
    from lookonce.models.checkpoint.adapter import open_adapter
    from lookonce.models.checkpoint.check import check_settings, stored_halves
    from lookonce.models.family import served_plain, unpacked_reason, unserved_by_vllm
    from lookonce.models.sizing import DTYPE_BYTES, size_of

    try:
        devices = _devices(gpus, ram)
        width, height = _pixels(image)
        if dtype is not None and dtype not in DTYPE_BYTES:
            raise invalid(f"--dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}", param="dtype")
        family, config, preprocessor = check_settings(model, revision, adapter)
        untied = adapter is not None and open_adapter(adapter, family).unties
        size = size_of(family, config, preprocessor, untied=untied)
        unpacked = unpacked_reason(family, config)
    except LookonceError as error:
        fail(error.message)
    if engine == "vllm" and (reason := unserved_by_vllm(family)) is not None:
        fail(f"--engine vllm: {reason}")
    work = Workload(size.image_tokens(width, height), question_tokens + answer_tokens, concurrency)
    if engine == "vllm":
        _plan_vllm(size, devices, work, dtype, (width, height), model, revision, as_json=as_json)
    found = placements(size, devices, work, dtype)
    best = found[0]
    shown = dtype or best.language.dtype
    if as_json:
        say(json.dumps([_as_json(item) for item in found], indent=2))
        raise typer.Exit(0 if best.fits else 1)
    sections: list[Iterable[str]] = [
        plan_report.needs(size, work, width, height, shown, stored_halves(model, revision)),
        plan_report.table(found, work, size),
        plan_report.economics(size, work, question_tokens),
    ]
    if unpacked is not None:
        sections.insert(0, [served_plain(unpacked)])
    if best.fits:
        sections.append(plan_report.commands(best, model, revision, adapter, store))
    say("\n\n".join("\n".join(section) for section in sections))
    if not best.fits:
        fail("nothing fits: give larger devices, smaller --image or --concurrency, or a smaller model")


def _plan_vllm(
    size: ModelSize,
    devices: Sequence[Device],
    work: Workload,
    dtype: str | None,
    pixels: tuple[int, int],
    model: str,
    revision: str | None,
    *,
    as_json: bool,
) -> NoReturn:
    """The same for `--engine vllm`."""
    from lookonce.cli import plan_report
    from lookonce.cli.capacity import vllm_placements
    from lookonce.models.checkpoint.check import stored_halves

    ways = vllm_placements(size, devices, work, dtype)
    if not ways:
        fail("--engine vllm: give --gpus, the memory of each GPU")
    if as_json:
        say(json.dumps([asdict(way) | {"fits": way.fits} for way in ways], indent=2))
    else:
        stored = stored_halves(model, revision)
        needs = plan_report.needs(size, work, *pixels, dtype or ways[0].dtype, stored)
        say("\n\n".join("\n".join(part) for part in (needs, plan_report.vllm(ways, model, revision))))
    if not any(way.fits for way in ways):
        fail("nothing fits: give larger or more GPUs, smaller --image or --concurrency, or a smaller model")
    raise typer.Exit(0)


def _as_json(item: Placement) -> dict[str, Any]:
    return asdict(item) | {"fits": item.fits, "language_device": item.language.where}


def _devices(gpus: str, ram: float | None) -> list[Device]:
    from lookonce.cli.capacity import GIB, Device

    devices = []
    for index, text in enumerate(split_list(gpus)):
        if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text) or float(text) == 0:
            raise invalid(f"--gpus must be GiB separated by commas, such as 24,80; got {text!r}", param="gpus")
        devices.append(Device(f"cuda:{index}", int(float(text) * GIB)))
    if ram is None and not devices:
        raise invalid("give --gpus, --ram or both: the memory there is", param="gpus")
    return [*devices, Device("cpu", int(ram * GIB))] if ram is not None else devices


def _pixels(image: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(image)
    if match is None:
        raise invalid(f"--image must be WIDTHxHEIGHT, such as 1024x768; got {image!r}", param="image")
    return int(match[1]), int(match[2])
