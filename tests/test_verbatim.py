"""A template written without Jinja writes what Jinja does; one that looks at contents is rendered."""

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import TEMPLATES, real_tokenizer
from tiny_tokenizer import tiny_tokenizer
from turns import bot, system, user

from orpo.data.named_templates import NAMED
from orpo.data.rendering import Renderer
from orpo.data.templates import prepare_template
from orpo.data.verbatim import looks_for

DATE = datetime(2026, 11, 27)
SHAPES = (
    [user("a")],
    [user("a"), bot("b")],
    [system("s"), user("a"), bot("b"), user("c")],
    [system("s"), user("a"), bot("b"), user("c"), bot("d")],
    [user("a"), bot("b"), bot("c"), user("d")],
    [bot("b"), user("c")],
)
CONTENTS = (
    "plain", "<think>\nx\n</think>\n\ny", "a\n</think>", "<tool_response>r</tool_response>", " blanks ", "",
    "\n", "{{ messages }}", "<|im_end|>", "ORPO content 0 marker", "\\n'\"", "<|channel|>final<|message|>x",
    "[INST] x", "/no_think", "é 漢字\u00a0", "\u200b",
)  # fmt: skip


def rendered(template, tokenizer, turns, ask):
    try:
        return template.render(tokenizer, turns, None, ask=ask)
    except Exception as error:
        return repr(error)


def written(renderer, turns, ask):
    try:
        return renderer.write(renderer.template, turns, None, ask=ask)
    except Exception as error:
        return repr(error)


def check(renderer, tokenizer, content):
    for shape in SHAPES:
        for place in range(len(shape)):
            turns = [
                {**turn, "content": content if at == place else f"{turn['content']} {at}"}
                for at, turn in enumerate(shape)
            ]
            for ask in (False, True):
                expected = rendered(renderer.template, tokenizer, turns, ask)
                assert written(renderer, turns, ask) == expected, (turns, ask)


def real_renderer(name):
    tokenizer, stops = real_tokenizer(name)
    return Renderer(tokenizer, stop_tokens=stops, date=DATE), tokenizer


PROVED = [
    "cohere", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gptoss", "llama3", "llama3_1",
    "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl",
]  # fmt: skip


def test_the_templates_of_the_large_families_are_proved():
    for name in PROVED:
        assert looks_for(str(real_tokenizer(name)[0].chat_template)) is not None, name
    for name, template in NAMED.items():
        assert looks_for(template.text) is not None, name


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.endswith("_training")])
def test_a_real_template_writes_what_jinja_does(name):
    renderer, tokenizer = real_renderer(name)
    if looks_for(renderer.template.text) is not None:
        for content in CONTENTS:
            check(renderer, tokenizer, content)


@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=8, deadline=None)
@given(content=st.text(max_size=8))
def test_a_named_template_writes_what_jinja_does(name, content):
    tokenizer = tiny_tokenizer(None)
    check(Renderer(tokenizer, name, date=DATE), tokenizer, content)


LOOP = "{% for m in messages %}"
LOOKS = [
    "{{ m.content | length }}",
    "{{ m.content[0] }}",
    "{{ m.content | upper }}",
    "{{ m.content.split('x')[0] }}",
    "{{ m | tojson }}",
    "{{ m }}",
    "{{ m.get('content') }}",
    "{% for k, v in m.items() %}{{ v }}{% endfor %}",
    "{% set k = 'content' %}{{ m[k][:1] }}",
    "{% if m.content == 'x' %}y{% endif %}{{ m.content }}",
    "{% if m.content > 'm' %}y{% endif %}{{ m.content }}",
    "{% set c = m.content %}{% if c | length > 3 %}y{% endif %}{{ c }}",
    "{% set c = 'x' + m.content %}{% if 'xa' in c %}y{% endif %}{{ c }}",
    "{% set c = m.content %}{% set n = namespace(x=c) %}{{ n.x | upper }}",
    "{% macro f(t) %}{{ t | upper }}{% endmacro %}{{ f(m.content) }}",
    "{% macro f(t) %}{{ t.content | upper }}{% endmacro %}{{ f(m) }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% set c %}{{ m.content }}{% endset %}{{ c | upper }}",
    "{% if loop.previtem is defined and loop.previtem.content == 'a' %}y{% endif %}{{ m.content }}",
    "{{ loop.changed(m.content) }}",
    "{{ 'y' if m.content < 'm' else 'n' }}",
    "{{ m.content.strip('pn') }}",
    "{{ m.content.replace('a', 'b') }}",
    "{{ m['con' ~ 'tent'] | upper }}",
    "{{ messages | map(attribute='content') | join }}",
    "{% set c, d = m.content, 1 %}{{ c | upper }}",
    "{% with c = m.content %}{{ c | upper }}{% endwith %}",
    "{% for c in m.content %}{{ c }}-{% endfor %}",
    "{{ [m.content] }}",
    "{{ m.content ~ (m.content | length) }}",
    "{{ messages[m.content | length].role }}",
]


@pytest.mark.parametrize("body", LOOKS)
def test_a_template_that_may_look_at_contents_is_not_proved(body):
    assert looks_for(LOOP + body + "{% endfor %}") is None


def test_what_a_template_looks_for_is_known():
    thinks = "{% if '</think>' in m.content %}y{% else %}{{ m.content }}{% endif %}"
    assert looks_for(LOOP + thinks + "{% endfor %}") == {"</think>"}
    dead = "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    assert looks_for(LOOP + dead + "{% endfor %}") == frozenset()
    assert looks_for("{% for m in messages %}{{") is None


def test_arguments_and_dates_are_written_as_rendered():
    text = "{{ mode }} {{ strftime_now('%d') }}" + LOOP + "{{ m.role + m.content }}</s>{% endfor %}"
    tokenizer = tiny_tokenizer("mistral")
    tokenizer.chat_template = text
    renderer = Renderer(tokenizer, chat_template_kwargs={"mode": "M"}, date=DATE)
    assert prepare_template(tokenizer, chat_template_kwargs={"mode": "M"}, date=DATE).text
    check(renderer, tokenizer, "x")
