"""Sources as a recipe names them."""

import pytest

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.corpus.readers import Source


class Recipe(Config):
    sources: tuple[Source, ...]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "html", "favor": "recall"},
            r"'sources\.0\.html\.favor'; did you mean 'favour'",
        ),
        ({"format": "jsonl", "fields": {"txt": "a"}}, r"fields\.txt'; did you mean 'text'"),
        ({"format": "code", "favour": "recall"}, "known keys: .*programming_languages"),
        ({"format": "jsno"}, "'jsonl', 'parquet', 'text', 'html', 'xml', 'man', 'warc', 'code', "),
    ],
)
def test_the_nearest_key_is_that_of_the_format(changes: dict[str, object], message: str) -> None:
    values = {"name": "a", "kind": "web", "paths": ["x"], **changes}
    with pytest.raises(UserError, match=message):
        Recipe.parse({"sources": [values]})


def test_a_source_is_the_same_after_it_was_written_down() -> None:
    values = {
        "name": "a",
        "kind": "web",
        "format": "jsonl",
        "paths": ["x"],
        "limit": {"documents": 2},
    }
    recipe = Recipe.parse({"sources": [values]})
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
