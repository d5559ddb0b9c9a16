"""The quickstart as a list of stages, and what it says at its end."""

from __future__ import annotations

from qwen2.pipeline.corpus.fates import FATES
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.quickstart.data import collect, shards, tokenizer
from qwen2.pipeline.quickstart.recipe import QuickRun, QuickstartRecipe
from qwen2.pipeline.quickstart.results import evaluation, export, report, talk
from qwen2.pipeline.quickstart.training import long_context, mixture, pretraining
from qwen2.pipeline.report import (
    CORPUS_PAGE,
    mean_bits,
    median_of,
    read_metrics,
    training_lines,
)
from qwen2.pipeline.stages import Stage

STAGES: list[Stage[QuickstartRecipe]] = [
    Stage("collect", "Make a corpus of this machine's text", collect),
    Stage("tokenizer", "Train a tokenizer", tokenizer, makes="tokenizer"),
    Stage("shards", "Turn the text into shards of tokens", shards, makes="shards"),
    Stage("pretrain", "Pre-train a miniature from random weights", pretraining),
    Stage("long_context", "Make its context eight times longer", long_context),
    Stage("mixture", "Upcycle it to a mixture of experts, and train that", mixture),
    Stage("evaluate", "Evaluate all three on held-out text", evaluation),
    Stage("export", "Export the model in the Hugging Face layout", export, makes="model"),
    Stage("talk", "Let it write", talk),
    Stage("report", "Write the report", report),
]


def terminal_summary(run: QuickRun) -> str:
    """One screenful: what came out, and what to type next."""
    results = run.results
    trained, evaluated = results["pretrain"], results["evaluate"]
    far, mixed = results["long_context"], results["mixture"]
    lines = training_lines(read_metrics(run.folder / trained["metrics"]))
    bits = {**evaluated["bits_per_byte"], "all": mean_bits(results)}
    names = list(bits["all"])
    fates = results["collect"]["kinds"].values()
    found, kept = (
        sum(of[fate][1] for of in fates for fate in of if fate in wanted) / 1e6
        for wanted in (FATES, SIDES)
    )
    sample = results["talk"]["samples"][0]
    shown = (sample["prompt"] + sample["text"]).splitlines()[:5]
    return "\n".join(
        [
            "",
            f"{trained['parameters'] / 1e6:.2f}M parameters, "
            f"{trained['tokens'] / 1e6:.2f}M tokens, "
            f"{median_of(lines, 'tokens_per_s'):,.0f} tokens/s, MFU {median_of(lines, 'mfu'):.0%}, "
            f"{run.seconds / 60:.1f} minutes in all",
            f"{found:.1f} MB of text found, {kept:.1f} MB kept",
            "",
            f"{'held-out bits per byte':24}" + "".join(f"{name:>14}" for name in names),
            *(
                f"{kind:24}" + "".join(f"{values[name]:14.3f}" for name in names)
                for kind, values in bits.items()
            ),
            "",
            f"context  {far['trained_length']:,} to {far['length']:,} tokens: "
            f"loss at the far end {far['positions']['before']['nats'][-1]:.2f} before, "
            f"{far['positions']['after']['nats'][-1]:.2f} after",
            f"mixture  {mixed['parameters'] / 1e6:.1f}M parameters, "
            f"{mixed['active_parameters'] / 1e6:.1f}M active, "
            f"evenness of the experts' use {mixed['expert_entropy']:.2f}",
            "",
            *(f"  | {line}" for line in shown),
            "",
            f"report   {run.folder / 'report.html'}",
            f"corpus   {run.folder / CORPUS_PAGE}",
            f"model    {run.folder / 'model'}",
            f"try      qwen2 generate {run.folder / 'model'} -p 'def main(' --temperature 0.7",
        ]
    )
