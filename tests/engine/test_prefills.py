"""Whose prefix a step takes further: turns, parents before children, one request's steps. A real tree, no model."""

from __future__ import annotations

import pytest

from lm_service.engine.packed.prefix_cache.content import prompt_contents
from lm_service.engine.packed.prefix_cache.tree import PrefixCache
from lm_service.engine.packed.scheduling.batch import Batch, Prefills
from lm_service.engine.packed.scheduling.sequence import Request
from tests.engine import lab as laboratory
from tests.engine.lab import prompt, words
from tests.engine.test_prefix_policy import SHAPE


class Shelf:
    """A tree and its prefills; nodes of so many tokens, wanted by a sequence of a request."""

    def __init__(self):
        self.cache = PrefixCache(SHAPE, 1 << 20)
        self.prefills = Prefills(self.cache)
        self.seed = 0

    def want(self, length, parent=None, request=None):
        self.seed += 1
        wanted = prompt(words(length, self.seed))
        request = request or Request("r", "c", kept=False)
        node = self.cache.add(parent or self.cache.root, prompt_contents([wanted])[0].cut(0, length), ())
        self.cache.acquire(node)
        return self.prefills.add(node, laboratory.sequence(request, wanted, 1))

    def step(self, budget, turn=None):
        """What a step takes, as (prefill, tokens), once it is computed. One that is for all is asked twice, for those
        whose parents it completes."""
        batch = Batch()
        left = self.prefills.take(batch, budget, turn)
        if turn is None:
            left = self.prefills.take(batch, left, turn)
        assert left == budget - batch.tokens
        for chunk in batch.prefills:
            self.prefills.computed(chunk)
        return [(chunk.prefill, chunk.count) for chunk in batch.prefills]


def test_a_long_one_does_not_hold_up_the_others():
    shelf = Shelf()
    long, short = shelf.want(100), shelf.want(10)
    assert shelf.step(30) == [(long, 30)]
    assert shelf.step(30) == [(short, 10), (long, 20)]
    assert shelf.step(100) == [(long, 50)]
    assert len(shelf.prefills) == 0 and not long.node.building


def test_a_child_begins_in_the_step_that_completes_its_parent():
    shelf = Shelf()
    parent = shelf.want(20)
    child = shelf.want(10, parent.node)
    assert shelf.step(19) == [(parent, 19)]
    assert shelf.step(19) == [(parent, 1), (child, 10)]


def test_one_whose_embeddings_are_on_their_way_lets_others_go_first():
    shelf = Shelf()
    waiting, other = shelf.want(10), shelf.want(10)
    waiting.loading = True
    assert shelf.step(100) == [(other, 10)]
    waiting.loading = False
    assert shelf.step(100) == [(waiting, 10)]


def test_nobody_is_taken_twice_in_a_step():
    shelf = Shelf()
    first = shelf.want(100)
    batch = Batch()
    assert shelf.prefills.take(batch, 30, None) == 0
    assert shelf.prefills.take(batch, 30, None) == 30
    assert [(chunk.prefill, chunk.count) for chunk in batch.prefills] == [(first, 30)]


def test_a_request_that_shares_no_step_takes_one_for_each_level():
    shelf = Shelf()
    own = Request("own", "c", kept=False, isolated=True, exclusive=True)
    parent = shelf.want(10, request=own)
    child, other = shelf.want(10, parent.node, own), shelf.want(10)
    private = shelf.want(10, parent.node, own)
    private.node.private = True
    assert shelf.prefills.first_shared(own) is parent
    assert shelf.step(100, own) == [(parent, 10)]  # what is in its steps does not depend on what is filled already
    assert shelf.prefills.first_shared(own) is child
    assert shelf.step(100, None) == [(other, 10)]
    assert shelf.step(100, own) == [(child, 10), (private, 10)]
    assert shelf.prefills.first_shared(own) is None


@pytest.mark.parametrize("kept", [True, False])
def test_what_nobody_wants_any_more_is_dropped_children_first(kept):
    shelf = Shelf()
    parent = shelf.want(10)
    child = shelf.want(10, parent.node)
    shelf.cache.release(parent.node)
    if not kept:
        shelf.cache.release(child.node)
    shelf.prefills.drop_unwanted()
    assert list(shelf.prefills) == ([parent, child] if kept else [])
    assert len(shelf.cache) == 2 * kept
