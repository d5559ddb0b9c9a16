"""The serving guide: every command and program in it runs, every route and limit is true."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2.serve import protocol
from qwen2.serve.settings import Limits

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [
    command
    for block in blocks("console")
    for command in re.findall(r"^\$ (.*)", block.replace("\\\n", ""), flags=re.MULTILINE)
]


@pytest.fixture(scope="module")
def guide(serve: Any) -> Iterator[Any]:
    with serve(names=("Qwen2-0.5B-Instruct",)) as served:
        yield served


def run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_commands_run(guide: Any, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    printed = run(["bash", "-c", command.replace(ADDRESS, guide.url)])
    assert '"error":{' not in printed


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(guide: Any, program: str) -> None:
    pytest.importorskip("openai")
    run([sys.executable, "-"], program.replace(ADDRESS, guide.url))


def test_routes_and_metrics_are_all_there(guide: Any) -> None:
    assert len(COMMANDS) == 9
    for path in guide.client.get("/openapi.json").json()["paths"]:
        assert f"`{path.replace('{model}', '{id}')}`" in TEXT.replace("POST ", "").replace(
            "GET ", ""
        )
    told = guide.client.get("/metrics").text
    for name in set(re.findall(r"^# TYPE qwen2:(\w+?)(?:_created)? ", told, re.MULTILINE)):
        assert re.search(rf"`{name}(_total)?[`{{]", TEXT), name


def test_limits_are_as_they_are_told() -> None:
    limits = Limits()
    for value, row in (
        (limits.header_bytes // 1024, "headers | {} KiB, 100 of"),
        (limits.header_seconds, "time for headers | {:g} s"),
        (limits.body_bytes // 2**20, "body | {} MiB; 64 MiB"),
        (limits.body_seconds, "time for the body | {:g} s"),
        (limits.depth, "JSON nesting | {} |"),
        (limits.connections, "connections | {} |"),
        (limits.keep_alive_seconds, "an idle connection | {} s"),
        (limits.stalled_seconds, "reads nothing | {:g} s"),
        (protocol.MAX_MESSAGES, "messages; tools | {:,}; 128"),
        (protocol.MAX_CHOICES, "prompts times `n` | {}; 128"),
        (protocol.MAX_STOPS, "`stop` | {} of 256"),
        (protocol.MAX_LOGIT_BIASES, "`logit_bias` | {:,} tokens"),
        (protocol.MAX_TOP_LOGPROBS, "`logprobs` | {}; with"),
    ):
        assert row.format(value) in TEXT, row
