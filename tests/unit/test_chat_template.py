from __future__ import annotations

from typing import Any

import pytest

from tael.errors import TaelError
from tael.loader import chat_template, template_sandbox
from tael.loader.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": " Hi 'é' <b> "}, {"role": "assistant", "content": "Yo"}]


def render(source: str, messages: list[dict[str, Any]] = MESSAGES, **arguments: Any) -> str:
    return ChatTemplate(source).render(
        messages, arguments, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", "<s>|</s>|True"),
        ("{{ messages[0].content | trim }}", "Hi 'é' <b>"),
        ("{{ messages[0]['content'].strip().split()[1] }}", "'é'"),
        (
            "{% for m in messages %}\n  {{- m.role }}{{ ',' if not loop.last }}\n{% endfor %}",
            "user,\nassistant\n",
        ),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{{ tools is none }}{{ documents is none }}{{ nothing is defined }}", "TrueTrueFalse"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": " Hi \'é\' <b> "}'),
        ("{{ [1, none] | tojson(indent=1, ensure_ascii=true) }}", "[\n 1,\n null\n]"),
        ("{% set x = namespace(n=0) %}{% set x.n = x.n + 2 %}{{ x.n * 3 % 4 }}", "2"),
        (
            "{{ 'a' ~ 1 ~ none }}{{ ['a', 2] + [3] }}{{ {'k': (1, 2)} }}",
            "a1None['a', 2, 3]{'k': (1, 2)}",
        ),
        (
            "{{ 'a-b'.replace('-', '+') }}{{ '-'.join(['a', 'b']) }}{{ 'aa'|replace('a','b',1) }}",
            "a+ba-bba",
        ),
        ("{{ '{} {x}'.format(1, x='y') }}", "1 y"),
        ("{{ messages | map(attribute='role') | join('/') }}", "user/assistant"),
        ("{{ messages | join('/', attribute='role') }}", "user/assistant"),
        ("{{ 'a\nb' | indent(2, true) }}", "  a\n  b"),
        (
            "{% macro m(a, b=1) %}[{{ a }}{{ b }}]{% endmacro %}{{ m('x') }}{{ m('y', b=2) }}",
            "[x1][y2]",
        ),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}", "A1"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for k, v in messages[0].items() %}{{ k }}{% endfor %}", "rolecontent"),
        ("{% for x in [1, 2, 3] %}{{ loop.revindex }}{{ loop.length }}{% endfor %}", "332313"),
        ("{{ messages[::-1][0].role }}{{ messages | length }}", "assistant2"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_renders_as_jinja_does(source: str, expected: str) -> None:
    assert render(source) == expected


def test_arguments_are_those_on_the_list() -> None:
    assert render("{{ enable_thinking }}{{ tools[0].x }}", tools=[{"x": 1}], enable_thinking=False)
    for name in ("messages", "bos_token", "raise_exception", "chat_template", "tokenize"):
        with pytest.raises(TaelError, match=name):
            ChatTemplate("").render(
                MESSAGES, {name: "x"}, add_generation_prompt=True, bos_token="", eos_token=""
            )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ().__class__.__base__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now.__globals__.os }}",
        "{{ range.__class__.mro() }}",
        "{{ ''|attr('__class__') }}",
        "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
        "{{ [messages]|groupby('__class__') }}",
        "{{ messages|map(attribute='__class__')|map(attribute='__base__')|first|string + 1 }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
        "{{ ''.format.__self__.x }}",
        "{{ ''.format.func.x }}",
        "{{ ''.replace.func.x }}",
        "{{ '%s' | format('x') }}",
        "{{ '%s' % 'x' }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
    ],
)
def test_injections_end_in_an_error(source: str) -> None:
    with pytest.raises(TaelError) as error:
        render(source)
    assert "\n" not in str(error.value)


def grow(step: str, start: str = "'xx'") -> str:
    """A template that replaces ``n.x`` by ``step`` 60 times."""
    return (
        f"{{% set n = namespace(x={start}) %}}"
        f"{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
        "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10000000) | list }}",
        "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 10 ** 10 ** 9 }}",
        grow("n.x * n.x", "3"),
        grow("n.x + n.x"),
        grow("n.x ~ n.x"),
        grow("n.x + n.x", "['x']"),
        grow("[n.x, n.x, n.x]") + "{{ n.x }}",
        grow("{'a': n.x, 'b': n.x}") + "{{ n.x }}",
        grow("(n.x, n.x, n.x)"),
        grow("dict(a=n.x, b=n.x)") + "{{ n.x | tojson }}",
        grow("[n.x, n.x] | join"),
        grow("n.x.join([n.x, n.x])"),
        grow("n.x | replace('x', 'xx')"),
        grow("n.x.replace('x', 'xx')"),
        grow("'{0}{0}'.format(n.x)"),
        grow("f(n.x)").join(["{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}", ""]),
        "{% set x = 'x' * 9999999 %}{% for i in range(9999) %}{% set y = x | upper %}{% endfor %}",
        "{% set x = 'x' * 9999999 %}{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}",
        "{{ '{:1000000000}'.format('x') }}",
        "{{ '{:{}}'.format('x', 1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\n' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    ],
)
def test_work_and_memory_are_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 20_000)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1 << 20)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1 << 20)
    with pytest.raises(TaelError) as error:
        render(source)
    assert "\n" not in str(error.value)


def test_cpu_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_CPU_S", 0.0)
    with pytest.raises(TaelError, match="too long"):
        render("{% for a in [1] %}{% endfor %}")


def test_a_long_conversation_stays_far_below_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", template_sandbox.MAX_WORK // 20)
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 200}] * 1000
    assert len(render(source, messages)) > 1_000_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{", "failed: unexpected"),
        ("{% x %}", "unknown tag"),
        ("{{ x | nofilter }}", "No filter named 'nofilter'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9].content.strip() }}", "no element 9"),
        ("{{ '{:9}'.format('x') }}", "widths"),
        ("{{ [1] | tojson(indent=99) }}", "indents JSON by 99"),
        ("{{ raise_exception('Roles must\nalternate!') }}", "refused .*: Roles must alternate!;"),
        ("x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1), "characters"),
    ],
)
def test_faults_are_one_line(source: str, message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        render(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
