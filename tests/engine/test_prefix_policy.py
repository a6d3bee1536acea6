"""Where prefixes end, by the rules alone: a real tree, no model."""

from __future__ import annotations

import pytest
import torch

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import prompt_contents
from lm_service.engine.packed.prefix_cache.tree import PrefixCache
from lm_service.engine.packed.scheduling.prefix_policy import PrefixPolicy
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.types import Sampling
from lookonce.models.text_adapter import ModelShape, Stage
from tests.engine import lab as laboratory
from tests.engine.lab import an_image, prompt, words

SHAPE = ModelShape(1, 1, 1, 8, 8, 512, 4096, torch.float32, (Stage(torch.device("cpu"), 1),), 3)
SYSTEM, IMAGE, OTHER = words(9, 1), an_image(1, 3, 4), an_image(2, 2, 5)
SLAB = 256
"""Tokens: 9 of text, an image of 12, one of 10."""


def policy(*, native=True, budget=1 << 20, **options):
    cache = PrefixCache(SHAPE, budget)
    return cache, PrefixPolicy(cache, PackedOptions(**options), SLAB, native=native)


def sequence(*parts, beside=0, scored=False, **request):
    """One of a request of `1 + beside` sequences: an answer, or a question to be scored."""
    made = Request("r", "c", kept=False, **request)
    wanted = prompt(*parts)
    first = laboratory.sequence(made, wanted, Sampling(5).max_tokens)
    first.answer = None if scored else first.answer
    made.sequences = [first] * (1 + beside)
    return first, len(wanted.token_ids)


def ends(nodes):
    return [node.end for node in nodes]


@pytest.mark.parametrize(
    ("native", "isolated", "expected"),
    [(True, False, [9, 21]), (False, False, [21]), (False, True, [9, 21])],
)
def test_the_text_before_an_image_is_a_node_where_that_is_cheap_or_must_be(native, isolated, expected):
    cache, rules = policy(native=native)
    first, end = sequence(SYSTEM, IMAGE, words(5, 2), isolated=isolated)
    assert ends(rules.create_nodes(first, cache.root, end)) == expected


def test_several_images_are_one_node_to_the_end_of_the_last():
    cache, rules = policy()
    first, end = sequence(SYSTEM, IMAGE, words(3, 2), OTHER, words(5, 3))
    text, images = rules.create_nodes(first, cache.root, end)
    assert (text.end, images.end) == (9, 9 + 12 + 3 + 10)
    assert [(span.start, span.end) for span in images.images] == [(0, 12), (15, 25)]


@pytest.mark.parametrize(
    ("rest", "beside", "scored", "expected"),
    [
        (6, 0, False, []),
        (6, 2, False, [14]),  # n answers share their prompt
        (6, 2, True, []),  # questions do so by prefixes of their own
        (100, 0, False, [108]),  # long enough to be found again
        (100, 0, True, [108]),
        (1, 2, False, [9]),  # all but the last token, whose logits are wanted
    ],
)
def test_text_behind_becomes_a_node_when_it_is_long_or_several_answers_share_it(rest, beside, scored, expected):
    cache, rules = policy(long_suffix_tokens=90)
    first, end = sequence(words(9, 1), words(rest, 2), beside=beside, scored=scored)
    assert ends(rules.create_nodes(first, cache.root, end)) == expected


def test_what_is_found_is_not_made_again():
    cache, rules = policy()
    first, end = sequence(SYSTEM, IMAGE, words(5, 2))
    found = rules.create_nodes(first, cache.root, end)[-1]
    assert rules.create_nodes(first, found, end) == []


def test_without_room_for_a_needed_node_nothing_is_left_behind():
    cache, rules = policy(budget=15 * SHAPE.token_bytes)  # for the text, not for the image
    first, end = sequence(SYSTEM, IMAGE, words(5, 2))
    assert rules.create_nodes(first, cache.root, end) is None
    assert (cache.bytes, len(cache)) == (0, 0)
    several, end = sequence(words(30, 1), beside=2)
    assert rules.create_nodes(several, cache.root, end) == []  # not needed: each computes it by itself


def test_how_much_is_looked_up():
    _, rules = policy(long_suffix_tokens=90)
    plain, end = sequence(SYSTEM, IMAGE, words(5, 2))
    assert rules.look_until(plain, end) == end - 1
    isolated, _ = sequence(SYSTEM, IMAGE, words(5, 2), isolated=True)
    assert rules.look_until(isolated, end) == 21  # what others asked may be there or not
    sharing, _ = sequence(SYSTEM, IMAGE, words(5, 2), scored=True)
    sharing.shared_ends = (23,)
    assert rules.look_until(sharing, end) == 21
    long, end = sequence(SYSTEM, IMAGE, words(120, 2), scored=True)
    long.shared_ends = (23,)
    assert rules.look_until(long, end) == end - 1 and long.shared_ends == ()


def test_short_nodes_are_copied_as_long_as_they_leave_most_of_a_slab():
    cache, rules = policy(native=False, inline_tokens=40)
    parent, made = cache.root, []
    for length, seed in ((30, 1), (39, 2), (20, 3), (40, 4)):
        (content,) = prompt_contents([prompt(words(length, seed))])
        parent = cache.add(parent, content.cut(0, length), ())
        made.append(parent)
    assert rules.worth_copying(parent) == [made[2], made[1]]  # 59 of 64; 40 is not short, 30 more are too many
    assert policy(native=True)[1].worth_copying(parent) == []


def test_a_question_whose_own_node_would_not_fit_a_slab_must_have_it():
    cache, rules = policy(budget=100 * SHAPE.token_bytes, long_suffix_tokens=10_000)
    first, end = sequence(words(SLAB, 1))
    assert isinstance(first, Sequence) and rules.create_nodes(first, cache.root, end) is None
