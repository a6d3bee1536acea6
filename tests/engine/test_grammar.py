"""What an answer must be: no answer is anything else, whatever the model would say; and others are not touched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time

import jsonschema
import pytest

from lm_service.engine.answer import TokenTable
from lm_service.engine.grammar import MAX_CHARACTERS, Grammar, Grammars, Kind, Structure
from lm_service.engine.types import FinishReason
from lookonce.cli.model import BUNDLED
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.chat.tokenizer import load_tokenizer
from tests.engine.lab import VOCABULARY, Answered, ask, generation, prompt, words
from tests.engine.schemas import Schemas, TooComplex, random_answer

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
END = 511
LETTERS = [bytes([at]) for at in range(32, 127)]
ANSWER = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["colour", "count"],
}


@pytest.fixture(scope="module")
def shapes() -> tuple[Grammars, list[bytes]]:
    """The bundled vocabulary's."""
    tokenizer = load_tokenizer(BUNDLED, "")
    tokenizer.encode_special_tokens = True
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    pieces = TokenTable.of(tokenizer.get_vocab(), added, added).pieces
    end = tokenizer.token_to_id("<|im_end|>")
    return Grammars(pieces, added, [end], lambda text: tokenizer.encode(text, add_special_tokens=False).ids), pieces


def letters(text: str) -> list[int]:
    return [LETTERS.index(bytes([each])) for each in text.encode()]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Those of the lab's model, of whose tokens the first are single characters."""
    pieces = LETTERS + [b""] * (VOCABULARY - len(LETTERS))
    return Grammars(pieces, [END], [END], letters)


def schema(value: object) -> Structure:
    return Structure(Kind.JSON_SCHEMA, json.dumps(value))


def text_of(answer: Answered) -> str:
    return b"".join(LETTERS[token] for token in answer.tokens if token != END).decode()


@pytest.mark.parametrize("count", [80, pytest.param(5000, marks=pytest.mark.slow)])
def test_every_answer_validates(shapes: tuple[Grammars, list[bytes]], count: int) -> None:
    grammars, pieces = shapes
    finished, refusals = 0, list[LookonceError]()
    for number in range(count):
        chance = random.Random(number)
        wanted = Schemas(chance).schema()
        try:
            grammar = grammars.compile(schema(wanted), "schema")
        except LookonceError as error:
            refusals.append(error)
            continue
        for _ in range(2):
            text = random_answer(grammar, pieces, chance)
            if text is not None:
                finished += 1
                jsonschema.validate(json.loads(text), wanted, format_checker=FORMATS)
    assert finished > count and len(refusals) < count / 10
    assert all(error.message.startswith("schema can't be held: ") for error in refusals)


@pytest.mark.parametrize(
    ("structure", "held"),
    [
        (Structure(Kind.REGEX, r"[a-c]{3}-[0-9]+!"), lambda text: re.fullmatch(r"[a-c]{3}-[0-9]+!", text)),
        (
            Structure(Kind.CHOICES, '["yes", "no \\"way\\"", "üb\\ner"]'),
            lambda text: text in {"yes", 'no "way"', "üb\ner"},
        ),
        (
            Structure(Kind.GRAMMAR, 'start: "it is " C ("," C)*\nC: "red" | "blue"'),
            lambda text: text.startswith("it is "),
        ),
        (schema(True), lambda text: json.loads(text) or True),
    ],
    ids=["regex", "choices", "grammar", "any JSON"],
)
def test_other_forms(shapes: tuple[Grammars, list[bytes]], structure: Structure, held) -> None:
    grammar = shapes[0].compile(structure, "form")
    found = [random_answer(grammar, shapes[1], random.Random(seed)) for seed in range(20)]
    texts = [text for text in found if text is not None]
    assert len(texts) >= 5 and all(held(text) for text in texts)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no answer satisfies it"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        (False, "must be a schema"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"a" * MAX_CHARACTERS: 1}, str(MAX_CHARACTERS)),
    ],
)
def test_what_cannot_be_held_is_named(shapes: tuple[Grammars, list[bytes]], wanted: object, said: str) -> None:
    with pytest.raises(LookonceError) as refusal:
        shapes[0].compile(schema(wanted), "response_format")
    assert refusal.value.kind is ErrorKind.INVALID_ARGUMENT and refusal.value.param == "response_format"
    assert refusal.value.message.startswith("response_format ") and said in refusal.value.message
    assert len(refusal.value.message) < 500 and "\n" not in refusal.value.message


def nested(levels: int) -> object:
    value: object = {"type": "integer"}
    for _ in range(levels):
        value = {"anyOf": [value]}
    return value


def doubling(levels: int) -> object:
    """2 ** levels properties, once its references are followed."""
    pairs = {
        f"d{at}": {"type": "object", "properties": {side: {"$ref": f"#/$defs/d{at + 1}"} for side in "lr"}}
        for at in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**pairs, f"d{levels}": {"type": "null"}}}


@pytest.mark.parametrize(
    "hostile",
    [
        schema(nested(200)),
        Structure(Kind.JSON_SCHEMA, "[" * 100_000),
        Structure(Kind.JSON_SCHEMA, '{"a":' * 20_000 + "1" + "}" * 20_000),
        schema(doubling(40)),
        schema({"enum": [f"{number:09}" for number in range(15_000)]}),
        schema({"type": "string", "pattern": "^(a|aa)*(b{1,500}){1,500}$"}),
        schema({"type": "array", "items": {"type": "string", "maxLength": 100_000}, "maxItems": 100_000}),
        Structure(Kind.REGEX, "(x+x+)+y" * 500),
        Structure(Kind.REGEX, "((a{1,1000}){1,1000}){1,1000}"),
        Structure(Kind.GRAMMAR, "start: " + " ".join(f'("{at}"|"b")?' for at in range(5000))),
        Structure(Kind.GRAMMAR, "start: a\na: a a | b\nb: a | "),
    ],
    ids=lambda structure: structure.source[:12],
)
def test_a_hostile_structure_costs_bounded_time(shapes: tuple[Grammars, list[bytes]], hostile: Structure) -> None:
    began = time.monotonic()
    with contextlib.suppress(LookonceError, TooComplex):  # refused, or a bound that is met on the way
        grammar = shapes[0].compile(hostile, "form")
        random_answer(grammar, shapes[1], random.Random(1), most=40)
    assert time.monotonic() - began < 20


async def structured(lab, grammar: Grammar | None, tokens: int = 120, **sampling) -> list[Answered]:
    async with lab.engine() as engine:
        request = generation(prompt(words(9, 1)), tokens, grammar=grammar, logprobs=None, **sampling)
        return await ask(engine, request)


async def test_random_weights_write_what_is_asked_for(lab, grammars: Grammars) -> None:
    grammar = grammars.compile(schema(ANSWER), "schema")
    finished = 0
    for seed in range(6):
        for answer in await structured(lab, grammar, temperature=1.5, seed=seed, n=2):
            if answer.finish.reason is FinishReason.LENGTH:
                continue
            finished += 1
            jsonschema.validate(json.loads(text_of(answer)), ANSWER)
    assert finished > 3


async def test_forced_text_takes_no_steps_of_its_own(lab, grammars: Grammars) -> None:
    wanted = {"const": {"a rather long name": [1, 2, 3, 4, 5], "and another one": "of a constant"}}
    grammar = grammars.compile(schema(wanted), "schema")
    async with lab.engine() as engine:
        (answer,) = await ask(engine, generation(prompt(words(9, 1)), 120, grammar=grammar, logprobs=None))
        assert engine.describe().steps <= 3 and engine.describe().generated_tokens == len(answer.tokens)
        (told,) = await ask(engine, generation(prompt(words(9, 1)), 120, grammar=grammar, logprobs=1))
    assert json.loads(text_of(answer)) == wanted["const"] and answer.finish.reason is FinishReason.STOP
    assert text_of(told) == text_of(answer) and len(told.logprobs) == len(told.tokens)
    (short,) = await structured(lab, grammar, tokens=10)
    assert short.finish.reason is FinishReason.LENGTH and len(short.tokens) == 10


async def test_others_in_the_step_answer_as_alone(lab, grammars: Grammars) -> None:
    grammar = grammars.compile(schema({"type": "array", "items": {"type": "integer"}, "minItems": 6}), "schema")
    free = generation(prompt(words(12, 3)), 40)
    async with lab.engine() as engine:
        (alone,) = await ask(engine, free)
        strict = [generation(prompt(words(9, at)), 60, grammar=grammar, logprobs=None) for at in range(5)]
        (among,), *answers = await asyncio.gather(*(ask(engine, each) for each in [free, *strict]))
    assert among.tokens == alone.tokens
    for (answer,) in answers:
        assert re.match(r"\[-?\d+", text_of(answer))


async def test_an_answer_goes_on_in_its_grammar_after_it_stepped_back(lab, grammars: Grammars) -> None:
    grammar = grammars.compile(Structure(Kind.REGEX, "(ab){50}"), "regex")
    token = lab.adapter.shape.token_bytes
    wanted = [generation(prompt(words(30, at)), 100, grammar=grammar, logprobs=1) for at in range(6)]
    async with lab.engine(kv_bytes=4 * 64 * token, slab_tokens=64, prefix_bytes=900 * token) as engine:
        answers = await asyncio.gather(*(ask(engine, each) for each in wanted))
        assert engine.describe().preemptions > 0
    assert {text_of(answer) for (answer,) in answers} == {"ab" * 50}


async def test_a_grammar_wins_over_what_else_steers(lab, grammars: Grammars) -> None:
    grammar = grammars.compile(Structure(Kind.CHOICES, '["red"]'), "choices")
    (banned,) = letters("r")
    for steer in ({"allowed": (5, 6)}, {"bad_words": ((banned,),)}, {"min_tokens": 50}, {"ignore_eos": True}):
        (answer,) = await structured(lab, grammar, **steer)
        assert text_of(answer) == "red" and answer.finish.reason is FinishReason.STOP
