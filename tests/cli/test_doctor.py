"""`qwen2 doctor`: what it finds is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qwen2.cli.main import app
from qwen2.model import kernels, native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for operation in kernels.TABLE.values():
        monkeypatch.setattr(operation, "microseconds", {})
        monkeypatch.setattr(operation, "order", {})
        operation.forget()


def test_the_table_of_kernels_is_shown_with_what_was_measured() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["kernels"]
    names = [(device, name) for device in ("cpu", "cuda") for name in kernels.TABLE]
    assert [(row["device"], row["operation"]) for row in rows] == names
    measured = [row for row in rows if row["microseconds"]]
    assert [row["operation"] for row in measured][: len(kernels.TABLE)] == list(kernels.TABLE)
    for row in measured:
        times = {n: t for n, t in row["microseconds"].items() if t and n not in row["not used"]}
        assert times[row["chosen"]] == min(times.values())
        assert list(row["microseconds"]) == row["kernels"]
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for row in measured:  # now from the cache, so with the same figures
        time = row["microseconds"][row["chosen"]]
        assert f"*{time:10,.0f}  {row['chosen']}\n" in text
        for name, reason in row["not used"].items():
            assert f"{name} ({reason})" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_what_cuda_would_use_is_shown_without_one() -> None:
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "kernels on cuda, which is not here" in text
    assert "weights: grouped_mm, then mm, a thread each" in text


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "not compiled: no C++ compiler was there")
    monkeypatch.setattr("qwen2.cli.doctor.OPTIONAL", {"serve": ("a_module_that_is_not",)})
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "not compiled: no C++ compiler" in text
    assert "missing: a_module_that_is_not; pip install 'qwen2[serve]'" in text
