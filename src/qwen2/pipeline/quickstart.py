"""`qwen2 quickstart`: the report in miniature, on the real text of this machine.

collect -> tokenizer -> shards -> pre-train -> evaluate -> export -> talk -> report

Each stage is a function of the run and leaves files in the run's folder; `STAGES` is the list that
further stages join.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, sha256_of
from qwen2.common.progress import Progress
from qwen2.corpus import HELD_OUT, TRAIN, LocalConfig, build_corpus, read_documents
from qwen2.evaluate.compressors import compressor_bits_per_byte
from qwen2.evaluate.score import Score, score_text
from qwen2.inference import SamplingParams, generate
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hub import load, save
from qwen2.pipeline.report import (
    mean_bits,
    median_of,
    read_metrics,
    training_lines,
    write_report,
)
from qwen2.pipeline.stages import Run, Stage, Stopped
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.train import train_bpe
from qwen2.tokens import Shards, tokenize_documents, write_shards
from qwen2.tokens.loader import PackedLoader
from qwen2.train.loop import train_step
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.pretrain import PretrainRecipe, build_trainee, pretrain
from qwen2.train.schedules import Cosine


class QuickstartRecipe(Config):
    """How much of everything; `minutes` scales the training to fill the time."""

    minutes: float = Field(default=8.0, gt=0)
    corpus: LocalConfig
    vocab_size: int = Field(gt=258)
    tokenizer_megabytes: float = Field(gt=0)  # of training text that the merges are counted on
    model: ModelConfig
    context: int = Field(gt=1)
    rows: int = Field(gt=0)
    lr: float = Field(gt=0)
    dtype: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    evaluated_kilobytes: int = Field(gt=0)  # held-out text of each kind
    watched_kilobytes: int = Field(gt=0)  # of it, scored again and again during training
    reserve_seconds: float = Field(ge=0)  # kept free for the stages after training
    max_steps: int | None = Field(default=None, gt=0)
    prompts: dict[str, str]


QuickRun = Run[QuickstartRecipe]


def collect(run: QuickRun) -> dict[str, Any]:
    """Real text of this machine, deduplicated, split by document."""
    return build_corpus(run.folder / "corpus", run.recipe.corpus)


def tokenizer(run: QuickRun) -> dict[str, Any]:
    """A byte-level BPE vocabulary, trained on a slice of every kind of the training text."""
    texts = _slices(run.folder / "corpus" / TRAIN, int(run.recipe.tokenizer_megabytes * 1e6))
    kinds = len(texts)
    trained = train_bpe((text for each in texts.values() for text in each), run.recipe.vocab_size)
    with durable_folder(run.folder / "tokenizer") as folder:
        trained.save(folder)
    held = _slices(run.folder / "corpus" / HELD_OUT, kinds * 1000 * run.recipe.evaluated_kilobytes)
    return {
        "vocab_size": trained.vocab_size,
        "bytes_per_token": {
            kind: sum(len(t.encode()) for t in each) / sum(map(len, trained.encode_batch(each)))
            for kind, each in held.items()
        },
    }


def shards(run: QuickRun) -> dict[str, Any]:
    """The training text as shards of token ids."""
    coder = Tokenizer.load(run.folder / "tokenizer")
    documents = read_documents(run.folder / "corpus" / TRAIN)
    index = write_shards(
        run.folder / "shards",
        tokenize_documents(documents, coder.encode_batch),
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer=sha256_of(run.folder / "tokenizer" / "tokenizer.json"),
    )
    return {"tokens": sum(index.tokens_by_kind.values()), "tokens_by_kind": index.tokens_by_kind}


def pretraining(run: QuickRun) -> dict[str, Any]:
    """Pre-train from random weights for the time that is left.

    The number of steps is fixed at the first start, so that a resumed run has the same schedule.
    """
    begun = run.folder / "pretrain" / "recipe.yaml"
    recipe = PretrainRecipe.load(begun) if begun.exists() else _pretrain_recipe(run)
    coder = Tokenizer.load(recipe.tokenizer)
    watched = _held_out(run, run.recipe.watched_kilobytes)
    result = pretrain(recipe, lambda model: _score_kinds(model, coder, watched, recipe.context))
    if not result.finished:
        raise Stopped("pre-training is saved; run the same command again to go on")
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "skipped": result.skipped,
        "parameters": run.recipe.model.num_parameters(),
        "step_tokens": recipe.step_tokens,
        "metrics": "pretrain/metrics.jsonl",
        "model": "pretrain/model",
    }


def evaluation(run: QuickRun) -> dict[str, Any]:
    """Bits per byte on held-out text by kind, beside general compressors on the same bytes."""
    model, coder = load(run.folder / run.results["pretrain"]["model"])
    texts = _held_out(run, run.recipe.evaluated_kilobytes)
    with Progress("evaluate", len(texts)) as progress:
        scores = _score_kinds(model, coder, texts, run.recipe.context, progress.update)
    return {
        "bits_per_byte": {
            kind: {"model": scores[kind], **compressor_bits_per_byte(each)}
            for kind, each in texts.items()
        },
        "bytes": {kind: sum(len(text.encode()) for text in each) for kind, each in texts.items()},
    }


def export(run: QuickRun) -> dict[str, Any]:
    """The model in the Hugging Face layout, which transformers and vLLM load."""
    model, coder = load(run.folder / run.results["pretrain"]["model"])
    folder = run.folder / "model"
    save(model, coder, folder)
    return {"model": "model", "bytes": sum(p.stat().st_size for p in folder.iterdir())}


def talk(run: QuickRun) -> dict[str, Any]:
    """What the exported model writes after a few beginnings."""
    model, coder = load(run.folder / "model")
    params = SamplingParams(
        max_tokens=80, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=run.recipe.seed
    )
    prompts = [coder.encode(prompt) for prompt in run.recipe.prompts.values()]
    completions = generate(model, coder, prompts, params)
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


STAGES: list[Stage[QuickstartRecipe]] = [
    Stage("collect", "Collect real text from this machine", collect, makes="corpus"),
    Stage("tokenizer", "Train a tokenizer", tokenizer, makes="tokenizer"),
    Stage("shards", "Turn the text into shards of tokens", shards, makes="shards"),
    Stage("pretrain", "Pre-train a miniature from random weights", pretraining),
    Stage("evaluate", "Evaluate it on held-out text", evaluation),
    Stage("export", "Export it in the Hugging Face layout", export, makes="model"),
    Stage("talk", "Let it write", talk),
    Stage("report", "Write the report", report),
]


def terminal_summary(run: QuickRun) -> str:
    """One screenful: what came out, and what to type next."""
    results = run.results
    trained, evaluated = results["pretrain"], results["evaluate"]
    lines = training_lines(read_metrics(run.folder / trained["metrics"]))
    bits = {**evaluated["bits_per_byte"], "all": mean_bits(results)}
    names = list(bits["all"])
    sample = results["talk"]["samples"][0]
    shown = (sample["prompt"] + sample["text"]).splitlines()[:8]
    return "\n".join(
        [
            "",
            f"{trained['parameters'] / 1e6:.2f}M parameters, "
            f"{trained['tokens'] / 1e6:.2f}M tokens, "
            f"{median_of(lines, 'tokens_per_s'):,.0f} tokens/s, MFU {median_of(lines, 'mfu'):.0%}, "
            f"{run.seconds / 60:.1f} minutes in all",
            "",
            f"{'held-out bits per byte':24}" + "".join(f"{name:>10}" for name in names),
            *(
                f"{kind:24}" + "".join(f"{values[name]:10.3f}" for name in names)
                for kind, values in bits.items()
            ),
            "",
            *(f"  | {line}" for line in shown),
            "",
            f"report   {run.folder / 'report.html'}",
            f"model    {run.folder / 'model'}",
            f"try      qwen2 generate {run.folder / 'model'} -p 'def main(' --temperature 0.7",
        ]
    )


def _pretrain_recipe(run: QuickRun) -> PretrainRecipe:
    """The recipe whose steps fill the time that is left, by the speed of a few steps."""
    quick = run.recipe
    folder = run.folder.resolve()  # so that the recipe can be run from anywhere

    def recipe(steps: int) -> PretrainRecipe:
        return PretrainRecipe(
            model=quick.model,
            data=folder / "shards",
            tokenizer=folder / "tokenizer",
            out=folder / "pretrain",
            context=quick.context,
            rows=quick.rows,
            steps=steps,
            optimizer=AdamWConfig(lr=quick.lr),
            schedule=Cosine(warmup=max(1, min(100, steps // 10)), floor=0.05),
            dtype=quick.dtype,
            seed=quick.seed,
            checkpoint_every=max(1, steps // 5),
            keep=1,
            evaluate_every=max(1, steps // 8),
        )

    available = 60 * quick.minutes - run.seconds - quick.reserve_seconds
    if available <= 0:
        raise UserError(
            f"minutes {quick.minutes:g}: {run.seconds:.0f} s are gone before training and "
            f"{quick.reserve_seconds:.0f} s are kept for the stages after it; give more minutes"
        )
    seconds = _seconds_per_step(recipe(1))
    steps = max(1, int(0.9 * available / seconds))  # the machine may slow down meanwhile
    return recipe(min(steps, quick.max_steps or steps))


def _seconds_per_step(recipe: PretrainRecipe, timed: int = 5) -> float:
    """Median time of some steps after a first one, on weights that are thrown away."""
    loader = PackedLoader(Shards(recipe.data), recipe.context, recipe.rows, recipe.seed)
    trainee = build_trainee(recipe, torch.device("cpu"))
    times = []
    for _ in range(1 + timed):
        started = time.perf_counter()
        train_step(trainee, [next(loader)], 0.0, 1.0)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _slices(path: Path, total: int) -> dict[str, list[str]]:
    """Texts by kind in the file's order: for every kind an equal share of `total` bytes.

    A document gives a sixteenth of its kind's share at most, so that a share is not one book.
    """
    sizes: dict[str, int] = defaultdict(int)
    for document in read_documents(path):
        sizes[document.kind] += document.size
    share = total // max(len(sizes), 1)
    texts: dict[str, list[str]] = {kind: [] for kind in sizes}
    taken: dict[str, int] = defaultdict(int)
    for document in read_documents(path):
        room = min(share - taken[document.kind], share // 16)
        if room > 0:
            data = document.text.encode()[:room]
            texts[document.kind].append(data.decode(errors="ignore"))
            taken[document.kind] += len(data)
    return texts


def _held_out(run: QuickRun, kilobytes: int) -> dict[str, list[str]]:
    kinds = len(run.results["collect"]["kinds"])
    return _slices(run.folder / "corpus" / HELD_OUT, kinds * 1000 * kilobytes)


def _score_kinds(
    model: Qwen2,
    coder: Tokenizer,
    texts: dict[str, list[str]],
    context: int,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Bits per byte by kind; `done` hears how many kinds are scored."""
    scores = {}
    for number, (kind, each) in enumerate(texts.items(), 1):
        total = sum((score_text(model, coder, text, context) for text in each), Score())
        scores[kind] = total.bits_per_byte
        done(number)
    return scores
