"""What `lookonce doctor` looks at. Each check answers findings; none raises for a bad machine or a bad setting."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lookonce.cli.network import check_port_free
from lookonce.cli.rundir import DataDirectory, find_running
from lookonce.core.dtypes import auto_dtype
from lookonce.core.errors import LookonceError
from lookonce.core.units import format_size
from lookonce.models.sizing import DTYPE_BYTES, default_max_pixels

if TYPE_CHECKING:
    from lookonce.models.checkpoint import Checkpoint

PROCESS_OVERHEAD = 600 << 20
"""Bytes that a model service takes besides its weights: interpreter, torch, activations of one image."""
WEIGHTS_MARGIN = 1.15
_TORCH_SECONDS = 120


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do when it isn't ok."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    """All is well."""
    return Finding(check, Status.OK, detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    """Works, but not as well as it could."""
    return Finding(check, Status.WARN, detail, remedy)


def bad(check: str, detail: str, remedy: str) -> Finding:
    """Won't work."""
    return Finding(check, Status.FAIL, detail, remedy)


def check_python() -> Iterator[Finding]:
    """The interpreter: older ones than are supported come no further than our imports."""
    yield ok("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")


def torch_report() -> dict[str, Any] | None:
    """What torch sees, asked in a process of its own; None when it can't be imported."""
    command = [sys.executable, "-P", "-m", "lookonce.cli.torch_report"]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TORCH_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None
    return report


def check_torch(report: dict[str, Any] | None) -> Iterator[Finding]:
    """Whether torch runs, and with how many threads."""
    if report is None:
        yield bad("torch", "cannot be imported", "run `make setup` again, or `pip install torch` for this platform")
        return
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    text = f"{report['version']}, {report['threads']} threads on {cores} cores"
    if report["threads"] > (os.cpu_count() or 1):
        yield warn("torch", text, "more threads than cores slow it down: set --threads or OMP_NUM_THREADS")
    else:
        yield ok("torch", text)


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    """Instruction sets that decide speed."""
    try:
        flags = set(re.findall(r"[a-z0-9_]+", cpuinfo.read_text(errors="replace").lower()))
    except OSError:
        yield ok("cpu", f"{platform.processor() or platform.machine()} (features not readable here)")
        return
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    found = [flag for flag in known if flag in flags]
    text = f"{' '.join(found) or 'no vector features seen'}; dtype auto is {auto_dtype('cpu', 'bfloat16')} on the CPU"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        yield warn("cpu", text, "without AVX2 expect several times slower answers; use a GPU or a newer machine")
    else:
        yield ok("cpu", text)


def check_cuda(report: dict[str, Any] | None, driver: Path = Path("/proc/driver/nvidia/version")) -> Iterator[Finding]:
    """GPU, driver and torch build fit each other."""
    installed = driver.is_file()
    if report is None:
        return
    if report["available"]:
        for index, gpu in enumerate(report["gpus"]):
            memory = f"{format_size(gpu['free'])} of {format_size(gpu['total'])} free"
            dtype = auto_dtype("cuda", "bfloat16", _capability(gpu))
            text = f"cuda:{index} {gpu['name']}, capability {gpu['capability']}, {memory}; dtype auto is {dtype}"
            yield ok("cuda", f"{text} (float32 if stored so)" if dtype != "float32" else text)
    elif not installed:
        yield ok("cuda", "no NVIDIA driver on this machine: the CPU is used")
    elif report["cuda"] is None:
        yield warn(
            "cuda", "there is a GPU, but torch is built for the CPU", "install a CUDA build: https://pytorch.org"
        )
    else:
        version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text(errors="replace").partition("Module")[2])
        text = f"torch is built for CUDA {report['cuda']}, driver {version[0] if version else 'unknown'} can't run it"
        yield bad("cuda", text, "update the driver, or install a torch build for an older CUDA")


def _capability(gpu: dict[str, Any]) -> tuple[int, int]:
    major, minor = str(gpu["capability"]).split(".")
    return int(major), int(minor)


def _auto_dtype(report: dict[str, Any] | None, stored: str) -> str:
    """Of services that start here with their defaults: on the first GPU if there is one."""
    gpus = (report or {}).get("gpus") or []
    return auto_dtype("cuda", stored, _capability(gpus[0])) if gpus else auto_dtype("cpu", stored)


def available_memory() -> int:
    """Bytes that new processes may take: what is free, within this container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(limit - used, 0))


def check_checkpoint(
    model: str | None, revision: str | None, report: dict[str, Any] | None = None, adapter: str | None = None
) -> tuple[list[Finding], dict[str, int]]:
    """All that keeps a model from being served, and the bytes of each half's weights once loaded. A hub id is looked
    for in the cache, never fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub library is imported
    from lookonce.cli.model import default_model, identify
    from lookonce.models.checkpoint import check
    from lookonce.models.checkpoint.hub import is_repository
    from lookonce.models.family import served_plain

    try:
        source = model or default_model()
        halves = check.check_checkpoint(source, revision=revision, adapter=adapter).usable()
        resolved = identify(source, halves)
    except LookonceError as error:
        if model is None:
            return [warn("checkpoint", "none given", "name one with --model")], {}
        if is_repository(model) and not Path(model).exists() and "can't be reached" in error.message:
            return [warn("checkpoint", f"{model} is not in the hub cache", "`lookonce up` will download it")], {}
        return [_unusable(problem) for problem in getattr(error, "problems", (error.message,))], {}
    sizes, shown = {}, []
    for half, checkpoint in halves.items():
        dtype = _auto_dtype(report, checkpoint.dtype)
        parameters = sum(math.prod(entry.shape) for entry in checkpoint.half_entries(half).values())
        sizes[half.value] = parameters * DTYPE_BYTES[dtype]
        stored = format_size(checkpoint.weight_bytes(half))
        storage = checkpoint.storage(half)
        dequantised = "" if storage == checkpoint.dtype else f", {format_size(sizes[half.value])} in memory"
        shown.append(f"{half.value} {stored} in {storage}, computes in {dtype}{dequantised}")
    detail = f"{resolved.name}: whole, both halves of one model ({'; '.join(shown)}); {resolved.identity[:23]}"
    if resolved.adapter is not None:
        detail += f"; adapter {resolved.adapter} merged into it"
    found = [ok("checkpoint", detail), *_image_size(next(iter(halves.values())), report)]
    if resolved.unpacked is not None:
        found.append(warn("engine", served_plain(resolved.unpacked), "more replicas serve more requests at a time"))
    return found, sizes


def check_vllm(
    model: str | None, revision: str | None, report: dict[str, Any] | None, python: Path | None = None
) -> Iterator[Finding]:
    """vLLM's environment, and over how many of the GPUs here it may share this model's layers."""
    from lookonce.cli.model import default_model
    from lookonce.cli.vllm_environment import REMEDY, SUPPORTED, installed, tensor_parallel_sizes, vllm_python
    from lookonce.models.checkpoint.check import check_settings
    from lookonce.models.family import unserved_by_vllm

    try:
        found = installed(vllm_python(python, os.environ))
    except LookonceError as error:
        what, _, remedy = error.message.partition("; ")
        yield bad("vllm", what, remedy)
        return
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        yield bad("vllm", f"its environment does not run: {error}", REMEDY)
        return
    text = f"{found['vllm']}, transformers {found['transformers']}, torch {found['torch']}"
    if found["vllm"] is None or not found["lookonce"]:
        yield bad("vllm", f"its environment lacks {'vLLM' if found['vllm'] is None else 'lookonce'}", REMEDY)
    elif found["vllm"].partition("+")[0] != SUPPORTED:
        yield warn("vllm", text, f"the engine was written to and tested with {SUPPORTED}: {REMEDY}")
    else:
        yield ok("vllm", text)
    try:
        family, config, _ = check_settings(model or default_model(), revision, None)
    except LookonceError:
        return  # the checkpoint's own line says so
    if (reason := unserved_by_vllm(family)) is not None:
        what, _, remedy = reason.partition("; ")
        yield bad("engine", f"vllm: {what}", remedy)
        return
    dims, gpus = family.dimensions(config), len((report or {}).get("gpus") or [])
    sizes = tensor_parallel_sizes(dims.heads, dims.kv_heads, max(gpus, 1))
    where = f"--tensor-parallel {' or '.join(map(str, sizes))} on the {gpus} GPUs here" if gpus else "on the CPU"
    yield ok("engine", f"vllm: {where}")


def _unusable(problem: str) -> Finding:
    what, _, remedy = problem.rpartition("; ")
    return bad("checkpoint", what or remedy, remedy if what else "take it from the model's repository again")


def _image_size(checkpoint: Checkpoint, report: dict[str, Any] | None) -> Iterator[Finding]:
    """How large images are encoded: smaller ones on a CPU than the checkpoint's own max_pixels allows for."""
    own = checkpoint.max_pixels
    most = default_max_pixels(checkpoint.family, own, "cuda" if (report or {}).get("available") else "cpu")
    if most < own:
        detail = f"resized to {most} pixels at most, because a CPU encodes them; the checkpoint allows for {own}"
        yield warn("images", detail, f"--max-pixels {own} keeps them large: minutes for a photograph on few cores")
    else:
        yield ok("images", f"resized to {most} pixels at most, as the checkpoint says")


def check_memory(sizes: dict[str, int], report: dict[str, Any] | None) -> Iterator[Finding]:
    """Each service's need against what is free, on the first GPU if there is one."""
    if not sizes:
        yield ok("memory", f"{format_size(available_memory())} free")
        return
    gpus = (report or {}).get("gpus") or []
    free = int(gpus[0]["free"]) if gpus else available_memory()
    place = "on cuda:0" if gpus else "in RAM"
    needs = {name: round(size * WEIGHTS_MARGIN) + PROCESS_OVERHEAD for name, size in sizes.items()}
    text = ", ".join(f"{name} {format_size(need)}" for name, need in needs.items())
    total = sum(needs.values())
    detail = f"need about {text}; {format_size(free)} free {place}"
    if total <= free:
        yield ok("memory", detail)
    elif max(needs.values()) <= free:
        yield bad(
            "memory", detail, "both don't fit together: --dtype bfloat16, or put the services on two machines or GPUs"
        )
    else:
        yield bad("memory", detail, "use a smaller model, --dtype bfloat16, or a machine with more memory")


def check_data_dir(directory: Path) -> Iterator[Finding]:
    """Writable, with room, and where the sockets will be."""
    path = directory.expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield bad(
            "data dir", f"{path}: {existing} is not a directory you may write to", "choose another with --data-dir"
        )
        return
    free = psutil.disk_usage(str(existing)).free
    sockets = (
        "unix sockets"
        if DataDirectory(path).socket_address("language")
        else "loopback ports (path too long for sockets)"
    )
    detail = f"{path}, {format_size(free)} free on disk, {sockets}"
    if free < 2 << 30:
        yield warn("data dir", detail, "the embedded store may fill the disk: free some, or set --store-bytes")
    else:
        yield ok("data dir", detail)


def embedded_store(directory: Path) -> Finding:
    """The store when none is named."""
    return ok("store", f"embedded, in {directory.expanduser().absolute() / 'store'}")


async def check_store(url: str) -> list[Finding]:
    """Whether the store answers."""
    from lookonce.core.stores import open_store
    from lookonce.core.telemetry.logs import configure_logging

    configure_logging("doctor", "warning")  # stdout is for the findings
    shown = re.sub(r"//[^@/\s]*@", "//***@", url)
    try:
        store = open_store(url, namespace="doctor")
    except LookonceError as error:
        return [bad("store", f"{shown}: {error.message}", "correct --store (or LOOKONCE_STORE)")]
    except OSError as error:
        return [bad("store", f"{shown}: cannot be opened ({error.strerror})", "choose a directory you may write to")]
    try:
        reachable = await store.ping()
    finally:
        await store.close()
    if reachable:
        return [ok("store", f"{shown} answers")]
    return [bad("store", f"{shown} does not answer", "start it, or correct host, port, password and TLS in --store")]


def check_port(host: str, port: int, directory: Path) -> Iterator[Finding]:
    """Whether the gateway could listen."""
    running = find_running(directory)
    if running is not None and running.url.endswith(f":{port}"):
        yield ok("port", f"{port} is served by the running system (process {running.pid})")
        return
    try:
        check_port_free(host, port)
    except LookonceError as error:
        yield bad("port", error.message, "choose another with --port")
    else:
        yield ok("port", f"{host}:{port} is free")
