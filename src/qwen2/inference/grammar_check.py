"""Compiling a grammar with llguidance, and a process in which it is tried first.

Most of what llguidance does is bounded by its limits, but not all: `multipleOf` 99999999, or
twenty intersected expressions, would take minutes and all memory, and Rust cannot be interrupted.
So a grammar is compiled first in a process that has little memory and can be killed. That process
runs this file by its path: nothing of qwen2 is imported here, lest each takes seconds to start.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SECONDS = 5.0  # to compile a grammar
MEMORY = 2 << 30  # bytes of address space, of the process that tries

LIMITS: dict[str, Any] = {
    # The lexer's largest structure. A repeated lexeme takes time by its square: this is 0.1 s.
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 100_000,  # of one mask: about 7 ms
    "step_max_items": 50_000,  # the same of the parser: 3 ms
    "max_items_in_row": 2000,
    "max_lexer_states": 20_000,  # 1-2 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

# Blanks between JSON's parts. Without a bound a model in doubt writes them until it has no room.
JSON_DEFAULTS: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


class GrammarError(Exception):
    """What llguidance says of a grammar, in one line."""


def guarded(call: Callable[..., Any], *args: Any, **values: Any) -> Any:
    """The result of llguidance; its exceptions, and panics of Rust, as a GrammarError."""
    try:
        return call(*args, **values)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise GrammarError(one_line(str(error))) from None


def one_line(message: str) -> str:
    """The beginning of a message that may quote all of the grammar over many lines."""
    message = message[:2000].replace("<non-verbose/>", "")
    line = " ".join(message.replace("NoExtensionBias", "it allows no text").split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def tokens_of(
    encoder: Mapping[bytes, int],
    special: Mapping[str, int],
    pattern: str,
    ends: Sequence[int],
    size: int,
) -> LLTokenizer:
    """A vocabulary of `size` ids as llguidance has it; `ends` are the ends of sequence."""
    from llguidance import LLTokenizer

    tokens: LLTokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
        encoder={token: id_ for token, id_ in encoder.items() if id_ < size},
        special_tokens={token: id_ for token, id_ in special.items() if id_ < size},
        pattern=pattern,
        eos_token=list(ends),
        n_vocab=size,
        slices=None,
    )
    return tokens


def compile_grammar(kind: str, text: str, tokens: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of the text.

    Raises:
        GrammarError: llguidance refuses it.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        source = guarded(LLMatcher.grammar_from_json_schema, text, defaults=JSON_DEFAULTS)
    elif kind == "regex":
        source = guarded(LLMatcher.grammar_from_regex, text)
    else:
        source = guarded(LLMatcher.grammar_from_lark, text)
    limits = LLParserLimits(**LIMITS)
    matcher: LLMatcher = guarded(LLMatcher, tokens, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    guarded(matcher.compute_bitmask)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return matcher


class Checker:
    """The process that tries grammars, one at a time; started at the first, and again when killed.

    `special` and `size`: the special tokens and the number of ids that a grammar may name.
    """

    def __init__(self, special: Mapping[str, int], ends: Sequence[int], size: int) -> None:
        self._vocabulary = {"special": dict(special), "ends": list(ends), "size": size}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def check(self, kind: str, text: str) -> None:
        """Nothing, if the grammar can be compiled within bounds.

        Raises:
            GrammarError: it cannot, or the process is busy with others for too long.
        """
        if not self._lock.acquire(timeout=2 * SECONDS):
            raise GrammarError("others are being compiled; try again later")
        try:
            answer = self._ask(json.dumps({"kind": kind, "text": text}))
        finally:
            self._lock.release()
        if answer:
            raise GrammarError(answer)

    def _ask(self, question: str) -> str:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        replies: list[str] = []

        def read(stream: IO[str]) -> None:
            replies.append(stream.readline())

        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            reader.start()
            reader.join(SECONDS)
        except BrokenPipeError:
            replies = [""]
        if replies and replies[0]:
            answer: str = json.loads(replies[0])
            return answer
        _end(process)
        return "it takes too much memory" if replies else "it takes too long; simplify it"

    def _start(self) -> subprocess.Popen[str]:
        # -P: this file's folder is no place to import from, for its names are not those of others.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__], text=True, encoding="ascii",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._vocabulary) + "\n")
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent
            if pipe is not None:
                pipe.close()


def _serve() -> None:
    """Read a vocabulary, then grammars; write what is wrong with each, or nothing."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = json.loads(sys.stdin.readline())
    special = vocabulary["special"]
    # What takes long does not depend on the words, so bytes do; but ids are those of the model.
    free = (id_ for id_ in range(vocabulary["size"]) if id_ not in set(special.values()))
    words = dict(zip((bytes([byte]) for byte in range(256)), free, strict=False))
    tokens = tokens_of(words, special, ".", vocabulary["ends"], vocabulary["size"])
    for line in sys.stdin:
        try:
            question = json.loads(line)
            compile_grammar(question["kind"], question["text"], tokens)
            answer = ""
        except GrammarError as error:
            answer = str(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
