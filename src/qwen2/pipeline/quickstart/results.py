"""What comes of a quickstart: figures on held-out text, an exported model, samples, a report."""

from __future__ import annotations

from typing import Any

from qwen2.common.progress import Progress
from qwen2.evaluate.compressors import compressor_bits_per_byte
from qwen2.evaluate.score import score_by_kind
from qwen2.inference import Engine, SamplingParams
from qwen2.model.hub import load, save
from qwen2.pipeline.quickstart.data import held_out
from qwen2.pipeline.quickstart.recipe import QuickRun
from qwen2.pipeline.report import write_report

MODELS = {"pretrain": "pre-trained", "long_context": "long context", "mixture": "mixture"}
"""Stages that leave a model, and what it is called."""


def evaluation(run: QuickRun) -> dict[str, Any]:
    """Bits per byte on held-out text by kind, beside general compressors on the same bytes."""
    texts = held_out(run, run.recipe.evaluated_kilobytes)
    bits: dict[str, dict[str, float]] = {kind: {} for kind in texts}
    with Progress("evaluate", len(MODELS)) as progress:
        for done, (stage, name) in enumerate(MODELS.items(), 1):
            model, coder = load(run.folder / run.results[stage]["model"])
            for kind, score in score_by_kind(model, coder, texts, run.recipe.context).items():
                bits[kind][name] = score.bits_per_byte
            progress.update(done)
    for kind, each in texts.items():
        bits[kind] |= compressor_bits_per_byte(each)
    return {
        "bits_per_byte": bits,
        "bytes": {kind: sum(len(text.encode()) for text in each) for kind, each in texts.items()},
    }


def export(run: QuickRun) -> dict[str, Any]:
    """The model with the long context in the Hugging Face layout, for transformers and vLLM."""
    model, coder = load(run.folder / run.results["long_context"]["model"])
    folder = run.folder / "model"
    save(model, coder, folder)
    return {"model": "model", "bytes": sum(p.stat().st_size for p in folder.iterdir())}


def talk(run: QuickRun) -> dict[str, Any]:
    """What the exported model writes after a few beginnings."""
    model, coder = load(run.folder / "model")
    params = SamplingParams(
        max_tokens=80, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=run.recipe.seed
    )
    completions = Engine(model, coder).generate(list(run.recipe.prompts.values()), params)
    return {
        "samples": [
            {"kind": kind, "prompt": prompt, "text": completion.text}
            for (kind, prompt), completion in zip(
                run.recipe.prompts.items(), completions, strict=True
            )
        ]
    }


def report(run: QuickRun) -> dict[str, Any]:
    """One page that shows it all."""
    write_report(run.folder, run.results, run.recipe.model_dump(mode="json"))
    return {"report": "report.html"}
