"""datatrove, text-dedup and rensa as child processes that deduplicate a Parquet file of documents.

Each call gets the path of a file with columns `id` and `text`, and answers with the seconds that
deduplication took and the ids that stay. All run in one process with 14 bands of 8 rows over word
5-grams. What is read before the clock starts is in the peer's favour.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq
from child import answer

BANDS, ROWS, NGRAM = 14, 8, 5


def read(path: str) -> list[tuple[str, str]]:
    """Id and text of all documents."""
    table = pq.read_table(path, columns=["id", "text"])
    return list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def datatrove(path: str) -> dict[str, Any]:
    """Its four steps, one after the other, on documents in memory."""
    from datatrove.data import Document

    documents = [Document(text=text, id=name) for name, text in read(path)]
    deduplicate(documents[:1])  # its words are cut by a model that is loaded before the clock
    started = time.perf_counter()
    kept = deduplicate(documents)
    return {"seconds": time.perf_counter() - started, "kept": kept}


def deduplicate(documents: list[Any]) -> list[str]:
    """Ids of datatrove's documents that its MinHash keeps."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as place:
        MinhashDedupSignature(f"{place}/signatures", config).run(iter(documents))
        for bucket in range(BANDS):
            step = MinhashDedupBuckets(f"{place}/signatures", f"{place}/buckets", config=config)
            for _ in step.run(None, bucket, BANDS) or ():
                pass
        step = MinhashDedupCluster(f"{place}/buckets", f"{place}/remove", config=config)
        step.run(None, 0, 1)
        return [d.id for d in MinhashDedupFilter(f"{place}/remove").run(iter(documents))]


def text_dedup(path: str) -> dict[str, Any]:
    """Its command, called in this process: it maps a stored data set and stores the result."""
    import datasets
    from text_dedup import minhash

    with tempfile.TemporaryDirectory() as place:
        names, texts = zip(*read(path), strict=True)
        source = datasets.Dataset.from_dict({"id": list(names), "text": list(texts)})
        source.save_to_disk(f"{place}/in")
        command = [
            "--path", f"{place}/in", "--local", "--output", f"{place}/out", "--column", "text",
            "--split", "train", "--ngram", str(NGRAM), "--num_perm", str(BANDS * ROWS),
            "--b", str(BANDS), "--r", str(ROWS), "--min_length", "1", "--num_proc", "1",
            "--cache_dir", f"{place}/cache",
        ]  # fmt: skip
        started = time.perf_counter()
        minhash.main(command, standalone_mode=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "kept": datasets.load_from_disk(f"{place}/out")["id"][:]}


def rensa(path: str) -> dict[str, Any]:
    """Signatures alone, in the usual way: Python cuts the n-grams, rensa hashes them."""
    from rensa import RMinHash

    documents = read(path)
    started = time.perf_counter()
    RMinHash.digest_matrix_from_token_sets(
        [list(ngrams(text)) for _, text in documents], BANDS * ROWS, 1
    )
    return {"seconds": time.perf_counter() - started, "kept": []}


def ngrams(text: str) -> Iterator[str]:
    """Word n-grams of the lower-cased text."""
    words = text.lower().split()
    for i in range(max(1, len(words) - NGRAM + 1)):
        yield " ".join(words[i : i + NGRAM])


def load(name: str) -> Mapping[str, Callable[..., Any]]:
    """The calls of one peer."""
    peers = {"datatrove": datatrove, "text-dedup": text_dedup, "rensa": rensa}
    version = importlib.metadata.version(name)
    return {"version": lambda: f"{name} {version}", "dedup": peers[name]}


if __name__ == "__main__":
    answer(load)
