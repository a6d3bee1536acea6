"""Build the parts, serve until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.process import heap_frozen, keep_freed_memory
from lookonce.core.rpc.server import Server
from lookonce.core.stores import Store, open_store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.tiered import TieredStore
from lookonce.core.telemetry.logs import serve_metrics
from lookonce.core.units import format_size
from lookonce.core.version import __version__
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.devices import choose_device, choose_dtype, dtype_name
from lookonce.models.family import VisionEncoder
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.models.quantization import check_usable, scheme
from lookonce.models.sizing import default_max_pixels
from protos.lookonce.v1 import common_pb2, vision_pb2, vision_pb2_grpc
from vision_service.core import CoreLimits, Model, VisionCore
from vision_service.images import Decoder, ImageLimits
from vision_service.servicer import VisionServicer
from vision_service.settings import VisionSettings

log = structlog.get_logger(__name__)
BATCH_PATCHES = {True: 2048, False: 16384}
"""By whether a CPU encodes: it gains nothing by more, and others wait longer for the first rows."""


@dataclass(frozen=True)
class Tower:
    """A loaded checkpoint and what it serves as."""

    checkpoint: Checkpoint
    encoder: VisionEncoder
    model: Model


def load(settings: VisionSettings) -> Tower:
    """Open the checkpoint and load its vision half. Raises LookonceError."""
    device = choose_device(settings.device)
    check_usable(settings.quantization, [device])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checked(settings.model, Half.VISION, settings.revision)
    dtype = choose_dtype(settings.dtype, [device], checkpoint.dtype)
    family = checkpoint.family
    model = Model(
        fingerprint=checkpoint.encoder_spec(dtype_name(dtype), scheme(settings.quantization, device)).fingerprint(),
        hidden_size=checkpoint.hidden_size,
        least_pixels=family.least_pixels(checkpoint.config),
        own_bounds=(checkpoint.min_pixels, checkpoint.max_pixels),
        bounds=_bounds(settings, checkpoint, device),
    )
    native = settings.kernels == "auto"
    encoder = family.load_encoder(checkpoint, dtype, device, quantization=settings.quantization, native=native)
    encoder.warm_up()
    return Tower(checkpoint, encoder, model)


def build(settings: VisionSettings, tower: Tower) -> VisionCore:
    """Put the core together. Call on the event loop it will run on."""
    store, shared = _open_stores(settings)
    return VisionCore(
        tower.model,
        tower.encoder,
        Decoder(ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_source_pixels)),
        store,
        shared=shared,
        limits=CoreLimits(
            decode_workers=settings.decode_workers,
            max_waiting=settings.max_waiting,
            batch_patches=settings.batch_patches or BATCH_PATCHES[tower.encoder.device.type == "cpu"],
            queue_patches=settings.queue_patches,
            batch_wait=settings.batch_wait_ms / 1000,
            lease_seconds=settings.lease_seconds,
        ),
    )


def _open_stores(settings: VisionSettings) -> tuple[Store, Store]:
    """What lookups go through (memory in front), and the tier that other processes see."""
    shared = open_store(settings.store, max_bytes=settings.store_bytes, ttl=settings.store_ttl)
    if settings.tensor_cache_bytes == 0 or settings.store.strip().startswith("memory:"):
        return shared, shared
    nearest = MemoryStore(settings.tensor_cache_bytes, ttl=settings.store_ttl, namespace="embeddings")
    return TieredStore([nearest, shared]), shared


def _description(settings: VisionSettings, tower: Tower) -> vision_pb2.VisionDescription:
    """Describe's answer, without the counters."""
    checkpoint, encoder = tower.checkpoint, tower.encoder
    return vision_pb2.VisionDescription(
        model=common_pb2.ModelDescription(
            name=checkpoint.name,
            checkpoint=checkpoint.identity,
            family=checkpoint.family.model_type,
            dtype=dtype_name(encoder.dtype),
            device=str(encoder.device),
            hidden_size=checkpoint.hidden_size,
            merge_size=checkpoint.merge_size,
            weight_bytes=checkpoint.weight_bytes(Half.VISION),
            version=__version__,
            instance=os.urandom(8).hex(),
            started_at=time.time(),
            quantization=scheme(settings.quantization, encoder.device),
        ),
        fingerprint=tower.model.fingerprint,
        min_pixels=tower.model.bounds[0],
        max_pixels=tower.model.bounds[1],
        max_image_bytes=settings.max_image_bytes,
        max_source_pixels=settings.max_source_pixels,
        stream_window=settings.stream_window,
    )


@asynccontextmanager
async def running(settings: VisionSettings) -> AsyncIterator[Server]:
    """The service, loaded and serving at `server.address`; released on leaving. Raises LookonceError."""
    started = time.monotonic()
    tower = await asyncio.to_thread(run_in_omp_thread, load, settings)
    keep_freed_memory()
    core = build(settings, tower)
    core.start()
    try:
        server = Server(settings.server)
        shrunk = _shrunk(settings, tower)
        servicer = VisionServicer(core, _description(settings, tower), shrunk=shrunk)
        server.add(
            "lookonce.v1.VisionEncoder",
            partial(vision_pb2_grpc.add_VisionEncoderServicer_to_server, servicer),
        )
        server.on_drain(servicer.drain)
        address = await server.start()
        if settings.metrics_listen is not None:
            serve_metrics(settings.metrics_listen)
        with heap_frozen():
            await server.set_serving(True)
            log.info(
                "ready",
                address=address,
                model=tower.checkpoint.name,
                device=str(tower.encoder.device),
                dtype=dtype_name(tower.encoder.dtype),
                weights=format_size(tower.checkpoint.weight_bytes(Half.VISION)),
                fingerprint=tower.model.fingerprint[:16],
                seconds=round(time.monotonic() - started, 2),
            )
            if shrunk is not None:
                log.info(
                    "large images are made smaller, because a CPU encodes them: --max-pixels changes that",
                    max_pixels=tower.model.bounds[1],
                    checkpoint_max_pixels=tower.model.own_bounds[1],
                    variable="LOOKONCE_VISION_MAX_PIXELS",
                )
            yield server
    finally:
        await core.close()


def _shrunk(settings: VisionSettings, tower: Tower) -> Callable[[int, int], bool] | None:
    """Whether an image of a width and height is made smaller for the CPU's sake; None: none is."""
    most, own = tower.model.bounds[1], tower.model.own_bounds[1]
    if settings.max_pixels is not None or most >= own:
        return None
    least, grid = tower.model.bounds[0], partial(tower.checkpoint.family.image_grid, tower.checkpoint.config)
    return lambda width, height: grid(width, height, least, own) != grid(width, height, least, most)


async def serve(settings: VisionSettings) -> None:
    """Serve until SIGTERM, drain. Raises LookonceError when it can't start."""
    async with running(settings) as server:
        await server.wait()
    log.info("stopped")


def _bounds(settings: VisionSettings, checkpoint: Checkpoint, device: torch.device) -> tuple[int, int]:
    most = settings.max_pixels or default_max_pixels(checkpoint.family, checkpoint.max_pixels, device.type)
    least = settings.min_pixels or min(checkpoint.min_pixels, most)
    if least > most:
        raise LookonceError(
            ErrorKind.INVALID_ARGUMENT, f"--min-pixels {least} is above max_pixels {most}: set --max-pixels too"
        )
    return least, most
