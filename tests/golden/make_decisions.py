"""Write datatrove.json: why datatrove's filters drop each document of `documents.py`, or null.

Run where `datatrove` and `spacy` are installed: `python tests/golden/make_decisions.py`.
"""

import json
from importlib import metadata
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from documents import documents

FILTERS = {
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "c4": C4QualityFilter,
    "fineweb": FineWebQualityFilter,
}


def main() -> None:
    result = {"datatrove": metadata.version("datatrove"), "spacy": metadata.version("spacy")}
    for name, kind in FILTERS.items():
        which = kind(language="en")
        verdicts = [which.filter(Document(text=text, id="")) for text in documents()]
        result[name] = [v[1] if isinstance(v, tuple) else None for v in verdicts]
    text = json.dumps(result, indent=0)
    (Path(__file__).parent / "datatrove.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
