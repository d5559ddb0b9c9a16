"""Where a run keeps what it made: a folder for each stage, named by the settings it depends on.

    recipe.yaml                           the recipe as it was last run, resolved
    stages/decisions-5a6b7c8d.json        a stage is finished: what it counted, how long it took
    documents-1f2e3d4c/00000-00003/       part 3 of split 0
    decisions-5a6b7c8d/00000-00003.arrow  what was decided of the documents of that part, row by row

The name ends in a hash of the stage's settings and of all stages that it reads. A recipe that is
changed and run again in the same folder finds what still holds and makes the rest beside it:
nothing is overwritten or lost, and a relaxed threshold begins at `decisions`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import durable_write
from qwen2.pipeline.corpus.recipe import CorpusRecipe
from qwen2.pipeline.stages import RECIPE

FORMAT = 1
"""Of the files; another number makes all of them anew."""
PART = "[0-9]" * 5 + "-" + "[0-9]" * 5
PARTS = "parts.json"
DOCUMENTS, QUARANTINE, FACTS = "documents.parquet", "quarantine.parquet", "part.json"

READS: dict[str, tuple[str, ...]] = {
    "documents": (),
    "scores": ("documents",),
    "decisions": ("documents", "scores"),
    "sketches": ("decisions",),
    "duplicates": ("sketches",),
    "paragraphs": ("duplicates",),
    "repeated": ("paragraphs",),
    "contamination": ("duplicates",),
    "kept": ("repeated", "contamination", "duplicates"),
    "tokens": ("kept",),
    "fates": ("kept",),
}
"""Stage -> the stages whose files it reads, itself later than all of them."""


class PartFacts(Config):
    """part.json: what a part holds, and where its split goes on."""

    source: str
    cursor: int
    """Things of the split, documents and quarantined ones, up to the end of this part."""
    last: bool
    """Whether the split ends with it."""
    documents: int
    quarantined: int
    bytes: int
    """Of UTF-8, before the editors."""


@dataclass(frozen=True)
class Layout:
    """The folders of a run of `recipe` in `folder`."""

    folder: Path
    recipe: CorpusRecipe

    @classmethod
    def open(cls, folder: Path) -> Layout:
        """The run that is there.

        Raises:
            UserError: there is none.
        """
        if not (folder / RECIPE).is_file():
            raise UserError(f"{folder}: no {RECIPE}; give the folder of `qwen2 corpus run`")
        return cls(folder, CorpusRecipe.load(folder / RECIPE))

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """The key of each stage that the recipe asks for."""
        keys: dict[str, str] = {}
        for stage, settings in stage_settings(self.recipe).items():
            if settings is not None:
                above = [keys[name] for name in READS[stage] if name in keys]
                text = json.dumps([FORMAT, stage, settings, above], sort_keys=True)
                keys[stage] = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return keys

    def has(self, stage: str) -> bool:
        """Whether the recipe asks for this stage."""
        return stage in self.keys

    def name(self, stage: str) -> str:
        """`stage` and its key: the name of its folder and of its result."""
        return f"{stage}-{self.keys[stage]}"

    def place(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.folder / self.name(stage)

    def file(self, stage: str, part: str) -> Path:
        """What a stage that works part by part makes of `part`."""
        return self.place(stage) / f"{part}.arrow"

    def part(self, part: str) -> Path:
        """The folder of a part's documents as they were read, edited and measured."""
        return self.place("documents") / part

    @property
    def parts(self) -> dict[str, int]:
        """All parts in the order of the sources, and the number of each."""
        return _parts(self.place("documents") / PARTS)

    def close_parts(self) -> None:
        """All splits are read: write down which parts there are."""
        names = sorted(path.name for path in self.place("documents").glob(PART))
        durable_write(self.place("documents") / PARTS, json.dumps(names, indent=0).encode())

    def parts_of(self, split: str) -> list[str]:
        """The parts that a split has so far."""
        return sorted(path.name for path in self.place("documents").glob(f"{split}-*"))

    def facts(self, part: str) -> PartFacts:
        """What a part holds."""
        return PartFacts.load(self.part(part) / FACTS)


@functools.lru_cache(maxsize=8)
def _parts(path: Path) -> dict[str, int]:
    if not path.exists():
        raise UserError(f"{path.parent.parent}: not all sources are read; run it again first")
    return {name: number for number, name in enumerate(json.loads(path.read_text()))}


def stage_settings(recipe: CorpusRecipe) -> dict[str, Any]:
    """Stage -> what its files depend on beside the stages that it reads; None: it is not wanted."""
    r = recipe.model_dump(mode="json")
    used = {source.filters for source in recipe.sources}
    rules = {name: r["filters"][name] for name in sorted(used)}
    editors = {
        name: {key: value for key, value in of.items() if key not in ("rules", "limits")}
        for name, of in rules.items()
    }
    quality, duplicates, language = r["quality"], r["duplicates"], r["language"]
    found = language and {k: v for k, v in language.items() if k not in ("keep", "mislabelled")}
    return {
        "documents": [r["sources"], found, editors, r["part_megabytes"]],
        "scores": quality and [quality["scorers"], quality["bulk"]],
        "decisions": [rules, r["shortest"], language, quality],
        "sketches": duplicates["minhash"],
        "duplicates": duplicates["older"],
        "paragraphs": duplicates["paragraphs"],
        "repeated": duplicates["paragraphs"],
        "contamination": r["decontamination"],
        "kept": [r["held_out"], r["seed"]],
        "tokens": r["tokens"],
        "fates": [],
    }
