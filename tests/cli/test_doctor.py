"""`qwen2 doctor`: what it finds is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen2.cli.main import app
from qwen2.model import kernels, native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for operation in kernels.TABLE.values():
        monkeypatch.setattr(operation, "chosen", "")
        monkeypatch.setattr(operation, "microseconds", {})


def test_the_table_of_kernels_is_shown_with_what_was_measured() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    for row in found["kernels"]:
        assert row["microseconds"][row["chosen"]] == min(row["microseconds"].values())
    assert [row["operation"] for row in found["kernels"]] == list(kernels.TABLE)
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for row in found["kernels"]:  # now from the cache, so with the same figures
        time = row["microseconds"][row["chosen"]]
        assert f"*{time:10,.0f}  {row['chosen']}" in text


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "not compiled: no C++ compiler was there")
    monkeypatch.setattr("qwen2.cli.doctor.OPTIONAL", {"serve": ("a_module_that_is_not",)})
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "not compiled: no C++ compiler" in text
    assert "missing: a_module_that_is_not; pip install 'qwen2[serve]'" in text
