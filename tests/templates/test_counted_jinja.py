"""A template without an end, or of gigabytes, fails on its row, after so many steps wherever it runs."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchmix.templates.counted_jinja import count_steps_of, counted
from batchmix.templates.messages import PromptError
from batchmix.templates.template import RowTemplate

COSTLY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "a loop that keeps nothing": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}x",
    "recursive loop": "{% for a in range(9) recursive %}{% if loop.depth < 9 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    "text times": "{{ 'x' * 600000000 }}",
    "times text": "{{ 600000000 * 'x' }}",
    "times within": "{{ (text * 60000) * 60000 }}",
    "list times": "{% for a in [1] * 600000000 %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "powers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling by +": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "doubling by join": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = [n.x, n.x]|join %}{% endfor %}",
    "doubling by a block": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "equal lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "lists to JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x|tojson }}",
    "center": "{{ 'x'|center(600000000) }}",
    "center's width": "{{ 'x'|center(width=size) }}",
    "ljust": "{{ 'x'.ljust(600000000) }}",
    "zfill": "{{ 'x'.zfill(600000000) }}",
    "expandtabs": "{{ ('\t' * 900).expandtabs(900000) }}",
    "indent": "{{ ('x\n' * 9000)|indent(90000) }}",
    "tojson's indent": "{{ [1]|tojson(indent=600000000) }}",
    "replace": "{{ ('x' * 60000)|replace('x', 'y' * 60000) }}",
    "replace method": "{{ ('x' * 60000).replace('x', 'y' * 60000) }}",
    "replace nothing": "{{ ('x' * 60000).replace('', 'y' * 60000) }}",
    "join method": "{{ ('x' * 60000).join('y' * 60000) }}",
    "join": "{{ range(60000)|join('y' * 60000) }}",
    "translate": "{{ ('x' * 60000).translate({120: 'y' * 60000}) }}",
    "percent": "{{ '%600000000d' % 1 }}",
    "percent's width": "{{ '%*d' % (600000000, 1) }}",
    "precision": "{{ '%.600000000f' % 1 }}",
    "format": "{{ '{:>600000000}'.format(1) }}",
    "format's width": "{{ '{:{}}'.format(1, 600000000) }}",
    "format twice": "{{ ('{0}' * 60000).format('y' * 60000) }}",
    "format filter": "{{ '%600000000d'|format(1) }}",
    "wordwrap": "{{ ('x' * 60000)|wordwrap(1, wrapstring='y' * 60000) }}",
    "batch": "{{ [1]|batch(600000000, 'x')|list }}",
    "slice": "{{ [1]|slice(600000000)|list }}",
    "round": "{{ 5|round(-600000000) }}",
    "to_bytes": "{{ (1).to_bytes(600000000) }}",
    "map of map": "{% for a in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "select": "{% for a in range(99999) %}{{ range(99999)|select('gt', 99999)|list }}{% endfor %}",
    "sum": "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "in": "{% set x = range(99999)|list %}{% for a in range(99999) %}{{ -1 in x }}{% endfor %}",
    "slices": "{% set x = 'x' * 999999 %}{% for a in range(99999) %}{{ x[1:]|length }}{% endfor %}",
    "upper": "{% set x = 'x' * 999999 %}{% for a in range(99999) %}{{ x.upper()|length }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "call blocks": "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
    "text of the template": "{% for a in range(99999) %}" + 9999 * "x" + "{% endfor %}",
    "text of a column": "{% for a in range(99999) %}{{ text }}{% endfor %}",
}  # fmt: skip
COLUMNS = {"text": 999 * "x", "size": 600_000_000}
RENDERED = {
    "{% for n in numbers if n > 1 %}{{ loop.index }}/{{ loop.length }}: {{ n }}{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}":
    "1/2: 2, 2/2: 3",
    "{% for n in tree recursive %}<{% if n is iterable %}{{ loop(n) }}{% else %}{{ n }}{% endif %}>{% endfor %}": "<1><<2>>",
    "{% for k, v in table|dictsort %}{{ k ~ '=' ~ v }};{% endfor %}": "a=1;b=2;",
    "{{ numbers|map('string')|join('-') }} {{ numbers|select('odd')|list }} {{ '%s-%03d' % ('a', 7) }}": "1-2-3 [1, 3] a-007",
    "{{ text.strip()|upper|center(7)|replace('H', 'J') }}|{{ '{:>5}'.format(3) }}|{{ 'ab' * 2 }}|{{ text[1:3] }}": "  JEY  |    3|abab|he",
    "{% macro m(x, y=2) %}{{ x }}{{ y }}{{ caller() }}{% endmacro %}{% call m(1) %}{% endcall %}{% call m(3) %}!{% endcall %}": "1232!",
    "{% set n = namespace(a=1) %}{% for x in numbers %}{% set n.a = n.a * x + 1 %}{% endfor %}{{ n.a }} {{ 2 ** 10 }}": "16 1024",
    "{{ table == {'a': 1, 'b': 2} }} {{ 2 in numbers }} {{ 1 < 2 < 3 }} {{ numbers|tojson }} {{ '\n'.join(['a', 'b']) }}": "True True True [1, 2, 3] a\nb",
    "{% filter indent(2) %}a\nb{% endfilter %}{{ numbers|batch(2)|list }}{{ missing|default('-') }}": "a\n  b[[1, 2], [3]]-",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """2 GiB more than what is there, so that a text of gigabytes is a failure and not the end of the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_an_error_of_its_row(name: str) -> None:
    template = RowTemplate(COSTLY[name])
    started = time.thread_time()
    with pytest.raises(PromptError, match=r"fails on this row: it takes more than 250,000 steps, or makes a text of"):
        template.render(COLUMNS)
    assert time.thread_time() - started < 20  # of hours; no promise of the budget, which counts


@pytest.mark.parametrize("source", RENDERED)
def test_counting_changes_no_text(source: str) -> None:
    columns: dict[str, Any] = {"numbers": [1, 2, 3], "tree": [1, [2]], "table": {"b": 2, "a": 1}, "text": " hey "}
    assert RowTemplate(source).render(columns) == RENDERED[source]
    assert ImmutableSandboxedEnvironment().from_string(source).render(columns) == RENDERED[source]


def test_the_budget_is_a_count_and_each_row_has_its_own() -> None:
    template = RowTemplate("{% for a in range(count) %}{% endfor %}x")
    for _ in range(3):
        assert template.render({"count": 99_000}) == "x"
    twice = RowTemplate("{% for a in range(count) %}{% for b in range(1000) %}{% endfor %}{% endfor %}x")
    assert twice.render({"count": 240}) == "x"
    with pytest.raises(PromptError, match="steps"):
        twice.render({"count": 1000})


def test_templates_that_another_library_compiled_count_too() -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["shout"] = lambda text: text.upper() + "!"
    environment.globals["answer"] = lambda: 42
    source = (
        "{% for a in range(9) %}\n{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}{{ 'x'|shout }}{{ answer() }}"
    )
    template = environment.from_string(source)
    expected = template.render()
    count_steps_of(template, source)
    assert counted(template.render) == expected == "01X!42"
    source = COSTLY["nested loops"]
    template = environment.from_string(source)
    count_steps_of(template, source)
    with pytest.raises(Exception, match="250,000 steps"):
        counted(template.render)


def test_a_template_that_is_nested_too_deeply_is_refused() -> None:
    from batchmix.errors import BatchmixError

    with pytest.raises(BatchmixError, match="nested too deeply"):
        RowTemplate("{{ " + 9999 * "(" + "1" + 9999 * ")" + " }}")
