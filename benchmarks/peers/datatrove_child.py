"""datatrove's filters over the documents of a JSON-lines file: decisions, and processor seconds.

Runs in an environment of its own: `pip install datatrove spacy fasttext-numpy2-wheel
fasteners pyarrow tokenizers 'xxhash<4'`.
Its language filter would fetch the large model; here it gets the small one that we use too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from child import answer
from dedup_child import deduplicate

NAMES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def load(documents: str, model: str, limit: str) -> Mapping[str, Callable[..., Any]]:
    """The filters, ready to be called on the first `limit` documents."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.utils.text import split_into_parts
    from fasttext.FastText import _FastText
    from tokenizers import Tokenizer

    with open(documents, encoding="utf-8") as file:  # noqa: PTH123 (the peer's Python)
        rows = [json.loads(line) for line in file][: int(limit) or None]
    makers = dict(
        zip(
            NAMES,
            (GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter),
            strict=True,
        )
    )
    language = LanguageFilter(label_only=True)
    language.model._model = _FastText(model)

    def reason(which: Any, document: Document) -> str | None:
        """Why the filter drops the document."""
        try:
            verdict = which.filter(document)
        except ZeroDivisionError:  # it has no words
            return "no words"
        if isinstance(verdict, tuple):
            return str(verdict[1])
        return None if verdict else "dropped"

    def run(which: str, by_language: bool = False) -> dict[str, Any]:
        """One filter on every document, whatever the others say.

        Its stop words are English, so other languages are not asked for them.
        """
        makers_of: dict[str, Any] = {}
        split_into_parts.cache_clear()
        decisions, seconds = [], 0.0
        for row in rows:
            code = row["language"] if by_language else "en"
            if code not in makers_of:
                asked = which != "gopher_quality" or code == "en"
                given = {} if asked else {"min_stop_words": None}
                makers_of[code] = makers[which](language=code, **given)
            one = makers_of[code]
            document = Document(text=row["text"], id="")
            started = time.process_time()
            decisions.append(reason(one, document))
            seconds += time.process_time() - started
        return {"seconds": seconds, "decisions": decisions}

    def pipeline(tokenizer: str = "") -> dict[str, Any]:
        """All filters in FineWeb's order; a document that one drops meets no further one.

        With the file of a tokenizer, what stays is deduplicated by MinHash and tokenised.
        """
        bpe = Tokenizer.from_file(tokenizer) if tokenizer else None
        chain = [makers[name](language="en") for name in NAMES]
        split_into_parts.cache_clear()
        decisions, started = [], time.process_time()
        for row in rows:
            document = Document(text=row["text"], id="")
            language.filter(document)
            found = (reason(which, document) for which in chain)
            decisions.append(next((r for r in found if r is not None), None))
        stay = [row for row, why in zip(rows, decisions, strict=True) if why is None]
        tokens = 0
        if bpe:
            kept = set(deduplicate([Document(text=row["text"], id=row["id"]) for row in stay]))
            for row in stay:
                tokens += len(bpe.encode(row["text"])) if row["id"] in kept else 0
            stay = [row for row in stay if row["id"] in kept]
        seconds = time.process_time() - started
        return {"seconds": seconds, "decisions": decisions, "kept": len(stay), "tokens": tokens}

    def labels() -> dict[str, Any]:
        """Languages and scores of the language filter."""
        found, started = [], time.process_time()
        for row in rows:
            document = Document(text=row["text"], id="")
            language.filter(document)
            found.append([document.metadata["language"], document.metadata["language_score"]])
        return {"seconds": time.process_time() - started, "labels": found}

    # The tokenizer is made at the first call.
    reason(makers["gopher_quality"](language="en"), Document(text="A word.", id=""))
    deduplicate([Document(text="A word and some more of them.", id="")])
    return {
        "version": lambda: metadata.version("datatrove"),
        "run": run,
        "pipeline": pipeline,
        "labels": labels,
    }


if __name__ == "__main__":
    answer(load)
