"""The recipes of corpora that are shipped, and what they promise."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from qwen2.common.recipes import find_recipe
from qwen2.corpus.debian import Manifest
from qwen2.corpus.filters import TEXT_RULES
from qwen2.corpus.filters.c4 import UNWANTED, C4Lines
from qwen2.corpus.filters.pii import PII
from qwen2.corpus.language import REPORT_LANGUAGES, LanguageConfig
from qwen2.corpus.minhash import MinHash
from qwen2.pipeline.corpus.layout import stage_settings
from qwen2.pipeline.corpus.recipe import CorpusRecipe

FOLDER = Path(str(files("qwen2"))) / "recipes" / "corpus"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str) -> CorpusRecipe:
    return CorpusRecipe.load(find_recipe(f"corpus/{name}"))


def written(name: str) -> dict[str, object]:
    values: dict[str, object] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return values


def test_there_are_those_that_the_guide_names() -> None:
    assert {"laptop", "debian", "web", "long"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name: str) -> None:
    loaded = recipe(name)
    named = set(written(name)["filters"])  # type: ignore[call-overload]
    # `none` is the default of sources and filters alike: a shipped source says what it wants.
    assert {source.filters for source in loaded.sources} == named
    assert CorpusRecipe.parse(loaded.model_dump(mode="json")) == loaded
    assert set(stage_settings(loaded)) >= {"documents", "decisions", "tokens"}


def test_the_web_has_every_published_limit_written_out() -> None:
    web = recipe("web")
    values = written("web")["filters"]["web"]  # type: ignore[index]
    assert values["rules"].keys() == {"rules", "languages"}  # not by default
    assert web.filters["web"].rules == TEXT_RULES
    assert not web.filters["web"].limits
    assert web.filters["web"].lines == C4Lines(terminal_punctuation=False, unwanted=UNWANTED)
    assert web.filters["web"].pii == PII()
    assert web.duplicates.minhash == MinHash()
    assert web.language is not None
    assert web.language.keep == REPORT_LANGUAGES
    assert web.language.threshold == LanguageConfig().threshold


def test_debian_reads_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(find_recipe("debian_packages"))
    wanted = {}
    for packages in manifest.sets:
        for pattern in packages.paths:
            path = re.sub(r"\[a-z\]\*|\*\*|\*", "x", pattern).replace("{language}", "de")
            for package in packages.packages:
                facts = (packages.format, packages.kind, packages.licence)
                language = "de" if "{language}" in pattern else packages.language
                wanted[f"debian/{package}/{path}"] = (*facts, language)
    for file in wanted:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    monkeypatch.chdir(tmp_path)
    read: dict[str, object] = {}
    for source in recipe("debian").sources:
        for split in source.splits():
            for place in split.files:
                path = Path(place.url).relative_to(tmp_path).as_posix()
                assert path not in read
                language = place.language or source.language
                read[path] = (source.format, source.kind, source.licence, language)
    assert read == wanted


def test_a_long_document_is_not_too_long() -> None:
    rules = {rule.name: rule for rule in recipe("long").filters["long"].in_force.rules}
    assert rules["gopher_words"].least == 6000
    assert rules["gopher_words"].greatest is None
