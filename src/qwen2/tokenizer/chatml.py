"""Conversations to text and to token ids with a training mask: ChatML (report, section 2.1).

Our template (data/chatml.jinja) is the published one plus two branches that it lacks: tools in the
Hermes `<tool_call>` form, which Qwen2.5 adopted and servers parse, and `{% generation %}` around
what the assistant says, for the mask. A checkpoint's own template takes its place.

`render` gives the string that any renderer gives. `encode` does not tokenize that string, in which
a message could write `<|im_end|>` and forge a turn: it renders once more with Jinja's autoescaping,
which keeps the template's own text apart from what the conversation puts in. Only the template's
`<`, unescaped, can begin a control token; everything else is encoded as plain text. The text
between two control tokens is encoded as a whole, so ordinary conversations get the ids that
transformers gives them, with one exception: a cut is made where the assistant begins to speak, as
it is when a model is asked to generate, even if its words begin with a line end.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Any, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from qwen2.common.errors import UserError
from qwen2.tokenizer.tokenizer import IM_END, IM_START, Tokenizer, alternatives

Message = Mapping[str, Any]  # role, content; perhaps tool_calls
Tool = Mapping[str, Any]  # a function's JSON schema, as in OpenAI's API

MAX_SOURCE = 64 * 1024  # characters; published templates have some 2,500

# Marks around generated text in a traced rendering. No conversation can forge them (its "<" are
# escaped), and no template holds these code points, which are no characters.
_BEGIN, _END = "<\ufdd0", "<\ufdd1"


class ChatTemplate:
    """A Jinja chat template, sandboxed.

    Args:
        source: the template; ours by default.
        names: further names that templates use, such as `eos_token`.

    Raises:
        UserError: the template is longer than 64 KiB or is not Jinja.
    """

    def __init__(self, source: str | None = None, **names: str) -> None:
        self.source = default_source() if source is None else source
        self._names = names
        if len(self.source) > MAX_SOURCE:
            raise UserError(f"chat template: {len(self.source)} characters; {MAX_SOURCE} at most")
        self._plain = self._compile(traced=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The template of a checkpoint's tokenizer, or ours where it has none."""
        return cls(
            tokenizer.chat_template,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as one string, the same that transformers renders.

        Raises:
            UserError: a message lacks role or content, or the template refuses the conversation.
        """
        return self._render(self._plain, messages, tools, add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Token ids of the conversation and, for each, 1 where the assistant speaks, else 0.

        The mask covers the assistant's words, its tool calls and the `<|im_end|>` after them. A
        template without `{% generation %}`, as the published ones are, gets its mask from the
        ChatML structure: from behind `<|im_start|>assistant` to the next `<|im_end|>`.

        Raises:
            UserError: as `render`; or the template computes with the conversation's text in a way
                that hides which text is whose.
        """
        traced = self._render(self._traced, messages, tools, add_generation_prompt)
        if not re.search(r"\{%[-+]?\s*generation\b", self.source):
            speech = f"({re.escape(IM_START)}assistant\n)(.*?{re.escape(IM_END)})"
            traced = re.sub(speech, rf"\1{_BEGIN}\2{_END}", traced, flags=re.DOTALL)
        pieces = alternatives([_BEGIN, _END, *map(_escape_ampersand, tokenizer.special_tokens)])
        ids: list[int] = []
        mask: list[int] = []
        text: list[str] = []
        speaking = 0
        for i, piece in enumerate(pieces.split(traced)):
            if piece in (_BEGIN, _END):
                speaking = int(piece == _BEGIN)
                continue
            text.append(html.unescape(piece))
            ids += [tokenizer.special_tokens[text[-1]]] if i % 2 else tokenizer.encode(text[-1])
            mask += [speaking] * (len(ids) - len(mask))
        if "".join(text) != self.render(messages, tools, add_generation_prompt):
            raise UserError(
                "chat template: it computes with the text of messages so that control tokens in "
                "them could not be told from its own; use a simpler template"
            )
        return ids, mask

    @cached_property
    def _traced(self) -> jinja2.Template:
        return self._compile(traced=True)

    def _compile(self, traced: bool) -> jinja2.Template:
        environment = _environment(traced)
        try:
            tree = environment.parse(self.source)
            if traced:
                tree = _TrustTemplate().visit(tree)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from None
        return environment.template_class.from_code(environment, code, environment.globals)

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
    ) -> str:
        _check(messages)
        names = {name: Markup(text) for name, text in self._names.items()}
        try:
            return str(
                template.render(
                    messages=messages,
                    tools=tools or None,
                    add_generation_prompt=add_generation_prompt,
                    **names,
                )
            )
        # A template is somebody else's program: whatever it raises is told in one line.
        except Exception as error:
            raise UserError(f"chat template: {' '.join(str(error).split())}") from error


def default_source() -> str:
    """The text of our template."""
    data = resources.files("qwen2.tokenizer") / "data"
    return (data / "chatml.jinja").read_text(encoding="utf-8")


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("conversation: no messages; at least one is needed")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {i}: expected keys 'role' and 'content', role being a string")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise UserError(f"message {i} ({message['role']}): its content must be a string")


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
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)
        )
        return [begin, scope, end]


class _TrustTemplate(NodeTransformer):
    """Mark the strings that stand in the template itself as needing no escape."""

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:  # noqa: N802
        if not isinstance(node.value, str):
            return node
        return nodes.MarkSafe(nodes.Const(_escape_ampersand(node.value)), lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.TemplateData:  # noqa: N802
        return nodes.TemplateData(_escape_ampersand(node.data), lineno=node.lineno)


def _escape_ampersand(text: str) -> str:
    """So that unescaping the whole gives `text` again, though its "<" stay as they are."""
    return text.replace("&", "&amp;")


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
