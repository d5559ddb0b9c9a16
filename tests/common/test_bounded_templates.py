"""Hostile templates: each ends in time with one line, and the next rendering works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from qwen2.common import bounded_templates
from qwen2.common.bounded_templates import BoundedTemplate
from qwen2.common.errors import UserError
from qwen2.common.templates import Template

SAY = "{% if say == 'evil' %}EVIL{% endif %}{{ say }}{{ eos }}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "long string": "{{ (say ~ '') * 10 ** 9 }}",
    "huge power": "{{ (say ~ 'abc') | length ** (10 ** 9) }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "wide format": "{{ '%1000000000d' % 1 ~ say }}",
    "padding": "{{ say.ljust(10 ** 9) }}",
    "calling itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "endless output": "{% for a in range(99999) %}{{ say * 999 }}{% endfor %}",
    "listing": "{{ [0] * 10 ** 9 }}",
}


@pytest.fixture(scope="module")
def templates() -> Iterator[Any]:
    made = []

    def make(hostile: str) -> BoundedTemplate:
        source = SAY.replace("EVIL", hostile)
        made.append(BoundedTemplate(source, {"eos": "<|e|>"}, seconds=1))
        return made[-1]

    yield make
    for template in made:
        template.close()


def test_it_renders_as_a_template_does(templates: Any) -> None:
    bounded, plain = templates("x"), Template(SAY.replace("EVIL", "x"), {"eos": "<|e|>"})
    for value in ("é<\u2028\n", "", "\ud800"):
        for traced in (False, True):
            expected = plain.render({"say": value}, traced=traced)
            assert bounded.render({"say": value}, traced=traced) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(templates: Any, name: str) -> None:
    template = templates(HOSTILE[name])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^chat template: ") as caught:
        template.render({"say": "evil"})
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
    assert template.render({"say": "fine"}) == "fine<|e|>"


def test_a_process_that_has_died_harms_no_conversation(templates: Any) -> None:
    template = templates("x")
    template._child.kill()
    template._child.wait()
    assert template.render({"say": "fine"}) == "fine<|e|>"


def test_a_template_that_never_compiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes what is constant when it compiles."""
    monkeypatch.setattr(bounded_templates, "START_SECONDS", 2.0)
    with pytest.raises(UserError, match=r"^chat template: it was ended for taking more than 2 s"):
        BoundedTemplate("{{ 7 ** (10 ** 9) }}", {})


def test_bad_templates_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"^chat template, line 1: "):
        BoundedTemplate("{% if %}", {})
