"""Several images in one request that is to be scored alone: together only where that changes no bit."""

from __future__ import annotations

import time

import pytest
from transformers import AutoTokenizer

from lm_service.engine.types import Scores, Timings
from lm_service.prompt_thread import PromptThread
from lm_service.replies import Replies
from lm_service.scoring import Scorer
from protos.lookonce.v1 import language_pb2
from tests.lm.split import user
from tests.lm.test_prompt import image, make_builder


class Engine:
    """Counts the images of each call; with `shows`, its scores tell how many there were."""

    def __init__(self, shows):
        self.shows, self.calls = shows, []

    async def score(self, scoring):
        keys = {span.reference.key for item in scoring.items for span in item.prompt.images}
        self.calls.append(len(keys))
        one = -1.0 - (1e-7 * len(keys) if self.shows else 0.0)
        return Scores(tuple((one, -2.0) for _ in scoring.items), tuple(0 for _ in scoring.items), Timings())


@pytest.mark.parametrize("shows", [False, True])
@pytest.mark.parametrize("packs", [False, True])
async def test_images_are_packed_only_where_that_changes_no_bit(checkpoint_path, shows, packs):
    builder = make_builder(checkpoint_path, AutoTokenizer.from_pretrained(checkpoint_path))
    engine = Engine(shows)
    scorer = Scorer(engine, builder, Replies(builder.template.table, "m"), PromptThread(), packs=packs)
    request = language_pb2.ScoreRequest(alone=True)
    for question in ("Cat?", "Dog?"):
        for number in range(3):
            messages = [user(image(key=bytes([number]) * 32), question)]
            request.items.add(id=f"{question}{number}", messages=messages, choices=["yes", "no"])
    together, apart = [3], [1, 1, 1]
    answered = together if packs and not shows else apart
    for asked in (together + apart + answered if packs else apart, answered):  # the first finds out
        engine.calls.clear()
        response = await scorer.score(request, time.monotonic() + 60)
        assert engine.calls == asked
        assert [result.id for result in response.results] == [item.id for item in request.items]
        assert {result.scores.choices[0].logprob for result in response.results} == {-1.0 - 1e-7 * shows}
