"""Chat templates say in our sandbox what they say in transformers', and are refused what they are refused there."""

from __future__ import annotations

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers.utils.chat_template_utils import render_jinja_template

from lookonce.models.chat.chat_format import ChatFormat, TemplateRefusal
from lookonce.models.qwen2_vl.synthetic_tokenizer import CHAT_TEMPLATE

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'hé <b> "q" & 🐈'}]},
]
ALIKE = {
    "ours": CHAT_TEMPLATE,
    "json": "{% for m in messages %}  {{ m['content'] | tojson }}{{ m | tojson(indent=2) }}\n{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "a{% generation %}{{ messages[0].role }}\n{% endgeneration %}\nb",
    "namespace": "{% set n = namespace(a=1, self=2) %}{% set n.a = 3 %}{{ n.a }}{{ n.self }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['x']) }}",
    "what is absent": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ other is defined }}",
    "names and time": "{{ bos_token }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}",
    "blocks": "  {% if true %}\n   x\n  {% endif %}\n y ",
    "an attribute of Python's": "{{ ''.__class__ }}{{ dict.__init__ }}{{ messages.append }}",
}
REFUSED = [
    "{{ raise_exception('no') }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ ''.__class__.mro() }}",
    "{{ messages.append(1) }}",
    "{% if %}",
    "{{ 1 / 0 }}",
]


def theirs(template):
    return render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>")[0][0]


def ours(template):
    return ChatFormat(Tokenizer(models.BPE()), template, {"bos_token": "<s>"})._render(MESSAGES)


@pytest.mark.parametrize("name", ALIKE)
def test_a_template_renders_as_in_transformers(name):
    assert ours(ALIKE[name]) == theirs(ALIKE[name])


@pytest.mark.parametrize("template", REFUSED)
def test_what_transformers_refuses_is_refused(template):
    with pytest.raises((jinja2.TemplateError, ArithmeticError)):
        theirs(template)
    with pytest.raises(TemplateRefusal):
        ours(template)
