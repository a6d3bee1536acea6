"""The composition root of the vision service: `load` reads the model, `build` puts the parts together, `serve` runs
them."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from lookonce.core.errors import invalid
from lookonce.core.process import heap_frozen
from lookonce.core.rpc.server import Server
from lookonce.core.stores import Store, open_store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.tiered import TieredStore
from lookonce.core.units import format_size
from lookonce.core.version import __version__
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.devices import choose_device, choose_dtype, dtype_name
from lookonce.models.family import VisionEncoder
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.models.quantization import check_usable, scheme
from lookonce.models.self_check import check_encoder, watched
from lookonce.models.sizing import default_max_pixels
from protos.lookonce.v1 import common_pb2, vision_pb2, vision_pb2_grpc
from vision_service.core import Model, VisionCore
from vision_service.images import Decoder, ImageLimits
from vision_service.servicer import VisionServicer
from vision_service.settings import VisionSettings

log = structlog.get_logger(__name__)
SERVICE_NAME = "lookonce.v1.VisionEncoder"


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's vision half, and what it serves as."""

    checkpoint: Checkpoint
    encoder: VisionEncoder
    model: Model
    self_check: str = "off"  # what came of it


def load(settings: VisionSettings) -> LoadedModel:
    """Read the checkpoint's vision half (blocking). Raises LookonceError."""
    device = choose_device(settings.device)
    check_usable(settings.quantization, [device])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checked(settings.model, Half.VISION, settings.revision, settings.adapter)
    dtype = choose_dtype(settings.dtype, [device], checkpoint.dtype)
    model = Model(
        fingerprint=checkpoint.encoder_spec(dtype_name(dtype), scheme(settings.quantization, device)).fingerprint(),
        hidden_size=checkpoint.hidden_size,
        least_pixels=checkpoint.family.least_pixels(checkpoint.config),
        own_bounds=(checkpoint.min_pixels, checkpoint.max_pixels),
        bounds=_bounds(settings, checkpoint, device),
        tensors=checkpoint.embedding_tensors,
    )
    encoder, self_check = run_in_omp_thread(_encoder, settings, checkpoint, dtype, device)
    return LoadedModel(checkpoint, encoder, model, self_check)


def _encoder(
    settings: VisionSettings, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[VisionEncoder, str]:
    native = settings.kernels == "auto"
    if settings.self_check == "on":
        checkpoint = watched(checkpoint, Half.VISION, dtype)
    encoder = checkpoint.family.load_encoder(
        checkpoint, dtype, device, quantization=settings.quantization, native=native
    )
    encoder.warm_up()
    if settings.self_check == "off":
        return encoder, "off"
    return encoder, check_encoder(checkpoint, encoder, settings.quantization)


def build(settings: VisionSettings, loaded: LoadedModel) -> tuple[Server, VisionCore]:
    """Put the parts together, not started. Call on the event loop they will run on."""
    decoder = Decoder(ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_source_pixels))
    core = VisionCore(loaded.model, loaded.encoder, decoder, *_open_stores(settings), settings)
    servicer = VisionServicer(core, _description(settings, loaded), _shrunk(settings, loaded))
    server = Server(settings.server)
    server.add(SERVICE_NAME, partial(vision_pb2_grpc.add_VisionEncoderServicer_to_server, servicer))
    server.on_drain(servicer.drain)
    return server, core


@asynccontextmanager
async def running(settings: VisionSettings, loaded: LoadedModel) -> AsyncIterator[Server]:
    """The service, serving at `server.address`; released on leaving. Raises CONFLICT when the address can't be listened
    on."""
    server, core = build(settings, loaded)
    core.start()
    try:
        address = await server.start()
        with heap_frozen():
            await server.set_serving(True)
            log.info(
                "ready",
                address=address,
                model=loaded.checkpoint.name,
                device=str(loaded.encoder.device),
                dtype=dtype_name(loaded.encoder.dtype),
                weights=format_size(loaded.checkpoint.weight_bytes(Half.VISION)),
                fingerprint=loaded.model.fingerprint[:16],
                vision_weights=loaded.checkpoint.vision_weights,
                self_check=loaded.self_check,
            )
            if _shrunk(settings, loaded) is not None:
                log.info(
                    "large images are made smaller, because a CPU encodes them: --max-pixels changes that",
                    max_pixels=loaded.model.bounds[1],
                    checkpoint_max_pixels=loaded.model.own_bounds[1],
                    variable="LOOKONCE_VISION_MAX_PIXELS",
                )
            yield server
    finally:
        await core.close()


async def serve(settings: VisionSettings, loaded: LoadedModel) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises CONFLICT when the address can't be listened on."""
    async with running(settings, loaded) as server:
        await server.wait()
    log.info("stopped")


def _open_stores(settings: VisionSettings) -> tuple[Store, Store]:
    """What lookups go through (memory in front), and the tier that other processes see."""
    shared = open_store(settings.store, max_bytes=settings.store_bytes, ttl=settings.store_ttl)
    if settings.tensor_cache_bytes == 0 or settings.store.strip().startswith("memory:"):
        return shared, shared
    nearest = MemoryStore(settings.tensor_cache_bytes, ttl=settings.store_ttl, namespace="embeddings")
    return TieredStore([nearest, shared]), shared


def _description(settings: VisionSettings, loaded: LoadedModel) -> vision_pb2.VisionDescription:
    """Describe's answer, without the counters."""
    checkpoint, encoder = loaded.checkpoint, loaded.encoder
    return vision_pb2.VisionDescription(
        model=common_pb2.ModelDescription(
            name=checkpoint.name,
            checkpoint=checkpoint.encoder_identity,
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
            vision_weights=checkpoint.known_vision_weights(),
        ),
        fingerprint=loaded.model.fingerprint,
        min_pixels=loaded.model.bounds[0],
        max_pixels=loaded.model.bounds[1],
        max_image_bytes=settings.max_image_bytes,
        max_source_pixels=settings.max_source_pixels,
        stream_window=settings.stream_window,
        least_pixels=loaded.model.least_pixels,
    )


def _shrunk(settings: VisionSettings, loaded: LoadedModel) -> Callable[[int, int], bool] | None:
    """Whether an image of a width and height is made smaller for the CPU's sake; None: none is."""
    most, own = loaded.model.bounds[1], loaded.model.own_bounds[1]
    if settings.max_pixels is not None or most >= own:
        return None
    least, grid = loaded.model.bounds[0], partial(loaded.checkpoint.family.image_grid, loaded.checkpoint.config)
    return lambda width, height: grid(width, height, least, own) != grid(width, height, least, most)


def _bounds(settings: VisionSettings, checkpoint: Checkpoint, device: torch.device) -> tuple[int, int]:
    smallest = checkpoint.family.least_pixels(checkpoint.config)
    if settings.max_pixels is not None and settings.max_pixels < smallest:
        raise invalid(f"--max-pixels='{settings.max_pixels}': Input should be greater than or equal to {smallest}")
    most = settings.max_pixels or default_max_pixels(checkpoint.family, checkpoint.max_pixels, device.type)
    least = settings.min_pixels or min(checkpoint.min_pixels, most)
    if least > most:
        raise invalid(f"--min-pixels {least} is above max_pixels {most}: set --max-pixels too")
    return least, most
