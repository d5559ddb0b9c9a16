"""`qwen2 generate`: complete a prompt."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from qwen2.cli.options import (
    Context,
    Device,
    Draft,
    Dtype,
    Extend,
    Json,
    MaxTokens,
    Model,
    Quantize,
    RepetitionPenalty,
    Seed,
    Speculate,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    draft_for,
    load_for,
    sampling_params,
)


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="The text to complete; - reads standard input.")
    ],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap it in the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    parse_special: Annotated[
        bool, typer.Option(help="Read control tokens that are written in the prompt.")
    ] = False,
    context: Context = None,
    extend: Extend = "dca+yarn",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = 0,
    draft: Draft = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Complete raw text, or answer it as a chat message (--chat)."""
    from qwen2.common.errors import UserError
    from qwen2.common.runtime import set_threads
    from qwen2.inference import Engine, EngineConfig
    from qwen2.tokenizer.chatml import ChatTemplate

    if system is not None and not chat:
        raise UserError("--system has no place in raw text; add --chat")
    params = sampling_params(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    set_threads(threads)
    language_model, tokenizer = load_for(model, dtype, device, context, extend, quantize)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        ids, _ = ChatTemplate.of(tokenizer).encode(tokenizer, messages, add_generation_prompt=True)
    else:
        # A document begins after the end of another, so an empty prompt is that end.
        ids = tokenizer.encode(text, parse_special=parse_special) or [tokenizer.end_of_text_id]
    engine = Engine(
        language_model, tokenizer, EngineConfig(speculate=speculate),
        draft=draft_for(draft, tokenizer, dtype, device, quantize),
    )  # fmt: skip
    if not as_json:
        for output in engine.stream(ids, params):
            print(output.text, end="", flush=True)
            if output.error:
                raise UserError(output.error)
        print()
        return
    (completion,) = engine.generate([ids], params)
    if completion.error:
        raise UserError(completion.error)
    print(
        json.dumps(
            {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "prompt_token_ids": completion.prompt_token_ids,
                "finish_reason": completion.finish_reason,
                "usage": completion.usage,
            }
        )
    )
