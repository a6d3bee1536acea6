"""vLLM's encoder-cache connector between the language service and the workers: rows that are known to be right, mapped.

The service has validated an image's rows and written them to a file before the request reaches vLLM, and keeps the file
until the request has ended. So nothing is loaded here that could be late, wrong or missing. Interface:
vllm.distributed.ec_transfer.ec_connector.base of vLLM 0.32.0.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata

from lookonce.models.row_files import RowFile

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

WATCH_SECONDS = 1.0
NAME, MODULE = "RowFileConnector", __name__
FILE = "lookonce_file"
"""The field of a request's image that names its rows' file: a path as int64 [n] of UTF-8 bytes."""


@dataclass
class StepRows(ECConnectorMetadata):
    """What the workers load for a step, by vLLM's identifier: a file, or the rows themselves for other machines."""

    by_identifier: dict[str, RowFile | torch.Tensor] = field(default_factory=dict)


class RowFileConnector(ECConnectorBase):
    """Both roles: vLLM makes one in the scheduler's process and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)
        self._width = int(vllm_config.ec_transfer_config.ec_connector_extra_config["width"])
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        end_with_parent()
        parallel = vllm_config.parallel_config
        self._elsewhere = parallel.distributed_executor_backend == "ray" or getattr(parallel, "nnodes", 1) > 1
        self._step: dict[str, RowFile] = {}
        self._lost: set[str] = set()

    # Worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        from vllm.platforms import current_platform

        device = torch.device(current_platform.device_type)
        for identifier, given in self._get_connector_metadata().by_identifier.items():
            if identifier not in encoder_cache:
                rows = given.rows() if isinstance(given, RowFile) else given
                encoder_cache[identifier] = rows.to(device)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Nothing: the vision services write the store."""

    # Scheduler

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """A request whose file has gone (somebody has emptied the shared memory) ends alone."""
        there = all(
            feature.mm_position.offset + feature.mm_position.length <= num_computed_tokens
            or os.path.exists(_path(feature))
            for feature in request.mm_features
        )
        if not there:
            self._lost.add(request.request_id)
        return there

    def has_cache_item(self, identifier: str) -> bool:
        """Always: there is no encoder here."""
        return True

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        feature = request.mm_features[index]
        rows = feature.mm_position.get_num_embeds()
        self._step[feature.identifier] = RowFile(_path(feature), rows, self._width, self._dtype)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepRows:
        step, self._step = self._step, {}
        return StepRows({name: file.rows() if self._elsewhere else file for name, file in step.items()})

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        self._lost.discard(request.request_id)
        return False, None

    def take_unavailable_requests(self) -> set[str]:
        return set(self._lost)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however that was. vLLM's processes notice the end of a
    service that closes them; one that is killed outright would leave them behind, with all their memory. (Linux's
    PDEATHSIG does not do here: it speaks of the thread that started the process.)"""
    parent = os.getppid()
    if parent not in _WATCHED:
        _WATCHED.add(parent)
        threading.Thread(target=_watch, args=(parent,), name="lookonce-parent", daemon=True).start()


_WATCHED: set[int] = set()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _path(feature: Any) -> str:
    return bytes(feature.data[FILE].data.tolist()).decode()
