"""Whole runs: the same bytes whatever happened on the way, provenance, nothing asked twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import uvicorn
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.documents import read_documents
from qwen2.corpus.split import split_key
from qwen2.inference import Engine, EngineConfig, EngineThread
from qwen2.model.hub import save
from qwen2.serve.app import create_app
from qwen2.serve.run import uvicorn_config
from qwen2.serve.settings import Settings
from qwen2.synthesis import Answer, Answerer, Prompt, SynthesisRecipe, synthesize

FILES = ("documents/documents.parquet", "rejected/rejected.parquet", "summary.json", "samples.html")


@dataclass
class Script:
    """A generator that answers by a function of the prompt, in any order, and may be cut short."""

    answer: Callable[[Prompt], Answer]
    order: Callable[[list[Prompt]], list[Prompt]] = list
    cut_after: int | None = None
    at_a_time: int = 4
    asked: list[str] = field(default_factory=list)

    def generate(
        self, prompts: Iterable[Prompt], stopped: Callable[[], object]
    ) -> Iterator[tuple[int, Answer]]:
        source = iter(prompts)
        flying: list[Prompt] = []
        given = 0
        while True:
            while len(flying) < self.at_a_time and (prompt := next(source, None)) is not None:
                flying.append(prompt)
            if not flying:
                return
            if given == self.cut_after:
                raise KeyboardInterrupt
            flying = self.order(flying)
            prompt = flying.pop(0)
            self.asked.append(prompt.messages[-1]["content"])
            given += 1
            yield prompt.index, self.answer(prompt)

    def as_answerer(self) -> Answerer:
        return Answerer({"model": "script"}, lambda: self)


def plausible(prompt: Prompt) -> Answer:
    """Kept, rejected and failed ones, by the seed."""
    kind = prompt.seed % 5
    asked = prompt.messages[-1]["content"]
    if kind == 0:
        return Answer.failure(f"seed {prompt.seed}")
    if kind == 1:
        return Answer("I'm sorry, but I can't help with that.", "stop", 9, 9)
    if kind == 2:
        return Answer("Q: What is the bridge", "length", 9, 9)
    if "Hefe" in asked:
        text = (
            "Q: Wozu verwenden Bäcker Hefe?\nA: Sie verwandelt den Zucker des Mehls in "
            "Kohlendioxid und Alkohol, und so geht das Brot auf."
        )
    else:
        text = (
            "Q: When was the Firth of Forth bridge opened?\nA: The railway bridge in Scotland was "
            f"opened in 1890 ({prompt.seed})."
        )
    return Answer(text if "Copper melts" in asked else f"# Section\n\n{text * 4}", "stop", 9, 9)


def outputs(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def run(recipe: SynthesisRecipe, out: Path, script: Script, **options: Any) -> Any:
    return synthesize(recipe, out, answerer=script.as_answerer(), **options)


def test_a_run_and_what_each_document_tells(recipe: SynthesisRecipe, tmp_path: Path) -> None:
    script = Script(plausible)
    outcome = run(recipe, tmp_path / "out", script)
    tallies = outcome.summary["tasks"]
    assert tallies["qa"]["records"] == 6
    for tally in tallies.values():
        assert tally["kept"] + tally["failed"] + sum(tally["rejected"].values()) == tally["records"]
    assert sum(tally["records"] for tally in tallies.values()) == outcome.records == 6 + 4
    parents = {d.id: d for d in read_documents(tmp_path / "documents.parquet")}
    kept = list(read_documents(tmp_path / "out" / FILES[0]))
    assert len(kept) == sum(tally["kept"] for tally in tallies.values()) > 1
    for document in kept:
        origin = document.metadata["synthesis"]
        parent = parents[origin["parent"]]
        assert document.kind == f"synthetic/{origin['task']}"
        assert (document.licence, document.source) == (parent.licence, parent.source)
        assert split_key(document) == split_key(parent)
        assert document.language == parent.language
        assert parent.text[slice(*origin["excerpt"])]
        assert origin["sampling"] == recipe.sampling.model_dump()
        saved = yaml.safe_load((tmp_path / f"out/prompts/{origin['prompt']}.yaml").read_text())
        assert saved["kind"] == document.kind
        who = json.loads((tmp_path / f"out/generators/{origin['generator']}.json").read_text())
        assert who == {"fingerprint": origin["generator"], "model": "script"}
    rejected = list(read_documents(tmp_path / "out" / FILES[1]))
    assert {d.metadata["synthesis"]["reason"].split()[0] for d in rejected} <= {"seed", "a", "cut"}
    assert len(kept) + len(rejected) == outcome.records


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 99), st.integers(0, 200))
def test_any_interruptions_and_orders_give_the_same_bytes(
    recipe: SynthesisRecipe, whole: dict[str, bytes], cuts: list[int], seed: int, torn: int
) -> None:
    """Cut after some answers, the newest segment torn somewhere, answers in any order."""
    draw = random.Random(seed)

    def order(flying: list[Any]) -> list[Any]:
        return draw.sample(flying, len(flying))

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        for cut in cuts:
            script = Script(plausible, order, cut_after=cut)
            try:
                run(recipe, out, script)
            except KeyboardInterrupt:
                for segment in sorted((out / "answers").glob("*.jsonl"))[-1:]:
                    os.truncate(segment, max(0, segment.stat().st_size - torn))
        script = Script(plausible, order, at_a_time=1 + seed % 7)
        assert run(recipe, out, script).finished
        assert outputs(out) == whole


@pytest.fixture
def whole(recipe: SynthesisRecipe, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    run(recipe, tmp_path / "whole", Script(plausible))
    return outputs(tmp_path / "whole")


def test_nothing_is_asked_twice(recipe: SynthesisRecipe, tmp_path: Path) -> None:
    asked: list[str] = []
    for cut in (2, 3, None):
        script = Script(plausible, cut_after=cut)
        with contextlib.suppress(KeyboardInterrupt):
            run(recipe, tmp_path / "out", script)
        asked += script.asked
    assert len(asked) == 10
    never = Script(lambda prompt: pytest.fail("asked again"))
    assert run(recipe, tmp_path / "out", never).speed is None


def test_what_changes_is_asked_and_nothing_else(recipe: SynthesisRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, out, Script(plausible))
    values = recipe.model_dump(mode="json")

    def asked(**changes: Any) -> int:
        script = Script(plausible)
        run(SynthesisRecipe.parse({**values, **changes}), out, script)
        return len(script.asked)

    # A limit is applied to what is there; a further task asks for its own records alone.
    stricter = {**values["tasks"], "qa": {"share": 1.0, "checks": {"characters": 10_000}}}
    assert asked(tasks=stricter) == 0
    assert json.loads((out / "summary.json").read_text())["tasks"]["qa"]["kept"] == 0
    assert asked(tasks={**values["tasks"], "rewrite": {"share": 1.0}}) == 6
    assert asked(sampling={**values["sampling"], "temperature": 0.2}) == 10
    assert asked(seed=1) > 5


def test_failures_are_asked_again_when_it_is_wanted(
    recipe: SynthesisRecipe, tmp_path: Path
) -> None:
    first = run(recipe, tmp_path / "out", Script(plausible))
    failed = sum(tally["failed"] for tally in first.summary["tasks"].values())
    assert failed
    script = Script(lambda p: plausible(p) if p.seed % 5 else plausible(_with_seed(p, p.seed + 3)))
    second = run(recipe, tmp_path / "out", script, retry_failed=True)
    assert len(script.asked) == failed
    assert sum(tally["failed"] for tally in second.summary["tasks"].values()) == 0


def _with_seed(prompt: Any, seed: int) -> Any:
    return replace(prompt, seed=seed)


def test_a_hostile_text_stays_text_on_the_page(recipe: SynthesisRecipe, tmp_path: Path) -> None:
    evil = (
        "Q: When was the bridge opened<script>alert(1)</script>?\nA: In Scotland <img src=x> 1890."
    )
    run(recipe, tmp_path / "out", Script(lambda prompt: Answer(evil, "stop")))
    page = (tmp_path / "out/samples.html").read_text()
    assert "alert(1)" in page
    assert "<script" not in page
    assert "<img" not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {}}, "nothing to make"),
        ({"model": None}, "need a `model`"),
        ({"tasks": {"qa": {"share": 2}}}, "tasks.qa.share"),
        ({"tasks": {"qa": {"share": 1, "sampling": {"heat": 1}}}}, "unknown key 'heat'"),
    ],
)
def test_a_recipe_that_cannot_be(recipe: SynthesisRecipe, changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        SynthesisRecipe.parse({**recipe.model_dump(mode="json"), **changes})


def test_places_that_cannot_be(recipe: SynthesisRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds something else"):
        run(recipe, tmp_path, Script(plausible))
    values = {**recipe.model_dump(mode="json"), "sources": [{"path": str(tmp_path / "no*")}]}
    with pytest.raises(UserError, match="no such file"):
        run(SynthesisRecipe.parse(values), tmp_path / "out", Script(plausible))
    values["sources"] = recipe.model_dump(mode="json")["sources"]
    values["excerpt"] = {"least": 1000}
    with pytest.raises(UserError, match="no document is long enough"):
        run(SynthesisRecipe.parse(values), tmp_path / "out", Script(plausible))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny_models.build(max_position_embeddings=4096), tiny_models.BYTES, folder)
    return folder


def in_process(recipe: SynthesisRecipe, model: str, **changes: Any) -> SynthesisRecipe:
    values = recipe.model_dump(mode="json") | {
        "model": model,
        "sampling": {"max_tokens": 24, "temperature": 0.9},
        "in_process": {"dtype": "fp32", "engine": {"max_running": 3, "kv_tokens": 16384}},
    }
    return SynthesisRecipe.parse(values | changes)


def texts(out: Path) -> dict[str, str]:
    return {d.id: d.text for d in read_documents(out / FILES[1])}


def test_in_process_an_answer_does_not_depend_on_the_batch(
    recipe: SynthesisRecipe, checkpoint: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    for running in (1, 5):
        engine = {"max_running": running, "max_batch_tokens": 64 * running, "kv_tokens": 16384}
        changed = in_process(
            recipe, str(checkpoint), in_process={"dtype": "fp32", "engine": engine}
        )
        outcome = synthesize(changed, tmp_path / str(running))
        assert outcome.finished
        assert outcome.speed["tokens_per_s"] > 0
    alone, together = texts(tmp_path / "1"), texts(tmp_path / "5")
    assert alone == together
    assert len(set(alone.values())) > 5


def test_a_prompt_beyond_the_context_fails_alone(
    recipe: SynthesisRecipe, checkpoint: Path, tmp_path: Path
) -> None:
    long = in_process(recipe, str(checkpoint), sampling={"max_tokens": 3500})
    assert synthesize(long, tmp_path / "out").summary["tasks"]["qa"]["failed"] >= 1
    reasons = {
        d.metadata["synthesis"]["reason"] for d in read_documents(tmp_path / "out" / FILES[1])
    }
    assert any("but the context 4096" in reason for reason in reasons)


def test_our_own_server_gives_the_same_texts(
    recipe: SynthesisRecipe, checkpoint: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    greedy = {"max_tokens": 24, "temperature": 0.0}
    synthesize(in_process(recipe, str(checkpoint), sampling=greedy), tmp_path / "here")
    model = tiny_models.build(max_position_embeddings=4096)
    thread = EngineThread(Engine(model, tiny_models.BYTES, EngineConfig(kv_tokens=16384)))
    thread.start()
    served = Settings(("tiny",))
    server = uvicorn.Server(uvicorn_config(create_app(thread, served), served.limits, 5.0))
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while not server.started:
        assert running.is_alive()
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        endpoint = {"url": f"http://127.0.0.1:{port}", "at_a_time": 4}
        there = in_process(recipe, "tiny", sampling=greedy, endpoint=endpoint)
        synthesize(there, tmp_path / "there")
    finally:
        server.should_exit = True
        running.join(30)
        thread.stop()
    assert texts(tmp_path / "there") == texts(tmp_path / "here")
    assert len(texts(tmp_path / "there")) == 10


COMMAND = "from qwen2.cli import synth; synth.app()"


def start(file: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, "text", str(file), "--out", str(out), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def lines(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in (out / "answers").glob("*.jsonl"))


@pytest.mark.slow
def test_killed_at_several_points_it_ends_with_the_same_bytes(
    recipe: SynthesisRecipe, checkpoint: Path, tmp_path: Path
) -> None:
    """SIGKILL three times, then SIGTERM, which ends it in good order; sampled, not greedy."""
    in_process(recipe, str(checkpoint), sampling={"max_tokens": 200, "temperature": 0.9}).save(
        tmp_path / "recipe.yaml"
    )
    first = start(tmp_path / "recipe.yaml", tmp_path / "whole")
    assert json.loads(first.communicate(timeout=300)[0])["answered"] == 10
    out = tmp_path / "out"
    for wanted, sent in ((1, signal.SIGKILL), (3, signal.SIGKILL), (6, signal.SIGTERM)):
        process = start(tmp_path / "recipe.yaml", out)
        until = time.monotonic() + 300
        while lines(out) < wanted and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(sent)
        said, told = process.communicate(timeout=300)
        if sent == signal.SIGTERM:
            assert process.returncode == 0, told
            assert not json.loads(said)["finished"] or lines(out) == 10
    process = start(tmp_path / "recipe.yaml", out)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert outputs(out) == outputs(tmp_path / "whole")
