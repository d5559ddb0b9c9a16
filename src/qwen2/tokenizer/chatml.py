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
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Self

from qwen2.common.bounded_templates import BoundedTemplate
from qwen2.common.errors import UserError
from qwen2.common.templates import BEGIN, END, Template, escape_ampersand
from qwen2.tokenizer.tokenizer import IM_END, IM_START, Tokenizer, alternatives

Message = Mapping[str, Any]  # role, content; perhaps tool_calls
Tool = Mapping[str, Any]  # a function's JSON schema, as in OpenAI's API

# What the assistant says, in templates that don't mark it. It holds no <|im_start|>, which keeps
# the search linear in a text without <|im_end|>.
_SPEECH = re.compile(
    f"({re.escape(IM_START)}assistant\n)((?:(?!{re.escape(IM_START)}).)*?{re.escape(IM_END)})",
    flags=re.DOTALL,
)


class ChatTemplate:
    """A Jinja chat template, sandboxed.

    Args:
        source: the template; ours by default.
        bounded: bound its time and memory too, for which it gets a process of its own. A server
            wants that of a template that is not ours.
        names: further names that templates use, such as `eos_token`.

    Raises:
        UserError: the template is longer than 64 KiB or is not Jinja.
    """

    def __init__(self, source: str | None = None, *, bounded: bool = False, **names: str) -> None:
        self.source = default_source() if source is None else source
        self._template = (BoundedTemplate if bounded else Template)(self.source, names)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, bounded: bool = False) -> Self:
        """The template of a checkpoint's tokenizer, or ours where it has none."""
        return cls(
            tokenizer.chat_template,
            bounded=bounded and tokenizer.chat_template not in (None, default_source()),
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
        return self._render(False, messages, tools, add_generation_prompt)

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
        traced = self._render(True, messages, tools, add_generation_prompt)
        if not re.search(r"\{%[-+]?\s*generation\b", self.source):
            traced = _SPEECH.sub(rf"\1{BEGIN}\2{END}", traced)
        pieces = alternatives([BEGIN, END, *map(escape_ampersand, tokenizer.special_tokens)])
        ids: list[int] = []
        mask: list[int] = []
        text: list[str] = []
        speaking = 0
        for i, piece in enumerate(pieces.split(traced)):
            if piece in (BEGIN, END):
                speaking = int(piece == BEGIN)
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

    def close(self) -> None:
        """End the process of a bounded template."""
        if isinstance(self._template, BoundedTemplate):
            self._template.close()

    def _render(
        self,
        traced: bool,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
    ) -> str:
        _check(messages)
        values = {
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template.render(values, traced=traced)


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
