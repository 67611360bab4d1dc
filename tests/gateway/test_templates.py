from __future__ import annotations

import pytest

from splitnet.errors import BadInput
from splitnet.gateway.templates import ChatTemplate

TALK = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
#: As models write them: blocks that trim, namespaces, loop controls, macros, JSON, dates.
FAMILIES = {
    "chatml": "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token}}{% endif %}{% endfor %}",
    "llama3": "{% set ns = namespace(n=0) %}\n{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n{% set ns.n = ns.n + 1 %}\n<|h|>{{ m.role }} {{ ns.n }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}{{ messages | tojson }}{{ strftime_now('%Y') | length }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ tools is none }}",
    "macro": "{% macro say(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}\n{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_render_as_in_transformers(family: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template([TALK], chat_template=FAMILIES[family], add_generation_prompt=True, **special)
    assert ChatTemplate(FAMILIES[family], special).render(TALK) == expected


def test_a_refusal_of_the_template_is_told() -> None:
    template = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('the first must be a user') }}{% endif %}", {})
    with pytest.raises(BadInput, match="the first must be a user"):
        template.render(TALK)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_or_broken_template_ends_in_an_error(hostile: str) -> None:
    with pytest.raises(BadInput, match="messages: the"):
        ChatTemplate(hostile, {}).render(TALK)


def test_what_a_template_makes_is_bounded() -> None:
    endless = "{% for i in range(10000) %}{% for j in range(10000) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    with pytest.raises(BadInput, match="makes more than"):
        ChatTemplate(endless, {}).render([{"role": "user", "content": "x" * 100_000}])
