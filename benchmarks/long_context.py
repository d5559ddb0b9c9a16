"""Loss by position far beyond the trained length: plain RoPE, YARN, DCA, and DCA + YARN.

Every method reads the same documents, from their beginning, `--length` tokens each. `--trained`
simulates by configuration a model trained on fewer tokens than it was: its plain RoPE is then what
the others would be measured against if it were known. Documents are text files, whatever one has,
or without them long texts of the standard library; a run of `qwen2 quickstart` gives its own
held-out ones.

    python benchmarks/long_context.py MODEL [TEXT ...] [--length 32768] [--trained 8192]
        [--documents 4] [--name long_context] [--svg FILE] [--json] [--out FOLDER]
"""

from __future__ import annotations

import itertools
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch.
from harness import finish, options

STDLIB = ("pydoc_data/topics.py", "_pydecimal.py", "turtle.py", "typing.py", "doctest.py")


def texts(paths: list[Path]) -> list[str]:
    """One document a file; of a corpus file of the quickstart, each of its own."""
    from qwen2.corpus import read_documents

    if not paths:
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = [folder / name for name in STDLIB]
    found: list[str] = []
    for path in paths:
        if path.suffix in (".jsonl", ".parquet"):
            found += [document.text for document in read_documents(path)]
        else:
            found.append(path.read_text(encoding="utf-8"))
    return found


def documents_of(tokenizer: Any, paths: list[Path], length: int, count: int) -> list[list[int]]:
    """The first `count` documents of at least `length` tokens, from `<|endoftext|>` on."""
    long = (
        [tokenizer.end_of_text_id, *ids[:length]]
        for text in texts(paths)
        if len(text) >= length and len(ids := tokenizer.encode(text)) >= length
    )
    found = list(itertools.islice(long, count))
    if not found:
        raise SystemExit(f"no text has {length} tokens; give longer ones")
    return found


def measure(chosen: Any) -> dict[str, Any]:
    """Loss by position of each method, and its mean in each octave of the trained length."""
    import qwen2
    from qwen2.common.plot import standalone
    from qwen2.evaluate.positions import nats_by_method, octaves, position_chart
    from qwen2.model.extend import with_config

    model, tokenizer = qwen2.load(chosen.model)
    if chosen.trained:
        model = with_config(model, max_position_embeddings=chosen.trained)
    trained = model.config.trained_length
    documents = documents_of(tokenizer, chosen.texts, chosen.length, chosen.documents)
    by_method = nats_by_method(model.eval(), documents, chosen.length)
    if chosen.svg:
        chosen.svg.write_text(standalone(position_chart(by_method)))
    by_octave = {
        f"{start}-{stop}": {
            label: round(by.mean(start, stop), 4) for label, by in by_method.items()
        }
        for start, stop in octaves(trained, chosen.length)
    }
    return {
        "model": Path(chosen.model).name,
        "trained_length": trained,
        "length": chosen.length,
        "documents": len(documents),
        "nats_at_positions": by_octave,
        "by_position": {label: asdict(by) for label, by in by_method.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--trained", type=int, help="simulate a model trained on so many tokens")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--name", default="long_context", help="of the result")
    parser.add_argument("--svg", type=Path, help="where the chart goes")
    chosen = parser.parse_args()
    finish(chosen.name, measure(chosen), chosen)


if __name__ == "__main__":
    main()
