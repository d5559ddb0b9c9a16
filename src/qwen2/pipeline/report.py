"""The quickstart's report: one HTML page without scripts or outside resources.

It links to the corpus run's page in the folder beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.common.plot import bar_chart, line_chart
from qwen2.evaluate.positions import PositionNats, octaves, position_chart
from qwen2.pipeline.corpus.flow import flow, megabytes, table
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.corpus.page import PAGE

Results = Mapping[str, Mapping[str, Any]]

CORPUS_PAGE = f"corpus/{PAGE}"  # beside this page


def write_report(folder: Path, results: Results, recipe: Mapping[str, Any]) -> None:
    """Write report.html into `folder` from the results of the stages."""
    metrics = read_metrics(folder / results["pretrain"]["metrics"])
    body = [
        *_summary(results, recipe, metrics),
        *_bits(results["evaluate"]),
        *_curves(metrics),
        *_long_context(results["long_context"]),
        *_mixture(results["mixture"]),
        *_samples(results["talk"]["samples"]),
        *_corpus(results),
        *_stages(results),
        *_next(results),
    ]
    durable_write(folder / "report.html", html_page("qwen2 quickstart", body).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a training run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of applied steps."""
    return [line for line in metrics if "loss" in line]


def median_of(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    """The middle value of a figure."""
    values = sorted(float(line[key]) for line in lines)
    return values[len(values) // 2]


def mean_bits(results: Results) -> dict[str, float]:
    """Bits per byte of all kinds together: each kind counts by its bytes."""
    bits, sizes = results["evaluate"]["bits_per_byte"], results["evaluate"]["bytes"]
    names = next(iter(bits.values()))
    total = sum(sizes.values())
    return {name: sum(bits[k][name] * sizes[k] for k in bits) / total for name in names}


def _summary(
    results: Results, recipe: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> list[str]:
    trained, mean, lines = results["pretrain"], mean_bits(results), training_lines(metrics)
    seconds = sum(float(result["seconds"]) for result in results.values())
    tiles = {
        "parameters": f"{trained['parameters'] / 1e6:.2f}M",
        "tokens trained on": f"{trained['tokens'] / 1e6:.2f}M",
        "bits per byte, held-out": f"{mean['long context']:.3f}",
        "the same by xz -9": f"{mean['xz -9']:.3f}",
        "tokens of context": f"{results['long_context']['length']:,}",
        "mixture of experts": f"{results['mixture']['parameters'] / 1e6:.1f}M",
        "tokens a second": f"{median_of(lines, 'tokens_per_s'):,.0f}",
        "of the matmul peak (MFU)": f"{median_of(lines, 'mfu'):.0%}",
        "minutes in all": f"{seconds / 60:.1f}",
    }
    shape = recipe["model"]
    return [
        "<h1>From raw text to a model that writes</h1>",
        '<p class="sub">The Qwen2 recipe in miniature: text of this machine, its own tokenizer, '
        f"a decoder of {shape['num_hidden_layers']} layers and width {shape['hidden_size']}, "
        "trained from random weights.</p>",
        '<div class="tiles">',
        *(f'<div class="tile"><b>{v}</b><span>{k}</span></div>' for k, v in tiles.items()),
        "</div>",
    ]


def _bits(evaluated: Mapping[str, Any]) -> list[str]:
    bits: Mapping[str, Mapping[str, float]] = evaluated["bits_per_byte"]
    names = list(next(iter(bits.values())))
    rows = []
    for kind, values in bits.items():
        best = min(values.values())
        cells = "".join(
            f"<td{' class=best' if values[name] == best else ''}>{values[name]:.3f}</td>"
            for name in names
        )
        rows.append(f"<tr><td>{escape(kind)}</td>{cells}<td>{evaluated['bytes'][kind]:,}</td></tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return [
        "<h2>Bits per byte on held-out text</h2>",
        "<p>How many bits it takes to write down a byte of text that was kept out of training: "
        "a model scores each document alone, the compressors have all of a kind at once. The model "
        "with the long context and the mixture both go on from the pre-trained one.</p>",
        bar_chart(bits, "bits per byte"),
        f"<table><tr><th>kind</th>{head}<th>bytes</th></tr>{''.join(rows)}</table>",
    ]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = training_lines(metrics)
    width = max(1, len(lines) // 300)
    smooth = [
        (chunk[-1]["step"], sum(line["loss"] for line in chunk) / len(chunk))
        for chunk in (lines[i : i + width] for i in range(0, len(lines), width))
    ]
    held: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for kind, value in line.get("evaluation", {}).items():
            held.setdefault(kind, []).append((line["step"], value))
    return [
        "<h2>Training</h2>",
        line_chart({"training loss": smooth}, "step", "nats per token"),
        line_chart(held, "step", "held-out bits per byte"),
    ]


def _long_context(result: Mapping[str, Any]) -> list[str]:
    trained, length = result["trained_length"], result["length"]
    by_moment = {moment: PositionNats(**by) for moment, by in result["positions"].items()}
    by_method = {name: PositionNats(**by) for name, by in result["methods"].items()}
    rows = []
    for name, by in {**by_method, "after the long-context stage": by_moment["after"]}.items():
        cells = "".join(f"<td>{by.mean(*bounds):.3f}</td>" for bounds in octaves(trained, length))
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    reach = [f"{start:,} to {stop:,}" for start, stop in octaves(trained, length)]
    head = "".join(f"<th>{bounds}</th>" for bounds in reach)
    return [
        "<h2>Longer contexts</h2>",
        f"<p>Pre-training sees {trained:,} tokens at a time. Loss on held-out documents by the "
        f"position of the token, up to {length:,}: a model that uses its context gets better with "
        "it, one that has not learnt such positions fails where its training ended. First the "
        "long-context stage, which raises the base of the rotations and trains on long rows:</p>",
        position_chart(by_moment),
        "<p>The pre-trained model again, without any further training, through each way of "
        "extending a context:</p>",
        position_chart(by_method),
        f"<table><tr><th>nats per token at positions</th>{head}</tr>{''.join(rows)}</table>",
    ]


def _mixture(result: Mapping[str, Any]) -> list[str]:
    share: Sequence[float] = result["expert_share"]
    bits: Mapping[str, Mapping[str, float]] = result["bits_per_byte"]
    head = "".join(f"<th>{escape(name)}</th>" for name in bits)
    kinds = next(iter(bits.values()))
    rows = "".join(
        f"<tr><td>{escape(kind)}</td>"
        + "".join(f"<td>{values[kind]:.3f}</td>" for values in bits.values())
        + "</tr>"
        for kind in kinds
    )
    return [
        "<h2>A mixture of experts</h2>",
        f"<p>The pre-trained model's MLPs upcycled to {len(share)} experts each, shuffled, cut and "
        f"half of each at random again: {result['parameters'] / 1e6:.1f}M parameters, "
        f"{result['active_parameters'] / 1e6:.1f}M active for a token, then "
        f"{result['tokens'] / 1e6:.2f}M tokens of further training. Bits per byte on a little "
        "held-out text:</p>",
        f"<table><tr><th>kind</th>{head}</tr>{rows}</table>",
        "<p>Where the tokens of the last step went, over all layers "
        f"(evenness {result['expert_entropy']:.3f} of 1, {result['dropped']} dropped):</p>",
        bar_chart(
            {str(expert): {"share of tokens": value} for expert, value in enumerate(share)},
            "share of tokens",
        ),
    ]


def _samples(samples: Sequence[Mapping[str, str]]) -> list[str]:
    return [
        "<h2>What it writes</h2>",
        "<p>The beginning is given, in bold; the rest is drawn from the model.</p>",
        *(
            f"<pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>"
            for sample in samples
        ),
    ]


def _corpus(results: Results) -> list[str]:
    collected, ratio = results["collect"], results["tokenizer"]["bytes_per_token"]
    tokens = results["shards"]["tokens_by_kind"]
    rows = []
    for kind, of in collected["kinds"].items():
        if kind in ratio:
            (count, size), (_, held) = (of.get(side, (0, 0)) for side in SIDES)
            cells = (f"{count:,}", megabytes(size), megabytes(held))
            rows.append([kind, *cells, megabytes(tokens.get(kind, 0)), f"{ratio[kind]:.2f}"])
    head = ["kind", "documents", "MB train", "MB held-out", "M tokens", "bytes per token"]
    return [
        "<h2>The text</h2>",
        "<p>What was found on this machine, and what became of it before any training: "
        f'<a href="{CORPUS_PAGE}">every decision, its reason and examples</a>.</p>',
        *flow("source", collected["sources"]),
        *_reasons(collected["reasons"]),
        "<p>What was kept, and the vocabulary that was trained on it:</p>",
        table(head, rows),
    ]


def _reasons(reasons: Mapping[str, Mapping[str, Sequence[int]]]) -> list[str]:
    """The rules that the most documents fail."""
    sums: Counter[str] = Counter()
    for of in reasons.values():
        sums.update({rule: count for rule, (count, _) in of.items()})
    if not sums:
        return []
    most = ", ".join(f"<code>{escape(r)}</code> {n:,}" for r, n in sums.most_common(5))
    return [f"<p class=quiet>Rules that the most documents fail: {most}.</p>"]


def _stages(results: Results) -> list[str]:
    places = {
        "collect": f"corpus/ (see {CORPUS_PAGE})",
        "tokenizer": "tokenizer/",
        "shards": "shards/",
        "pretrain": "pretrain/ (recipe, metrics, checkpoint)",
        "long_context": "long_context/ (the same, and loss by position)",
        "mixture": "mixture/start/, mixture/train/",
        "evaluate": "stages/evaluate.json",
        "export": "model/",
        "talk": "stages/talk.json",
    }
    rows = [
        f"<tr><td>{escape(name)}</td><td>{result['seconds']:.1f}</td>"
        f"<td>{escape(places.get(name, f'stages/{name}.json'))}</td></tr>"
        for name, result in results.items()
    ]
    return [
        "<h2>What was done, and where it lies</h2>",
        f"<table><tr><th>stage</th><th>seconds</th><th>files</th></tr>{''.join(rows)}</table>",
    ]


def _next(results: Results) -> list[str]:
    model = escape(str(results["export"]["model"]))
    return [
        "<h2>Go on from here</h2>",
        "<p>In the folder of this page:</p>",
        f"<pre>qwen2 generate {model} -p 'def main(' -n 60 --temperature 0.7\n"
        f"qwen2 score {model} SOME_FILE.py\n"
        "qwen2 train pretrain/recipe.yaml steps=5000 out=longer</pre>",
    ]
