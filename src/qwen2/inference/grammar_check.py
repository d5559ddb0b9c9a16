"""Compiling a grammar with llguidance, and a process in which it is tried first.

Most of what llguidance does is bounded by its limits, but not all: `multipleOf` 99999999, or
twenty intersected expressions, would take minutes and all memory, and Rust cannot be interrupted.
So a grammar is compiled first in a process that has little memory and can be killed. That process
runs this file by its path: nothing of qwen2 is imported here, lest each takes seconds to start.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SECONDS = 3  # of the processor, to compile a grammar, which takes milliseconds
PATIENCE = 15.0  # seconds by the clock for that, on a busy machine
WAIT = 8.0  # seconds for one's turn: behind two that are given up
START_SECONDS = 60.0  # to start the process: plenty on a busy machine
MEMORY = 2 << 30  # bytes of address space, of the process that tries

LIMITS: dict[str, Any] = {
    # The lexer's largest structure. A repeated lexeme takes time by its square: this is 0.2 s.
    "initial_lexer_fuel": 100_000,
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


class NoTimeError(Exception):
    """A grammar that nobody has looked at: others took the time, or there is no process."""


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

    `special`, `ends` and `size`: the special tokens, the ends of sequence, and the number of ids
    that a grammar may name.
    """

    def __init__(self, special: Mapping[str, int], ends: Sequence[int], size: int) -> None:
        self._vocabulary = {"special": dict(special), "ends": list(ends), "size": size}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, kind: str, text: str) -> None:
        """Nothing, if the grammar can be compiled within bounds.

        Raises:
            GrammarError: it cannot.
            NoTimeError: it was not its turn for too long, or the process does not start.
        """
        if not self._lock.acquire(timeout=WAIT):
            raise NoTimeError("other grammars are being compiled; try again later")
        try:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = self._start()
            answer = _ask(process, {"kind": kind, "text": text}, PATIENCE)
        finally:
            self._lock.release()
        if answer is None:
            raise GrammarError("it takes too much time or memory; simplify it")
        if answer:
            raise GrammarError(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: this file's folder is no place to import from, for its names are not those of others.
        failed = NoTimeError("the process that compiles grammars does not start; try again later")
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is not for it
            )  # fmt: skip
        except OSError:  # no memory, or no more processes
            raise failed from None
        weakref.finalize(self, _end, process)
        if _ask(process, self._vocabulary, START_SECONDS) is None:
            raise failed
        return process


def _ask(process: subprocess.Popen[bytes], question: Mapping[str, Any], seconds: float) -> Any:
    """A line to the process and one back; None, and its end, if that takes too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    if not line.endswith(b"\n"):
        _end(process)
        return None
    return json.loads(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent
            if pipe is not None:
                pipe.close()


def _serve() -> None:
    """Read a vocabulary, then grammars; say of each what is wrong with it, or nothing."""
    vocabulary = json.loads(sys.stdin.readline())
    size, special = vocabulary["size"], vocabulary["special"]
    # What takes long does not depend on the words, so bytes do; but ids are those of the model.
    free = iter(sorted(set(range(size)) - set(special.values())))
    words = dict(zip((bytes([byte]) for byte in range(256)), free, strict=False))
    tokens = tokens_of(words, special, ".", vocabulary["ends"], size)
    answer = ""
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if not (line := sys.stdin.readline()):
            return
        _limit()
        question = json.loads(line)
        try:
            compile_grammar(question["kind"], question["text"], tokens)
            answer = ""
        except GrammarError as error:
            answer = str(error)


def _limit() -> None:
    """Little memory, and little of the processor for the next grammar."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _serve()
