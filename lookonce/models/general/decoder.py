"""The language half: transformers' text model and output head as a packed adapter, on one device or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.family import Half
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.attention import NAME, attending
from lookonce.models.general.joined import apart
from lookonce.models.general.limits import Calls, attention_calls
from lookonce.models.general.placing import bring_together
from lookonce.models.general.positions import position_rows
from lookonce.models.general.recurrent import Renumbered, intercept, recurring
from lookonce.models.text_adapter import Attend, Deepstack, ModelShape, Recur, Stage


class GeneralText:
    """A `RecurrentAdapter` over a class whose vision half has no weights. Called from one thread at a time."""

    def __init__(
        self, model: Any, decoder_name: str, head: nn.Module, shape: ModelShape, places: Sequence[int]
    ) -> None:
        """The module of that name and `head` are modules of `model`, filled; `places` are the layers that attend."""
        self.model, self.decoder_name = model, decoder_name
        self._numbers = {place: number for number, place in enumerate(places)}
        self._renumber = list(places) != list(range(len(places)))
        self._decoder, self._head, self._shape = model.get_submodule(decoder_name), head, shape
        self._softcap: float | None = getattr(self._decoder.config, "final_logit_softcapping", None)

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return self._shape

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]."""
        rows: torch.Tensor = self._decoder.embed_tokens(token_ids)
        return rows

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor,
        deepstack: Sequence[Deepstack] = (),
        recur: Recur | None = None,
    ) -> torch.Tensor:
        """[T, hidden] at positions int64 [r, T] -> logits [len(rows), vocabulary] of the rows asked for."""
        if self._renumber:
            attend = Renumbered(attend, self._numbers)
        everything = torch.ones_like(positions[:1])  # a mask given is not searched for in the positions
        places = positions if len(positions) == 1 else positions[:, None]
        with attending(attend), nullcontext() if recur is None else recurring(recur):
            out = self._decoder(
                inputs_embeds=hidden[None], attention_mask=everything, position_ids=places, use_cache=False
            )
        found = out.last_hidden_state[0]
        logits: torch.Tensor = self._head(found.index_select(0, rows.to(found.device)))
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)


class Carrier(nn.Module):
    """The language half under the names that every family's tensors have."""

    model: Any
    lm_head: nn.Module


def load_text(
    architecture: Architecture,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    where: Callable[[str], torch.device],
    devices: Sequence[torch.device],
) -> GeneralText:
    """Read the language half, each tensor to `where` it belongs; `devices` are the layers'. Raises CheckpointError."""
    calls = attention_calls(architecture)
    if calls.states and len(set(devices)) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: {architecture.cls.__name__} has recurrent state, which is kept on one device; leave "
            "out --device-map"
        )
    model, half = architecture.hollow(dtype), Carrier()
    half.model, half.lm_head = (model.get_submodule(n) for n in (architecture.decoder_name, architecture.head_name))
    with apart(model, architecture.groups_in(Half.LANGUAGE)):
        load_weights(half, checkpoint, Half.LANGUAGE, dtype=dtype, device=where)
    bring_together(half.model, half.lm_head, devices)
    for module in model.modules():  # classes ask their first parameter for a device
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = None
    half.model.set_attn_implementation(NAME)
    intercept(half.model.layers)
    shape = shape_of(architecture, calls, dtype, devices)
    return GeneralText(model, architecture.decoder_name, half.lm_head, shape, calls.attending)


def shape_of(
    architecture: Architecture, calls: Calls, dtype: torch.dtype, devices: Sequence[torch.device]
) -> ModelShape:
    """What the engine is told of a class in this dtype, each layer on its device."""
    homes = (devices[place] for place in calls.attending)
    longest = getattr(architecture.config.get_text_config(), "max_position_embeddings", None) or 32768
    return ModelShape(
        layers=calls.layers,
        heads=calls.heads,
        kv_heads=calls.kv_heads,
        head_dim=calls.head_dim,
        hidden=int(architecture.model.get_submodule(architecture.decoder_name).embed_tokens.weight.shape[1]),
        vocabulary=int(architecture.model.get_output_embeddings().weight.shape[0]),
        context=int(longest),
        dtype=dtype,
        stages=tuple(Stage(device, len(list(layers))) for device, layers in groupby(homes)),
        position_rows=position_rows(architecture.model),
        states=tuple(state.tensor(dtype) for state in calls.states),
        attends_last=calls.attends_last,
        rules=calls.rules,
    )
