"""What the language service asks of vLLM's workers at start: `worker_extension_cls`. Runs in their processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class WorkerExtension:
    """Mixed into vLLM's worker; each method answers a `collective_rpc`."""

    model_runner: Any

    def lookonce_parameters(self) -> list[str]:
        """The names of all parameters and buffers that were loaded."""
        model = self.model_runner.get_model()
        return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]

    def lookonce_positions(self, token_ids: list[int], images: list[tuple[int, int, list[int]]]) -> list[list[int]]:
        """Where the model places each token of a prompt, [r, tokens] flattened row by row behind its next position.
        `images` are offset, tokens and grid (t, h, w) of each."""
        import torch

        features = [
            SimpleNamespace(
                data={"image_grid_thw": SimpleNamespace(data=torch.tensor(grid))},
                modality="image",
                mm_position=SimpleNamespace(offset=offset, length=length),
            )
            for offset, length, grid in images
        ]
        positions, delta = self.model_runner.get_model().get_mrope_input_positions(token_ids, features)
        rows = np.asarray(positions, dtype=np.int64)
        return [[len(token_ids) + int(delta)], *rows.tolist()]
