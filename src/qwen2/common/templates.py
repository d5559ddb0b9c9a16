"""Templates that came with somebody else's files: Jinja in a sandbox, able to tell whose text is
whose.

A `Template` renders plainly, or traced: Jinja's autoescaping then keeps the template's own text
apart from what is put into it. In a traced rendering only the template's `<` stand unescaped, and
`BEGIN` and `END` surround what lies inside `{% generation %}`.

The sandbox keeps a template from the rest of the program. It bounds neither time nor memory:
`{{ 'x' * 10 ** 9 }}` runs in it, when it is compiled already. `bounded_templates.py` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from qwen2.common.errors import UserError

MAX_SOURCE = 64 * 1024  # characters; published templates have some 2,500
MAX_RENDERED = 16 * 1024 * 1024  # characters; some four million tokens

# Marks around generated text in a traced rendering. No conversation can forge them (its "<" are
# escaped), and no template holds these code points, which are no characters.
BEGIN, END = "<\ufdd0", "<\ufdd1"


class Template:
    """A Jinja template, sandboxed.

    Args:
        source: the template.
        names: further names that it may use, such as `eos_token`; their text counts as its own.
        what: what errors call it.

    Raises:
        UserError: it is longer than 64 KiB or is not Jinja.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], *, what: str = "chat template"
    ) -> None:
        check_size(source, what)
        self._source, self._what = source, what
        self._names = {name: Markup(text) for name, text in names.items()}
        self._plain = self._compile(traced=False)

    def render(self, values: Mapping[str, Any], *, traced: bool = False) -> str:
        """The template filled with `values`.

        Raises:
            UserError: the template refuses them, or gives too long a text.
        """
        template = self._traced if traced else self._plain
        pieces: list[str] = []
        left = MAX_RENDERED
        try:
            for piece in template.generate(**values, **self._names):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise UserError(f"it gives more than {MAX_RENDERED:,} characters")
        # A template is somebody else's program: whatever it raises is told in one line.
        except Exception as error:
            raise UserError(f"{self._what}: {' '.join(str(error).split())[:1000]}") from error
        return "".join(pieces)

    @property
    def variables(self) -> frozenset[str]:
        """The names that it takes from the values it is filled with."""
        return frozenset(meta.find_undeclared_variables(_environment(False).parse(self._source)))

    @cached_property
    def _traced(self) -> jinja2.Template:
        return self._compile(traced=True)

    def _compile(self, traced: bool) -> jinja2.Template:
        environment = _environment(traced)
        try:
            tree = environment.parse(self._source)
            if traced:
                tree = _TrustTemplate().visit(tree)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self._what}, line {error.lineno}: {error.message}") from None
        return environment.template_class.from_code(environment, code, environment.globals)


def check_size(source: str, what: str = "chat template") -> None:
    """A UserError if the source of a template is too long."""
    if len(source) > MAX_SOURCE:
        raise UserError(f"{what}: {len(source)} characters; {MAX_SOURCE} at most")


def escape_ampersand(text: str) -> str:
    """So that unescaping the whole gives `text` again, though its "<" stay as they are."""
    return text.replace("&", "&amp;")


def _environment(traced: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=traced,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.filters["safe"] = lambda text: text  # nothing from a conversation is ever safe
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks its contents in a traced rendering."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        scope = nodes.Scope(body, lineno=line)
        if not self.environment.autoescape:
            return [scope]
        begin, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END)
        )
        return [begin, scope, end]


class _TrustTemplate(NodeTransformer):
    """Mark the strings that stand in the template itself as needing no escape."""

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:  # noqa: N802
        if not isinstance(node.value, str):
            return node
        return nodes.MarkSafe(nodes.Const(escape_ampersand(node.value)), lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.TemplateData:  # noqa: N802
        return nodes.TemplateData(escape_ampersand(node.data), lineno=node.lineno)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: Jinja's own would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))
