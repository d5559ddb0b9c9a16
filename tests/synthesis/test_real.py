"""The real checkpoint asks and answers about documents; how fast is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2.corpus.documents import Document, read_documents, write_documents
from qwen2.synthesis import SynthesisRecipe, synthesize

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEXTS = {
    "bridge": (
        "The Forth bridge is a railway bridge in the east of Scotland. It was opened on 4 March "
        "1890 by the Prince of Wales. Some 6.5 million rivets and 53,000 tonnes of steel were "
        "used, and 4,600 workers built it. It was designed by John Fowler and Benjamin Baker."
    ),
    "yeast": (
        "Yeast is a single-celled fungus. Bakers use it because it turns the sugars of the flour "
        "into carbon dioxide and alcohol. The gas is caught in the gluten of the dough, and so the "
        "bread rises. In the oven the alcohol evaporates and the heat kills the yeast."
    ),
    "tcp": (
        "TCP opens a connection with three segments. The client sends a segment with the flag SYN "
        "and a random sequence number. The server answers with SYN and ACK and a number of its "
        "own. The client acknowledges that, and both sides may send data. A SYN flood exhausts the "
        "server's memory."
    ),
}
ABOUT = {
    "bridge": {"1890", "rivets", "steel", "scotland", "fowler", "prince", "railway"},
    "yeast": {"sugars", "dioxide", "dough", "bread", "gluten", "bakers"},
    "tcp": {"syn", "ack", "client", "server", "sequence"},
}  # fmt: skip


def test_every_document_is_asked_about_and_none_is_mixed_up(
    real_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [Document(text, name, f"{name}.txt", "prose") for name, text in TEXTS.items()]
    write_documents(tmp_path / "documents.parquet", documents)
    recipe = SynthesisRecipe.parse(
        {
            "sources": [{"path": str(tmp_path / "documents.parquet")}],
            "excerpt": {"least": 32},
            "model": str(real_checkpoint),
            "in_process": {"dtype": "fp32"},  # else other processors say other things
            "tasks": {"qa": {"share": 1.0, "choices": {"asked": ["facts"]}}},
            "sampling": {"max_tokens": 256, "temperature": 0.0},
        }
    )
    outcome = synthesize(recipe, tmp_path / "out")
    with capsys.disabled():
        print(outcome.speed)  # noqa: T201
    # How good its questions are is the model's affair, and differs with a processor's arithmetic.
    kept = list(read_documents(tmp_path / "out/documents/documents.parquet"))
    rejected = list(read_documents(tmp_path / "out/rejected/rejected.parquet"))
    told = [document.metadata["synthesis"] for document in (*kept, *rejected)]
    assert sorted(each["parent"] for each in told) == sorted(TEXTS)
    assert all(document.metadata["synthesis"]["reason"] for document in rejected)
    for document in kept:
        parent = document.metadata["synthesis"]["parent"]
        others = set().union(*(ABOUT[name] for name in ABOUT if name != parent))
        words = {word.strip(".,?:;()'\"").lower() for word in document.text.split()}
        assert not words & others, document.text
