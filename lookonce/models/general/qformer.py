"""A Q-Former that reads the question (InstructBLIP, arXiv:2305.06500) on the language side of the split.

The stored embedding then is what needs no text: the rows of the vision tower. Many questions about an image cost one
encode; the Q-Former runs for each of them, over the tower's rows and the tokens of the question. A prompt has a token
for each of the Q-Former's queries, and an embedding has as many rows as an image has tokens in a prompt: so the tower's
rows, one behind the other, are folded into that many rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lookonce.core.errors import CheckpointError, invalid
from lookonce.models.general.architecture import Architecture

FOLDER = "qformer_tokenizer"
"""Of a checkpoint: the files of the tokenizer that the Q-Former's text is read by."""


def tower_shape(architecture: Architecture) -> tuple[int, int]:
    """Rows that the tower makes of an image, and their width."""
    positions = architecture.model.vision_model.embeddings.num_positions
    return int(positions), int(architecture.config.vision_config.hidden_size)


def folded_shape(architecture: Architecture) -> tuple[int, int]:
    """Rows of an embedding, which are an image's tokens in a prompt, and their width."""
    rows, width = tower_shape(architecture)
    tokens = int(architecture.config.num_query_tokens)
    return tokens, -(-rows * width // tokens)


def fold(rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The tower's rows [rows, width] as an embedding of this shape; zeros fill its end."""
    folded = rows.new_zeros(shape)
    folded.view(-1)[: rows.numel()] = rows.reshape(-1)
    return folded


def unfold(folded: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """What `fold` was given, of this shape."""
    return folded.reshape(-1)[: shape[0] * shape[1]].view(shape)


class StoredRows(nn.Module):
    """Stands for the tower: its rows are given in place of pixels."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """[1, rows, width] -> the same, as the tower's output."""
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


class QuestionReader:
    """The Q-Former of one checkpoint."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Raises CheckpointError when its tokenizer is not there."""
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path / FOLDER, local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path / FOLDER}: the tokenizer of the Q-Former can't be made of its files ({type(error).__name__}); "
                f"copy {FOLDER}/ from the model's repository"
            ) from error
        self._tokenizer = tokenizer.backend_tokenizer  # safe to use from several threads
        self._shape = tower_shape(architecture)
        former = architecture.config.qformer_config
        self._longest, self._vocabulary = int(former.max_position_embeddings), int(former.vocab_size)

    def ids(self, text: str) -> list[int]:
        """Token ids of a question. Raises INVALID_ARGUMENT for one that is too long."""
        found: list[int] = self._tokenizer.encode(text).ids
        if len(found) > self._longest:
            raise invalid(
                f"messages: the text has {len(found)} tokens for the Q-Former, which reads {self._longest}: send less "
                "text",
                param="messages",
            )
        if max(found, default=0) >= self._vocabulary:
            raise invalid("messages: the text has a token that the Q-Former does not know", param="messages")
        return found

    def read(self, model: Any, folded: torch.Tensor, text: str) -> torch.Tensor:
        """Rows [tokens, hidden] for the language model, of an embedding and a question, by the class's own code."""
        ids = torch.tensor([self.ids(text)], device=folded.device)
        rows = unfold(folded, self._shape)[None]
        out: Any = model.get_image_features(rows, qformer_input_ids=ids, return_dict=True)
        features: torch.Tensor = out.pooler_output[0]
        return features
