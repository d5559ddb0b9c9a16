"""The commands as a person types them: exit codes, one line of error, clean stdout."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.cli.chat import Conversation
from qwen2.inference import SamplingParams
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import load, save
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shards import write_shards

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes, in the Hugging Face layout."""
    config = ModelConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=20_000,
    )  # fmt: skip
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # greedy, it never comes to an end
    folder = tmp_path_factory.mktemp("model") / "random"
    save(model, BYTES, folder)
    return folder


def qwen2(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def generated(folder: Path, *arguments: object) -> dict[str, Any]:
    done = qwen2("generate", folder, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_generate_prints_one_object(folder: Path) -> None:
    result = generated(folder, "-p", "hi", "-n", 5, "--seed", 1, "--temperature", 1)
    assert set(result) == {"text", "token_ids", "prompt_token_ids", "finish_reason", "usage"}
    assert result["prompt_token_ids"] == [104, 105]
    assert len(result["token_ids"]) <= 5
    assert result == generated(folder, "-p", "hi", "-n", 5, "--seed", 1, "--temperature", 1)


def test_generate_as_chat_and_from_an_empty_prompt(folder: Path) -> None:
    chat = generated(folder, "-p", "hi<|im_end|>", "--chat", "--system", "Be brief.", "-n", 1)
    assert BYTES.decode(chat["prompt_token_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat["prompt_token_ids"].count(258) == 2  # the person's own is plain text
    assert generated(folder, "-p", "", "-n", 1)["prompt_token_ids"] == [256]


def test_generate_guesses_ahead(folder: Path, tmp_path: Path) -> None:
    prompt = "-p", "abc abc abc", "-n", 12
    expected = generated(folder, *prompt)
    assert generated(folder, *prompt, "--speculate", 4) == expected
    assert generated(folder, *prompt, "--speculate", 4, "--draft", folder) == expected
    done = qwen2("generate", folder, *prompt, "--draft", folder)
    assert done.returncode == 2
    assert "a draft model needs speculate" in done.stderr
    model, _ = load(folder)
    ranks = {bytes([255 - value]): value for value in range(256)}
    other = Tokenizer.from_ranks(ranks, dict(BYTES.special_tokens))
    save(model, other, tmp_path / "other")
    done = qwen2("generate", folder, *prompt, "--speculate", 4, "--draft", tmp_path / "other")
    assert done.returncode == 2
    assert "its tokenizer is another" in done.stderr


def test_generate_streams_text(folder: Path) -> None:
    done = qwen2("generate", folder, "-p", "-", "-n", 8, stdin="some input")
    assert done.returncode == 0
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_on_load(folder: Path, tmp_path: Path, method: str) -> None:
    assert len(generated(folder, "-p", "hi", "-n", 3, "--quantize", method)["token_ids"]) == 3
    (tmp_path / "text.txt").write_text("Some text to score, not much of it.")
    scores = [
        json.loads(qwen2("score", folder, tmp_path / "text.txt", "--json", *options).stdout)
        for options in ([], ["--quantize", method])
    ]
    assert scores[1]["bits_per_byte"] == pytest.approx(scores[0]["bits_per_byte"], rel=0.05)
    assert scores[1] != scores[0]


def test_score_prints_one_object(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("été\n")
    second.write_text("abc")
    done = qwen2("score", folder, first, second, "--json")
    result = json.loads(done.stdout)
    assert set(result) == {"bits_per_byte", "perplexity", "tokens", "bytes"}
    assert result["bytes"] == result["tokens"] == 9
    assert 7 < result["bits_per_byte"] < 9  # an untrained model: log2 of 264 or so


def test_train_makes_a_context_longer(folder: Path, tmp_path: Path) -> None:
    """A recipe of stage long_context, from a model and shards to figures and a chart."""
    text = "And did those feet in ancient time walk upon England's mountains green? "
    write_shards(
        tmp_path / "shards",
        [("verse", BYTES.encode(text * count)) for count in (1, 4)],
        vocab_size=BYTES.vocab_size, end_of_text=BYTES.end_of_text_id, tokenizer="bytes",
    )  # fmt: skip
    model, out = tmp_path / "short", tmp_path / "out"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": 64, "rope_theta": 10_000.0}
    (model / "config.json").write_text(json.dumps(config))
    recipe = {
        "stage": "long_context", "init": str(model), "data": str(tmp_path / "shards"),
        "tokenizer": str(model), "held_out": str(tmp_path / "shards"), "out": str(out),
        "context": 256, "rows": 1, "steps": 2, "optimizer": {"lr": 1e-3}, "threads": 1,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
    done = qwen2("train", tmp_path / "recipe.yaml", "steps=3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["finished"], result["step"], result["tokens"]) == (True, 3, 3 * 256)
    assert result["positions"] == str(out / "positions.json")
    assert set(json.loads((out / "positions.json").read_text())) == {"before", "after"}
    assert (out / "positions.svg").read_text().startswith("<svg ")
    assert qwen2("score", out / "model", tmp_path / "recipe.yaml", "--json").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "-p", "x"], "nowhere"),
        (["generate", "MODEL", "-p", "x", "--temperature", "-1"], "temperature"),
        (["generate", "MODEL", "-p", "x", "--top-p", "0"], "top_p"),
        (["generate", "MODEL", "-p", "x", "--dtype", "int3"], "int3"),
        (["generate", "MODEL", "-p", "x", "--device", "tpu"], "tpu"),
        (["generate", "MODEL", "-p", "x", "--quantize", "int3"], "int8"),
        (["generate", "MODEL", "-p", "x", "--system", "y"], "--chat"),
        (["generate", "MODEL"], "prompt"),
        (["generate", "MODEL", "-p", "x" * 20_001], "20001 tokens"),
        (["score", "MODEL", "missing.txt"], "missing.txt"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "miniature", "stage=pretrian"], "did you mean 'pretrain'?"),
        (["train", "long_context", "out=x"], "key 'init' is missing"),
        (["quickstart", "--out", "/dev/null"], "/dev/null"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder: Path, arguments: list[str], message: str) -> None:
    done = qwen2(*[folder if argument == "MODEL" else argument for argument in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("qwen2: ")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in qwen2("--debug", "generate", "nowhere", "-p", "x").stderr


def test_help_needs_nothing_heavy() -> None:
    """What makes --help slow is importing torch and its like, so none of it may be imported."""
    heavy = [
        "torch",
        "numpy",
        "pydantic",
        "transformers",
        "tokenizers",
        "pyarrow",
        "tiktoken",
        "jinja2",
        "yaml",
    ]
    code = f"import sys, qwen2.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_closed_pipe_is_quiet(folder: Path) -> None:
    command = f"{sys.executable} -m qwen2.cli generate {folder} -p x -n 400 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout


def test_chat_keeps_the_conversation(folder: Path) -> None:
    lines = "hello\n\n/system Be brief.\n/unknown\nagain\n/reset\n/exit\n"
    done = qwen2("chat", folder, "-n", 4, "--seed", 1, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") >= 7
    assert "/reset forgets" in done.stderr


def test_chat_computes_what_was_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(*load(folder), SamplingParams(max_tokens=30), None)
    conversation.answer("a question that fills some blocks of the cache")
    before = conversation.engine.stats
    conversation.answer("more")
    hits = conversation.engine.stats.prefix_hits - before.prefix_hits
    assert before.prompt_tokens - 16 < hits
    assert len(conversation.messages) == 4
    assert capsys.readouterr().out.splitlines()[0] == conversation.messages[1]["content"]


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_session(folder: Path) -> None:
    """A real terminal: the second question is still answered after Ctrl-C in the first."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        arguments = ["chat", str(folder), "-n", "15000", "--temperature", "0"]
        os.execv(sys.executable, [sys.executable, "-m", "qwen2.cli", *arguments])
    screen = b""

    def read(limit: float = 60) -> None:
        nonlocal screen
        assert select.select([terminal], [], [], limit)[0], f"nothing came after {screen[-500:]!r}"
        screen += os.read(terminal, 1024)

    def until(text: bytes, limit: float = 60) -> None:
        nonlocal screen
        while text not in screen:
            read(limit)
        screen = screen.split(text, 1)[1]

    try:
        until(b"> ")
        os.write(terminal, b"first\n")
        until(b"first")
        while len(screen) < 50:  # the answer has begun
            read()
        os.write(terminal, b"\x03")
        until(b"[stopped]")
        until(b"> ")
        os.write(terminal, b"half a line")
        until(b"half a line")
        os.write(terminal, b"\x03")  # at the prompt, Ctrl-C only clears the line
        try:
            until(b"> ", 20)
        except AssertionError:  # Python notices a key just before it reads only with the next one
            os.write(terminal, b"\x03")
            until(b"> ")
        os.write(terminal, b"/system new\n")
        until(b"> ")
        os.write(terminal, b"/exit\n")
        with contextlib.suppress(OSError):  # how a terminal says that its other side is closed
            while True:
                read()
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def test_sigint_during_generate_is_130(folder: Path) -> None:
    command = [sys.executable, "-m", "qwen2.cli", "generate", str(folder), "-p", "x", "-n", "19000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.decode() == "qwen2: interrupted\n"
