"""`qwen2 corpus`: wrong input is one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["relaxed_treshold"], "did you mean 'relaxed_threshold'?"),
        (["mixture", "proxies=4"], "proxies: Input should be greater than or equal to 8"),
        (["mixture", "experiment=mix"], "unknown experiment 'mix'; did you mean 'mixture'?"),
        (["miniature"], "key 'experiment' is missing; it is mixture or"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["qwen2", "corpus", "mixture", *arguments, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
