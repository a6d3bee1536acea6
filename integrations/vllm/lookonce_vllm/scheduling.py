"""The scheduler's half of the connector: which images are loaded, pinned, and handed to the workers."""

from __future__ import annotations

import logging
import re
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lookonce_vllm.loading import Loader, Unusable, Wanted
from lookonce_vllm.settings import read_settings
from lookonce_vllm.shelf import Shelf, Slot

if TYPE_CHECKING:
    from vllm.config import ECTransferConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)
_KEY = re.compile(r"[0-9a-f]{64}")
_GRIDS = ("image_grid_thw", "video_grid_thw")
_PIXELS = ("pixel_values", "pixel_values_videos", "image_embeds", "video_embeds")
_STEPS_UNDER_WAY = 8
"""A slot stays for so many steps after the one it was handed out for: vLLM schedules ahead of its workers."""
_KNOWN = 100_000
"""Embeddings whose grid is remembered once they are off the shelf: some 30 MB."""


@dataclass
class _Load:
    """One embedding being loaded, and the requests that wait for it."""

    future: Future[Slot]
    waiting: set[str] = field(default_factory=set)


class Scheduling:
    """All of it runs in the thread of vLLM's scheduler and never blocks."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Raises ValueError for a configuration that can't work, naming the option."""
        settings = read_settings(dict(_checked(vllm_config).ec_connector_extra_config))
        self._shelf = Shelf(settings.shelf, settings.shelf_bytes)
        wanted = Wanted(_width(vllm_config), vllm_config.model_config.dtype, settings.fingerprint)
        self._only_references = settings.only_references
        self._loader = Loader(settings, wanted, self._shelf.write)
        self._loads: dict[str, _Load] = {}
        self._known: dict[str, tuple[tuple[int, ...], int]] = {}  # grid and rows of what was on the shelf
        self._failed: dict[str, str] = {}
        self._slots: dict[str, Slot] = {}
        self._steps: deque[list[str]] = deque()
        self._step = 0

    def ready(self, request: Request, computed: int) -> bool:
        """Whether every image that reaches past `computed` tokens is on the shelf, pinned for the request, and every
        image is what the request says. Loads what is missing. A request that can't become ready is in `take_failed`."""
        rid = request.request_id
        if rid in self._failed:
            return False
        states = [self._feature_ready(rid, feature, computed) for feature in request.mm_features]
        return all(states)

    def _feature_ready(self, rid: str, feature: MultiModalFeatureSpec, computed: int) -> bool:
        if not _is_reference(feature):
            return not self._only_references or self._fail(rid, "it brings pixels or rows, and only_references is set")
        key, place = _key(feature), feature.mm_position
        if key is None:
            return self._fail(rid, "the uuid of image_embeds must be an embedding key, 64 hexadecimal characters")
        self._settle(key)
        slot = self._shelf.get(key)
        known = self._known.get(key) if slot is None else (slot.grid_thw, slot.tokens)
        if known is not None and known != (_grid(feature), place.get_num_embeds()):
            return self._fail(rid, f"embedding {key}: its grid and rows are {known}, the request's {_grid(feature)}")
        if place.offset + place.length <= computed and known is not None:
            return True  # its KV is there
        if slot is None:
            if rid not in self._failed:
                load = self._loads.get(key) or _Load(self._loader.start(key))
                load.waiting.add(rid)
                self._loads[key] = load
            return False
        self._shelf.pin(key, rid)
        return True

    def _settle(self, key: str) -> None:
        """Take what has been loaded."""
        load = self._loads.get(key)
        if load is None or not load.future.done():
            return
        del self._loads[key]
        try:
            slot = load.future.result()
        except Unusable as error:
            reason = f"embedding {key}: {error}"
        except Exception:
            log.exception("loading embedding %s", key)
            reason = f"embedding {key}: it could not be loaded"
        else:
            self._shelf.put(key, slot)
            self._remember(key, slot)
            return
        for rid in load.waiting:
            self._fail(rid, reason)

    def _remember(self, key: str, slot: Slot) -> None:
        """A false grid beside KV that is there would spoil the KV of the text behind it, which others share."""
        self._known[key] = slot.grid_thw, slot.tokens
        while len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]

    def _fail(self, rid: str, reason: str) -> bool:
        if rid not in self._failed:
            log.warning("request %s ends: %s", rid, reason)
            self._failed[rid] = reason
        return False

    def has(self, identifier: str) -> bool:
        """Whether the workers load it rather than encode it."""
        return identifier.rpartition(":")[2] in self._shelf

    def allocated(self, feature: MultiModalFeatureSpec) -> None:
        """vLLM has room for it: the workers load it with the step that is being made."""
        key = _key(feature)
        slot = self._shelf.get(key) if key is not None and _is_reference(feature) else None
        if slot is not None:
            self._slots[feature.identifier] = slot

    def take_slots(self) -> dict[str, Slot]:
        """What the step's workers load, pinned until they have."""
        taken, self._slots = self._slots, {}
        keys = [identifier.rpartition(":")[2] for identifier in taken]
        for key in keys:
            self._shelf.pin(key, f"step {self._step}")
        self._steps.append(keys)
        if len(self._steps) > _STEPS_UNDER_WAY:
            for key in self._steps.popleft():
                self._shelf.unpin(key, f"step {self._step - _STEPS_UNDER_WAY}")
        self._step += 1
        return taken

    def take_failed(self) -> set[str]:
        """Requests that can never be ready, each told once."""
        for key in list(self._loads):
            self._settle(key)
        return set(self._failed)

    def freed(self, rid: str, feature: MultiModalFeatureSpec) -> None:
        """The request's prompt is computed past the image."""
        key = _key(feature)
        if key is not None:
            self._shelf.unpin(key, rid)

    def finished(self, rid: str) -> None:
        """The request has ended."""
        self._failed.pop(rid, None)
        self._shelf.unpin_all(rid)
        for load in self._loads.values():
            load.waiting.discard(rid)

    def close(self) -> None:
        """End the loader, remove the shelf."""
        self._loader.close()
        self._shelf.close()


def _checked(vllm_config: VllmConfig) -> ECTransferConfig:
    config = vllm_config.ec_transfer_config
    if config is None or config.is_ec_producer or not config.is_ec_consumer:
        raise ValueError('ec_role must be "ec_consumer": lookonce\'s vision services fill the store')
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is None:
        raise ValueError(f"{vllm_config.model_config.model} takes no images")
    if multimodal.mm_processor_cache_gb != 0:
        raise ValueError("--mm-processor-cache-gb must be 0: a cached image comes without its grid")
    return config


def _width(vllm_config: VllmConfig) -> int:
    """Of an image's rows as vLLM takes them: with those of a deepstack beside them."""
    config = vllm_config.model_config.hf_config
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return int(vllm_config.model_config.hf_text_config.hidden_size) * (1 + len(deepstack))


def _is_reference(feature: MultiModalFeatureSpec) -> bool:
    """Whether the request names the image and holds neither its pixels nor its rows."""
    data = feature.data
    return data is not None and any(name in data for name in _GRIDS) and not any(name in data for name in _PIXELS)


def _key(feature: MultiModalFeatureSpec) -> str | None:
    """The embedding key; vLLM lays the name of a LoRA on the vision half before it."""
    key = feature.identifier.rpartition(":")[2]
    return key if _KEY.fullmatch(key) else None


def _grid(feature: MultiModalFeatureSpec) -> tuple[int, ...]:
    data = feature.data.get_data() if feature.data is not None else {}
    return next((tuple(map(int, data[name].flatten().tolist())) for name in _GRIDS if name in data), ())
