"""Both halves of a checkpoint of the general path in one process, each loaded as its service loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from lm_service.engine.packed.device_map import Home
from lm_service.engine.types import Prompt
from lm_service.prompt import PromptBuilder, load_template
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.family import Half
from lookonce.models.general.one_sequence import OneSequence
from lookonce.models.text_adapter import BothWays

CPU = torch.device("cpu")


class Split:
    """Both halves, and the prompts that are made for the second."""

    def __init__(self, path: Path, home: Home | None = None) -> None:
        """`home` of the language half's layers; None: the CPU."""
        halves = {half: open_checked(str(path), half) for half in Half}
        vision, language = halves[Half.VISION], halves[Half.LANGUAGE]
        self.encoder = vision.family.load_encoder(vision, torch.float32, CPU)
        self.encoder.warm_up()
        architecture = language.family.architecture
        layers = len(architecture.model.get_submodule(architecture.decoder_name).layers)
        home = home or Home((CPU,), (range(layers),))
        self.model = language.family.load_text(language, torch.float32, home.of, home.of_layers)
        family = language.family
        self.takes_several = family.texts.takes_several and family.template is None
        self.template = load_template(path, family, family.special_tokens(language.config).marker)
        limits = {"context_length": 2000, "max_images": 4, "check_fingerprint": lambda reference: None}
        self.prompts = PromptBuilder(self.template, family, language.config, **limits)

    def encoded(self, image: Image.Image, number: int) -> tuple[EmbeddingReference, torch.Tensor]:
        """A reference to an image, and its rows."""
        (rows,) = self.encoder.encode([prepared := self.encoder.prepare(image, 1, 10**8)])
        key = bytes([number]) * 32
        return EmbeddingReference(key, "0" * 64, key, prepared.grid_thw, len(rows), *image.size), rows

    @torch.inference_mode()
    def answer(
        self, prompt: Prompt, rows: Mapping[EmbeddingReference, torch.Tensor], length: int
    ) -> tuple[list[int], torch.Tensor]:
        """A greedy answer without an engine, and log-probabilities [1 + length, vocabulary]."""
        hidden = self.model.embed(torch.tensor(prompt.token_ids))
        for span in prompt.images:
            for place, row, count in span.runs:
                hidden[place : place + count] = rows[span.reference][row : row + count]
        positions = torch.from_numpy(prompt.positions.copy())
        found: list[torch.Tensor] = []
        tokens: list[int] = []
        for at in range(length + 1):
            sequence = OneSequence(self.model.shape, self._blocks(prompt), len(hidden), None)
            sequence.begin(len(hidden))
            recur = sequence if self.model.shape.states else None
            logits = self.model.forward(hidden, positions, sequence, torch.tensor([len(hidden) - 1]), recur=recur)
            found.append(logits[0].log_softmax(-1))
            if at < length:
                tokens.append(int(found[-1].argmax()))
                hidden = torch.cat([hidden, self.model.embed(torch.tensor(tokens[-1:]))])
                following = torch.full((len(positions), 1), prompt.next_position + at)
                positions = torch.cat([positions, following], 1)
        return tokens, torch.stack(found)

    def _blocks(self, prompt: Prompt) -> list[tuple[int, int]]:
        """First tokens and lengths of what sees itself both ways."""
        rules = self.model.shape.rules
        if rules is None or not rules.both_ways:
            return []
        if rules.both_ways is BothWays.PROMPT:
            return [(0, len(prompt.token_ids))]
        return [(place, count) for span in prompt.images for place, _, count in span.runs]
