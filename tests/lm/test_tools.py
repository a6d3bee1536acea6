"""Functions in prompts, and the grammar of calls: by the template's own words, or by ours where it has none."""

from __future__ import annotations

import json
import random
import re

import pytest
from tokenizers import Tokenizer

from lm_service.engine.answer import TokenTable
from lm_service.engine.grammar import Grammars, Kind, Structure
from lm_service.tools import tools_of
from lookonce.cli.model import BUNDLED
from lookonce.core.errors import LookonceError
from lookonce.models.chat.chat_format import ChatFormat, Turn
from protos.lookonce.v1 import language_pb2
from tests.engine.schemas import random_answer

COATS = {"type": "object", "properties": {"coats": {"enum": [1, 2]}}, "required": ["coats"]}
PAINT = {"name": "paint", "parameters": COATS}
STOP = {"name": "stop"}
FUNCTIONS = [json.dumps(PAINT), json.dumps(STOP)]
CALL = re.compile(r'<tool_call>\n\{"name": "(paint|stop)", "arguments": (\{"coats": [12]\}|\{\})\}\n</tool_call>')
PLAIN = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
NATIVE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}]{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    pieces = TokenTable.of(tokenizer.get_vocab(), added, added).pieces
    end = tokenizer.token_to_id("<|im_end|>")
    return Grammars(pieces, added, [end], lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def said(
    grammars: Grammars, tokenizer: Tokenizer, begun: str = "", structure: Structure | None = None, **tools
) -> list[str]:
    """Answers, behind a beginning."""
    wanted = tools_of(language_pb2.Tools(functions=FUNCTIONS, **tools), structure)
    assert wanted.grammar is not None
    grammar = grammars.compile(wanted.grammar, "tools")
    pieces, ids = grammar._words.tokens, tokenizer.encode(begun, add_special_tokens=False).ids
    found = [random_answer(grammar, pieces, random.Random(seed), begun=ids) for seed in range(30)]
    return [begun + text for text in found if text is not None]


def test_required_calls_are_calls_and_nothing_else(grammars: Grammars, tokenizer: Tokenizer) -> None:
    texts = said(grammars, tokenizer, choice="REQUIRED")
    assert len(texts) > 20 and any(text.count("<tool_call>") > 1 for text in texts)
    assert all(CALL.sub("", text).strip() == "" for text in texts)
    assert all(CALL.fullmatch(text) for text in said(grammars, tokenizer, choice="REQUIRED", single=True))
    assert {text.count("stop") for text in said(grammars, tokenizer, choice="REQUIRED", named="stop")} == {1}


@pytest.mark.parametrize("single", [True, False])
def test_a_tag_in_free_text_begins_a_call(grammars: Grammars, tokenizer: Tokenizer, single: bool) -> None:
    texts = said(grammars, tokenizer, "Well, then.\n<tool_call>", single=single)
    assert len(texts) > 5 and all(CALL.search(text) for text in texts)
    free = said(grammars, tokenizer, "Well, <tool", single=single)
    assert free


def test_an_answer_beside_calls_may_have_a_form(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = Structure(Kind.JSON_SCHEMA, json.dumps({"type": "array", "items": {"type": "boolean"}}))
    texts = said(grammars, tokenizer, structure=form)
    calls = [text for text in texts if text.startswith("<tool_call>")]
    assert calls and len(calls) < len(texts)
    assert all(isinstance(json.loads(text), list) for text in texts if text not in calls)


def test_text_of_ours_where_the_template_has_none(tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer, PLAIN, {})
    assert not chat.writes_tools
    call = json.dumps({"name": "paint", "arguments": {"coats": 1}})
    returned = [Turn("tool", ("done",)), Turn("tool", ("2",))]
    turns = [Turn("user", ("Paint it.",)), Turn("assistant", ("Yes.",), (call,)), *returned]
    text = chat.render(turns, [PAINT, STOP])
    head, *rest = text.removeprefix("[").removesuffix("]").split("][")
    assert head.startswith("system: ") and all(json.dumps(one) in head for one in (PAINT, STOP))
    assert rest == [
        "user: Paint it.",
        f"assistant: Yes.\n<tool_call>\n{call}\n</tool_call>",
        "user: <tool_response>\ndone\n</tool_response>\n<tool_response>\n2\n</tool_response>",
    ]
    own = chat.render([Turn("system", ("Be brief.",)), *turns[:1]], [STOP])
    assert own.startswith("[system: Be brief.\n\n") and own.count("system") == 1


def test_the_templates_own_words_where_it_has_some(tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer, NATIVE, {})
    assert chat.writes_tools
    text = chat.render([Turn("user", ("Hm?",)), Turn("tool", ("done",))], [STOP])
    assert text == 'T[{"type": "function", "function": {"name": "stop"}}][user: Hm?][tool: done]'
    assert chat.render([Turn("user", ("Hm?",))]) == "[user: Hm?]"


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        (["{"], "not JSON"),
        (['{"parameters": {}}'], "name"),
        ([json.dumps({"name": "a", "parameters": False})], "schema"),
    ],
)
def test_refused(functions: list[str], said: str) -> None:
    with pytest.raises(LookonceError, match=said):
        tools_of(language_pb2.Tools(functions=functions), None)
