"""vLLM's encoder-cache connector over a lookonce store.

A request names an image by `image_embeds: {"image_grid_thw": ...}` with a uuid: the embedding key, 64 hexadecimal
characters. In the scheduler's process the embedding is loaded, verified and shelved before the request is scheduled.
The worker maps rows that are known to be right, so nothing can fail there. What is missing or wrong ends its own
request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole

from lookonce_vllm.scheduling import Scheduling
from lookonce_vllm.shelf import Slot

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class Slots(ECConnectorMetadata):
    """What the workers are to load for a step, by vLLM's identifier."""

    by_identifier: dict[str, Slot] = field(default_factory=dict)


class LookonceConnector(ECConnectorBase):
    """Both roles: vLLM makes one in the scheduler's process and one in each worker."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._own = Scheduling(vllm_config) if role is ECConnectorRole.SCHEDULER else None

    @property
    def _scheduling(self) -> Scheduling:
        if self._own is None:
            raise RuntimeError("vLLM asked a worker's connector what only the scheduler's knows")
        return self._own

    # Worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        from vllm.platforms import current_platform

        metadata = self._get_connector_metadata()
        device = torch.device(current_platform.device_type)
        for identifier, slot in metadata.by_identifier.items():
            if identifier not in encoder_cache:
                encoder_cache[identifier] = slot.file.rows().to(device)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Nothing: the vision services write the store."""

    # Scheduler

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        return self._scheduling.ready(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduling.has(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        self._scheduling.allocated(request.mm_features[index])

    def update_state_after_free(self, request: Request, index: int) -> None:
        self._scheduling.freed(request.request_id, request.mm_features[index])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Slots:
        return Slots(self._scheduling.take_slots())

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        self._scheduling.finished(request.request_id)
        return False, None

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduling.take_failed()

    def shutdown(self) -> None:
        if self._own is not None:
            self._own.close()
