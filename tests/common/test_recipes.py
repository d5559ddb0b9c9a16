"""Recipes are found as files and by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = find_recipe("miniature")
    assert own == find_recipe("miniature.yaml")
    monkeypatch.chdir(tmp_path)
    Path("miniature.yaml").write_text("stage: pretrain\n")
    assert find_recipe("miniature.yaml") == Path("miniature.yaml")
    assert find_recipe("miniature") == own


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no such file; did you mean 'miniature'\? there are .*"):
        find_recipe("minature")
