import pytest
from reading import SOURCE

from qwen2.corpus import Document


@pytest.mark.parametrize("kind", ["code", "reference"])
def test_the_text_of_this_machine(kind: str) -> None:
    values = {"name": "here", "format": "machine", "kind": kind, "limit": {"megabytes": 0.2}}
    source = SOURCE.validate_python(values)
    (split,) = source.splits()
    documents = [found for found in source.read(split) if isinstance(found, Document)]
    assert 0 < sum(document.size for document in documents) <= 200_000
    assert {document.kind for document in documents} == {kind}
    assert all(document.id.startswith("here/") for document in documents)
