import pytest
from reading import SOURCE, read


@pytest.mark.parametrize("kind", ["code", "docstrings", "prose"])
def test_the_text_of_this_machine(kind: str) -> None:
    values = {"name": "here", "format": "machine", "kind": kind, "limit": {"megabytes": 0.2}}
    documents, _ = read(SOURCE.validate_python(values))
    assert 0 < sum(document.size for document in documents) <= 200_000
    assert {document.kind for document in documents} == {kind}
    assert all(document.id.startswith("here/") for document in documents)
