"""The quickstart's data: real text of this machine, a vocabulary for it, shards of tokens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qwen2.common.files import durable_folder, sha256_of
from qwen2.corpus import HELD_OUT, TRAIN, build_corpus, read_documents
from qwen2.pipeline.quickstart.recipe import QuickRun
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.train import train_bpe
from qwen2.tokens import tokenize_documents, write_shards
from qwen2.tokens.shard_index import ShardIndex

TRAIN_SHARDS, HELD_OUT_SHARDS = "shards/train", "shards/held-out"


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
    """The text as shards of token ids; the held-out part apart."""
    train = _write_shards(run, TRAIN, TRAIN_SHARDS)
    _write_shards(run, HELD_OUT, HELD_OUT_SHARDS)
    return {"tokens": sum(train.tokens_by_kind.values()), "tokens_by_kind": train.tokens_by_kind}


def held_out(run: QuickRun, kilobytes: int) -> dict[str, list[str]]:
    """Held-out texts by kind, about so much of each."""
    kinds = len(run.results["collect"]["kinds"])
    return _slices(run.folder / "corpus" / HELD_OUT, kinds * 1000 * kilobytes)


def _write_shards(run: QuickRun, part: str, target: str) -> ShardIndex:
    coder = Tokenizer.load(run.folder / "tokenizer")
    documents = read_documents(run.folder / "corpus" / part)
    return write_shards(
        run.folder / target,
        tokenize_documents(documents, coder.encode_arrays),
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer=sha256_of(run.folder / "tokenizer" / "tokenizer.json"),
    )


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
