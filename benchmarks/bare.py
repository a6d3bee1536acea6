"""What benchmarks.engine asks about, and transformers' modules called as directly as can be: the floor."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from lm_service.engine.types import EmbeddingSource, ImageSpan, Prompt
from lookonce.core.identity import EmbeddingReference
from lookonce.models.qwen2_vl.config import mrope_positions

ROWS, COLUMNS = 27, 37  # 999 tokens: a 1024x768 image
SYSTEM, QUESTION, TOKENS = 20, 20, 16


def image(number: int) -> EmbeddingReference:
    """A reference to an image of 999 tokens."""
    key = number.to_bytes(32, "little")
    return EmbeddingReference(key, "0" * 64, key, (1, 2 * ROWS, 2 * COLUMNS), ROWS * COLUMNS, COLUMNS * 28, ROWS * 28)


def question(number: int, reference: EmbeddingReference | None) -> Prompt:
    """A system prompt, maybe an image, and a question; every question is another."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(0, 400, (QUESTION,), generator=generator).tolist()
    spans = [] if reference is None else [ImageSpan(SYSTEM, reference)]
    ids = [7] * SYSTEM + [9] * (reference.tokens if reference else 0) + words if reference else words
    positions, following = mrope_positions(len(ids), [(span.start, span.reference.grid_thw) for span in spans], 2)
    return Prompt(tuple(ids), tuple(spans), positions, following)


class Images:
    """An EmbeddingLoader that has everything at hand."""

    def __init__(self, hidden: int, deepstack: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(1 + deepstack, ROWS * COLUMNS, hidden, generator=generator)

    async def load(self, reference: EmbeddingReference, rows_of: Any = None) -> tuple[torch.Tensor, EmbeddingSource]:
        """The same rows for every image."""
        return self.rows, EmbeddingSource.TENSOR_CACHE


class Bare:
    """transformers' modules, called as directly as can be."""

    def __init__(self, model: Any, head: torch.nn.Linear, rows: torch.Tensor, tower: Any = None) -> None:
        """`rows` [1 + deepstack, tokens, hidden] are every image's."""
        self.model, self.head, self.tower = model, head, tower
        self.rows, *self.levels = rows
        self.device, self.dtype = rows.device, rows.dtype

    def now(self) -> float:
        """Seconds of a clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.inference_mode()
    def prefill(self, prompts: list[Prompt], cache: DynamicCache | None) -> DynamicCache:
        """One batch of prompts of one length; logits of their last tokens."""
        hidden = self.model.embed_tokens(torch.tensor([prompt.token_ids for prompt in prompts], device=self.device))
        seen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=self.device)
        for at, prompt in enumerate(prompts):
            for span in prompt.images:
                hidden[at, span.start : span.end] = self.rows
                seen[at, span.start : span.end] = True
        positions = torch.stack([torch.from_numpy(prompt.positions) for prompt in prompts], dim=1).to(self.device)
        cache = cache or DynamicCache()
        further: dict[str, Any] = {}
        if self.levels and seen.any():
            further = {"visual_pos_masks": seen, "deepstack_visual_embeds": self.levels}
        out = self.model(inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True, **further)
        self.head(out.last_hidden_state[:, -1]).argmax(-1)
        return cache

    @torch.inference_mode()
    def decode(self, cache: DynamicCache, batch: int, position: int) -> None:
        """One decode step."""
        hidden = self.model.embed_tokens(torch.full((batch, 1), 5, device=self.device))
        positions = torch.full((3, batch, 1), position, device=self.device)
        out = self.model(inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True)
        self.head(out.last_hidden_state[:, -1]).argmax(-1)

    @torch.inference_mode()
    def look(self, rows: int) -> None:
        """What the floor leaves out: attention of so many tokens over the image's KV, held once, in every layer."""
        config = self.model.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        queries = torch.zeros(1, heads, rows * config.num_attention_heads // heads, size, **where)
        keys = torch.zeros(1, heads, SYSTEM + ROWS * COLUMNS, size, **where)
        for _ in range(config.num_hidden_layers):
            torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)

    def looks(self, count: int) -> float:
        """Seconds that all looks of `count` questions take."""
        began = self.now()
        self.look(count * QUESTION)
        for _ in range(TOKENS - 1):
            self.look(count)
        return self.now() - began

    @torch.inference_mode()
    def encode(self) -> float:
        """Seconds to encode one image; 0 without a tower."""
        if self.tower is None:
            return 0.0
        width = self.tower.patch_embed.proj.weight[0].numel()
        pixels = torch.zeros(4 * ROWS * COLUMNS, width, device=self.device, dtype=self.dtype)
        began = self.now()
        self.tower(pixels, torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]], device=self.device))
        return self.now() - began

    def whole(self) -> float:
        """Seconds in which the unsplit model answers one question: image, prompt and answer, with nothing reused."""
        encoded = self.encode()
        asked = question(0, image(0))
        began = self.now()
        cache = self.prefill([asked], None)
        for step in range(TOKENS - 1):
            self.decode(cache, 1, asked.next_position + step)
        return encoded + self.now() - began

    def floor(self, count: int) -> float:
        """Seconds of the least work that answers `count` questions on one image."""
        whole = question(0, image(0))
        prefix = Prompt(whole.token_ids[:-QUESTION], whole.images, whole.positions[:, :-QUESTION], whole.next_position)
        questions = [question(number, None) for number in range(count)]
        began = self.now()
        self.prefill([prefix], None)
        cache = self.prefill(questions, None)
        for step in range(TOKENS - 1):
            self.decode(cache, count, QUESTION + step)
        return self.now() - began
