"""`qwen2 chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2.cli.options import (
    Context,
    Device,
    Dtype,
    Extend,
    MaxTokens,
    Model,
    Quantize,
    RepetitionPenalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    load_for,
    sampling_params,
)

if TYPE_CHECKING:
    from qwen2.inference import SamplingParams
    from qwen2.model.decoder import Qwen2
    from qwen2.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves"


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = 20,
    top_p: TopP = 0.8,
    repetition_penalty: RepetitionPenalty = 1.05,
    seed: Seed = None,
    context: Context = None,
    extend: Extend = "dca+yarn",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves."""
    from qwen2.common.progress import say
    from qwen2.common.runtime import set_threads

    params = sampling_params(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    set_threads(threads)
    loaded = load_for(model, dtype, device, context, extend, quantize)
    conversation = Conversation(*loaded, params, system)
    say(f"Ctrl-C stops an answer, Ctrl-D leaves; {HELP}.")
    while (line := _read()) is not None:
        command, _, rest = line.strip().partition(" ")
        if not line.strip():
            continue
        if command == "/exit":
            break
        if command == "/reset":
            conversation.reset(conversation.system)
        elif command == "/system":
            conversation.reset(rest or None)
        elif command.startswith("/"):
            say(HELP)
        else:
            conversation.answer(line)


def _read() -> str | None:
    """A line from the person; None at the end of the input. Ctrl-C only clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history)
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None


class Conversation:
    """Messages so far; the engine's prefix cache spares passing them through the model again."""

    def __init__(
        self, model: Qwen2, tokenizer: Tokenizer, params: SamplingParams, system: str | None
    ) -> None:
        from qwen2.inference import Engine
        from qwen2.tokenizer.chatml import ChatTemplate

        self.template = ChatTemplate.of(tokenizer)
        self.engine, self.params = Engine(model, tokenizer), params
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begin anew under this system message."""
        self.system = system
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def answer(self, text: str) -> None:
        """Print the answer as it comes; what was said before Ctrl-C stays in the conversation."""
        from qwen2.common.errors import UserError
        from qwen2.common.progress import say

        question = {"role": "user", "content": text}
        prompt, _ = self.template.encode(
            self.engine.tokenizer, [*self.messages, question], add_generation_prompt=True
        )
        said = ""
        try:
            for output in self.engine.stream(prompt, self.params):
                print(output.text, end="", flush=True)
                said += output.text
                if output.error:
                    raise UserError(output.error)
        except UserError as error:
            say(f"{error}; /reset begins a new conversation")
            return
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        self.messages += [question, {"role": "assistant", "content": said}]
