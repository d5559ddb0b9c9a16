"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qwen2.inference import SamplingParams
    from qwen2.model.decoder import Qwen2
    from qwen2.tokenizer import Tokenizer

Model = Annotated[
    str, typer.Argument(help="A folder in the Hugging Face layout, a .gguf file, or a hub name.")
]
Dtype = Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Context = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens to be ready for; beyond the trained length --extend acts."),
]
Extend = Annotated[
    str, typer.Option(help="For a longer --context than trained: dca+yarn, dca, yarn or none.")
]
Quantize = Annotated[
    str | None, typer.Option(help="Weights in int8 or int4, rounded while the model is read.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all cores when not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=100.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0: from all.")]
TopP = Annotated[float, typer.Option(max=1.0, help="Draw from the likeliest that reach p.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Over 1 avoids what was said; 1: off.")]
Seed = Annotated[int | None, typer.Option(help="Draws the same again.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]

Speculate = Annotated[
    int,
    typer.Option(min=0, max=31, help="Tokens to guess at a time from the text so far; 0: none."),
]
Draft = Annotated[
    str | None, typer.Option(help="A smaller model of the same tokenizer that guesses instead.")
]


def sampling_params(**values: Any) -> SamplingParams:
    """The options of sampling, checked; a UserError names the one that cannot be."""
    from qwen2.inference import SamplingParams

    return SamplingParams.parse(values, "sampling")


def load_for(
    model: str,
    dtype: str,
    device: str,
    context: int | None,
    extend: str,
    quantize: str | None = None,
) -> tuple[Qwen2, Tokenizer]:
    """The model for inference, ready for `context` tokens; says on stderr what that turned on."""
    from qwen2.common.progress import say
    from qwen2.model.extend import describe_context
    from qwen2.model.hub import load, load_config

    loaded = load(
        model,
        dtype=dtype,
        device=device,
        context=context,
        extend=extend,
        quantize=quantize,
        inference=True,
    )
    if context is not None:
        say(describe_context(loaded[0].config, load_config(model).trained_length))
    return loaded


def draft_for(
    draft: str | None,
    tokenizer: Tokenizer,
    dtype: str,
    device: str,
    quantize: str | None = None,
) -> Qwen2 | None:
    """The model that guesses for one with this tokenizer, where one is named."""
    from qwen2.common.errors import UserError
    from qwen2.model.hub import load

    if draft is None:
        return None
    model, own = load(draft, dtype=dtype, device=device, quantize=quantize, inference=True)
    if own.ranks != tokenizer.ranks:
        raise UserError(f"{draft}: its tokenizer is another, so it cannot guess for this model")
    return model
