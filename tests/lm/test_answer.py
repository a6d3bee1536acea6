"""Text out of tokens: whole characters only, stop strings never shown, the same however the tokens fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_service.engine.answer import Answer, Detokenizer, StopMatcher, TokenTable
from lm_service.engine.types import FinishReason, Sampling
from lm_service.prompt import load_template
from lookonce.models.qwen2_vl.config import FAMILY

BYTES = TokenTable(((number, bytes([number])) for number in range(256)), special=[256])
END = 257


@pytest.fixture(scope="module")
def template(checkpoint_path):
    return load_template(checkpoint_path, FAMILY)


def answer(text, table=BYTES, tokens=None, max_tokens=1000, room=1000, **sampling):
    """Feed a text byte by byte; the deltas and the answer."""
    one = Answer(0, Sampling(max_tokens=max_tokens, **sampling), table, {END}, room)
    shown = []
    for token in tokens if tokens is not None else text.encode():
        if one.reason is not None:
            break
        one.push(token)
        shown.append(one.take().text)
    return one, shown


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_whole(template, text):
    detokenizer = Detokenizer(template.table)
    ids = template.text_ids(text)
    pieces = [detokenizer.push(token) for token in ids]
    whole = "".join(pieces) + detokenizer.flush()
    assert whole == template._tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30))
def test_any_tokens_decode_as_all_at_once(template, ids):
    """Invalid UTF-8, special tokens and all."""
    detokenizer = Detokenizer(template.table)
    whole = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert whole == template._tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_is_never_shown():
    one, shown = answer("añ🐈‍⬛é")
    assert "".join(shown) == "añ🐈‍⬛é"
    assert "�" not in "".join(shown)
    assert shown[:3] == ["a", "", "ñ"]
    assert one.reason is None


def test_a_character_cut_off_by_max_tokens_is_replaced():
    one, shown = answer("é", max_tokens=1)
    assert (one.reason, shown) == (FinishReason.LENGTH, ["�"])


def test_special_tokens_and_unknown_ids_have_no_text():
    _, shown = answer("", tokens=[65, 256, 999, 66])
    assert shown == ["A", "", "", "B"]


def test_special_tokens_are_shown_on_request():
    table = TokenTable([(65, b"A"), (256, b"<|box_start|>")], special=[256])
    one = Answer(0, Sampling(8, special_tokens=True), table, {END}, 100)
    for token in (65, 256, 999, 65, END):
        one.push(token)
    assert one.take().text == "A<|box_start|>A"


def test_the_end_token_ends_it_unless_told_to_go_on():
    one, shown = answer("", tokens=[65, END, 66])
    assert (one.reason, shown, one.tokens) == (FinishReason.STOP, ["A", ""], [65, END])
    one, shown = answer("", tokens=[65, END, 66], ignore_eos=True)
    assert (one.reason, "".join(shown)) == (None, "AB")


@pytest.mark.parametrize(
    ("least", "shown", "met"),
    [
        (0, "a", "b"),
        (2, "a", "b"),  # the second token completes it, and then there are two
        (3, "abc", "b"),
        (7, "abcb", "cabcd"),  # what begins early may end later; what has ended early is text
        (6, "abcbcab", "cd"),
        (10, "abcbcabcd", None),
    ],
)
def test_no_stop_string_ends_an_answer_that_is_too_short(least, shown, met):
    stops = {0: ["b"], 2: ["b"], 3: ["b"], 7: ["cabcd", "bca"], 6: ["cd", "abca"], 10: ["b", "cd"]}[least]
    one, pieces = answer("", tokens=[*b"abcbcabcd", END], stop=tuple(stops), min_tokens=least)
    assert ("".join(pieces), one.stop) == (shown, met)


def test_no_end_token_counts_before_the_least_tokens():
    one, _ = answer("", tokens=[*b"a", END, *b"b", END], min_tokens=2)
    assert (one.reason, len(one.tokens)) == (FinishReason.STOP, 4)


def test_room_in_the_context_bounds_the_answer():
    one, shown = answer("abcdef", room=3)
    assert (one.reason, shown) == (FinishReason.LENGTH, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("text", "stops", "shown", "met"),
    [
        ("hello world", ["o w"], "hell", "o w"),
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("ababac", ["abac"], "ab", "abac"),
        ("abcd", ["bcx", "cd"], "ab", "cd"),
        ("xabc", ["abc", "b"], "xa", "b"),
        ("xabc", ["bc", "abc"], "x", "abc"),
        ("naïve 🐈 cat", ["🐈"], "naïve ", "🐈"),
        ("nothing here", ["absent"], "nothing here", None),
        ("END", ["END"], "", "END"),
    ],
)
def test_stop_strings_across_tokens(text, stops, shown, met):
    one, pieces = answer("", tokens=[*text.encode(), END], stop=tuple(stops))
    assert ("".join(pieces), one.stop, one.reason) == (shown, met, FinishReason.STOP)


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(1, 7), min_size=30, max_size=30),
)
def test_however_the_text_is_cut(text, stops, sizes):
    """Piecewise equals all at once, and nothing shown ever has to be taken back."""
    whole = StopMatcher(stops)
    expected, met = whole.push(text)
    expected += whole.flush() if met is None else ""
    piecewise, shown, found, at = StopMatcher(stops), "", None, 0
    for size in sizes:
        if found is None and at < len(text):
            piece, found = piecewise.push(text[at : at + size])
            shown += piece
            at += size
    shown += piecewise.flush() if found is None else ""
    assert (shown, found) == (expected, met)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    _, shown = answer("a\n\nb\n", stop=("\n\n\n",))
    assert shown == ["a", "", "", "\n\nb", ""]


def test_held_back_text_comes_out_at_the_end():
    _, shown = answer("", tokens=[*b"ab\n", END], stop=("\n\n",))
    assert "".join(shown) == "ab\n"
