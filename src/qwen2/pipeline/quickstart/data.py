"""The quickstart's data: a corpus of this machine's text, a vocabulary for it, shards of tokens."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from qwen2.common.cores import available_cores
from qwen2.common.files import durable_folder, sha256_of
from qwen2.corpus import Document
from qwen2.pipeline.corpus import Layout, kept_documents, run_corpus
from qwen2.pipeline.corpus.flow import by_kind, by_source
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.corpus.page import SUMMARY
from qwen2.pipeline.quickstart.recipe import QuickRun
from qwen2.pipeline.workers import open_workers
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.train import train_bpe
from qwen2.tokens import tokenize_documents, write_shards
from qwen2.tokens.shard_index import ShardIndex

CORPUS = "corpus"
TRAIN, HELD_OUT = SIDES
TRAIN_SHARDS, HELD_OUT_SHARDS = "shards/train", "shards/held-out"


def collect(run: QuickRun) -> dict[str, Any]:
    """Real text of this machine as a corpus run makes it; what became of it, counted.

    Resumes by itself: a corpus run keeps every part that was finished.
    """
    folder = run.folder / CORPUS
    with open_workers(available_cores()) as workers:
        run_corpus(run.recipe.corpus, folder, workers)
    counts = json.loads((folder / SUMMARY).read_text())
    return {
        "kinds": by_kind(counts["fates"]),
        "sources": by_source(counts["fates"]),
        "reasons": counts["reasons"],
    }


def documents(run: QuickRun, side: str) -> Iterator[Document]:
    """The documents of the corpus that were kept, to train on or held out."""
    return kept_documents(Layout(run.folder / CORPUS, run.recipe.corpus), side)


def tokenizer(run: QuickRun) -> dict[str, Any]:
    """A byte-level BPE vocabulary, trained on a slice of every kind of the training text."""
    texts = _slices(run, TRAIN, int(run.recipe.tokenizer_megabytes * 1e6))
    trained = train_bpe((text for each in texts.values() for text in each), run.recipe.vocab_size)
    with durable_folder(run.folder / "tokenizer") as folder:
        trained.save(folder)
    return {
        "vocab_size": trained.vocab_size,
        "bytes_per_token": {
            kind: sum(len(t.encode()) for t in each) / sum(map(len, trained.encode_batch(each)))
            for kind, each in held_out(run, run.recipe.evaluated_kilobytes).items()
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
    return _slices(run, HELD_OUT, kinds * 1000 * kilobytes)


def _write_shards(run: QuickRun, side: str, target: str) -> ShardIndex:
    coder = Tokenizer.load(run.folder / "tokenizer")
    return write_shards(
        run.folder / target,
        tokenize_documents(documents(run, side), coder.encode_arrays),
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer=sha256_of(run.folder / "tokenizer" / "tokenizer.json"),
    )


def _slices(run: QuickRun, side: str, total: int) -> dict[str, list[str]]:
    """Texts by kind in their order: for every kind an equal share of `total` bytes.

    A document gives a sixteenth of its kind's share at most, so that a share is not one book.
    """
    kinds = list(dict.fromkeys(document.kind for document in documents(run, side)))
    share = total // max(len(kinds), 1)
    texts: dict[str, list[str]] = {kind: [] for kind in kinds}
    taken: dict[str, int] = defaultdict(int)
    for document in documents(run, side):
        room = min(share - taken[document.kind], share // 16)
        if room > 0:
            data = document.text.encode()[:room]
            texts[document.kind].append(data.decode(errors="ignore"))
            taken[document.kind] += len(data)
    return texts
