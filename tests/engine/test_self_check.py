"""What the engine finds out of its products at start, and that isolated scores keep their bits either way."""

from __future__ import annotations

import asyncio

import pytest

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ScoreItem, Scoring
from tests.engine.lab import TOKENS, Album, an_image, ask, generation, prompt, words

SYSTEM = words(9, 1)
IMAGES = [an_image(number, 3, 4 + number) for number in range(3)]
ITEMS = tuple(
    ScoreItem(prompt(SYSTEM, image, words(2 + 3 * number, 50 + number)), ((5,), (6, 7)))
    for number in range(3)
    for image in IMAGES
)
"""Questions about three images in turns."""


class ByRows:
    """A model whose products depend on how many rows they have, by a few units of the last place."""

    def __init__(self, adapter, from_rows):
        self.shape, self.embed, self._adapter, self._from = adapter.shape, adapter.embed, adapter, from_rows

    def forward(self, hidden, *rest):
        return self._adapter.forward(hidden * (1 + 1e-6 * (len(hidden) >= self._from)), *rest)


class Broken(ByRows):
    """A model that computes nothing."""

    def forward(self, hidden, *rest):
        raise RuntimeError("out of order")


def engine_of(model, **options):
    chosen = PackedOptions(kv_bytes=4 << 20, prefix_bytes=4 << 20, slab_tokens=256, **options)
    return PackedEngine(model, TOKENS, frozenset(), chosen)


async def found_out(model, **options):
    engine = engine_of(model, **options)
    await engine.start(Album(engine._shape.hidden))
    state = engine.describe()
    await engine.close()
    assert (state.steps, state.prefill_tokens, state.prefix_bytes) == (0, 0, 0)  # the check leaves nothing behind
    return state.batch_invariant


@pytest.mark.parametrize("from_rows", [2, 8, 20, 60])
async def test_products_that_depend_on_the_number_of_rows_are_found_out(lab, from_rows):
    assert not await found_out(ByRows(lab.adapter, from_rows))


async def test_kernels_that_do_not_are_found_out_too(lab):
    engine = engine_of(lab.adapter)
    if not engine._core.native:
        pytest.skip("no kernels for this CPU")
    assert await found_out(lab.adapter)
    assert not await found_out(lab.adapter, native=False)  # torch's own are not even asked
    assert not await found_out(Broken(lab.adapter, 0))


@pytest.mark.parametrize("from_rows", [8, 10_000])
async def test_isolated_scores_are_the_same_bits_whatever_their_company(lab, from_rows):
    """Whether products depend on their rows or not: apart, in one request, and beside others."""
    model = ByRows(lab.adapter, from_rows)
    apart = []
    for at in range(3):
        engine = engine_of(model)
        await engine.start(Album(engine._shape.hidden))
        apart.append((await engine.score(Scoring("apart", ITEMS[at::3], isolated=True))).logprobs)
        await engine.close()
    engine = engine_of(model)
    await engine.start(Album(engine._shape.hidden))
    others = [generation(prompt(words(7, number), an_image(9, 2, 2), words(3, number)), 20) for number in range(3)]
    beside = [asyncio.create_task(ask(engine, other)) for other in others]
    beside.append(asyncio.create_task(engine.score(Scoring("other", ITEMS[::-1]))))
    busy = (await engine.score(Scoring("busy", ITEMS, isolated=True))).logprobs
    await asyncio.gather(*beside)
    quiet = (await engine.score(Scoring("quiet", ITEMS, isolated=True))).logprobs
    await engine.close()
    assert [busy[at::3] for at in range(3)] == [quiet[at::3] for at in range(3)] == apart
