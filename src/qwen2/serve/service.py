"""What the routes share: the engine, its tokenizer and template, and how a request begins."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import qwen2
from qwen2.common.errors import UserError
from qwen2.inference import EngineThread, Grammar, QueueFull, SamplingParams
from qwen2.serve.conversation import for_template, shown_tool
from qwen2.serve.errors import ApiError
from qwen2.serve.flight import Flight, Job, in_thread, translated
from qwen2.serve.metrics import Metrics
from qwen2.serve.protocol import ChatRequest, CompletionRequest, Message, Sampling, Tool
from qwen2.serve.settings import Settings
from qwen2.tokenizer.chatml import ChatTemplate

T = TypeVar("T")

PREPARING = 4  # threads that render and tokenize: little of it holds Python's lock
COMPILING = 4  # further threads, for requests with a new grammar, which may take seconds
MOST_COMPILING = 16  # such requests at a time


class Service:
    """An engine that is running, ready to be asked.

    Raises:
        UserError: the checkpoint's chat template can't be used.
    """

    def __init__(self, engine: EngineThread, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.engine.tokenizer
        self.context = engine.engine.context_length
        self.metrics = Metrics(engine, settings.names[0])
        self.started = int(time.time())
        self.fingerprint = f"qwen2-{qwen2.__version__}"
        self._template = ChatTemplate.of(self.tokenizer, bounded=True)
        self._pool = ThreadPoolExecutor(PREPARING, "prepare")
        self._compilers = ThreadPoolExecutor(COMPILING, "compile")
        self._to_compile = threading.BoundedSemaphore(MOST_COMPILING)

    def check_model(self, name: str | None) -> str:
        """The model's name for the answer; the only one may be left out.

        Raises:
            ApiError: another model is asked for.
        """
        if name is not None and name not in self.settings.names:
            raise ApiError(
                404,
                f"there is no model {name!r} here; "
                f"there is {', '.join(map(repr, self.settings.names))}",
                param="model",
                code="model_not_found",
            )
        return name or self.settings.names[0]

    async def launch(self, make_jobs: Callable[[], Sequence[Job]], salt: str) -> Flight:
        """Make jobs and submit them, on another thread, for long texts take long to encode.

        New grammars have threads of their own: nobody else waits for them.

        Raises:
            ApiError: something about them can't be, or not now.
        """
        flight = Flight(self.engine, self.metrics)

        def begin() -> Sequence[Job]:
            jobs = _told(make_jobs)
            if any(self.engine.engine.takes_long(job.params) for job in jobs):
                return jobs
            flight.launch(jobs, salt)
            return ()

        if jobs := await in_thread(self._pool, begin, flight.cancel):
            if not self._to_compile.acquire(blocking=False):
                raise translated(QueueFull("too many new grammars at a time; try again later"))

            def compile_and_launch() -> None:
                try:
                    flight.launch(jobs, salt)
                finally:
                    self._to_compile.release()

            await in_thread(self._compilers, compile_and_launch, flight.cancel)
        return flight

    async def prepare(self, work: Callable[[], T]) -> T:
        """The result of `work`, on another thread; a `UserError` in it becomes a 400."""
        return await in_thread(self._pool, lambda: _told(work), lambda: None)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, generate: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant to speak.

        Raises:
            UserError: the template refuses it; or a call in the history has arguments that are no
                JSON object.
        """
        ids, _ = self._template.encode(
            self.tokenizer,
            [for_template(message) for message in messages],
            [shown_tool(tool) for tool in tools or ()],
            add_generation_prompt=generate,
        )
        return ids

    def encode_prompts(self, prompts: Any) -> list[list[int]]:
        """Token ids of each prompt of a request; control tokens written in them are read.

        A document begins after the end of another, so an empty prompt is that end.

        Raises:
            ApiError: an id that the vocabulary has not.
        """
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        many = [
            self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        known = self.engine.engine.vocabulary
        for ids in many:
            if wrong := [id_ for id_ in ids if not 0 <= id_ < known]:
                raise ApiError(400, f"{wrong[0]} is no token id; ids are 0 to {known - 1}")
        return [ids or [self.tokenizer.end_of_text_id] for ids in many]

    def sampling(
        self,
        body: Sampling,
        prompt: Sequence[int],
        max_tokens: int | None,
        grammar: Grammar | None = None,
        **logprobs: int | None,
    ) -> list[SamplingParams]:
        """How each of the `n` completions of a prompt is drawn.

        Raises:
            ApiError: prompt and completion would not fit into the context, which is never cut.
        """
        wanted = max_tokens or max(1, self.context - len(prompt))
        about = {ChatRequest: "messages", CompletionRequest: "prompt"}
        self.check_length(len(prompt), wanted, about.get(type(body), "input"))
        given = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_k": max(0, body.top_k or 0),  # other servers say -1 for all
            "top_p": body.top_p,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
            "stop": tuple(body.stop or ()),
            "ignore_eos": body.ignore_eos,
            "grammar": grammar,
            **logprobs,
        }
        values = {name: value for name, value in given.items() if value is not None}
        seeds = [None if body.seed is None else _wrapped(body.seed + i) for i in range(body.n or 1)]
        return [
            SamplingParams.parse({**values, "max_tokens": wanted, "seed": seed}, "sampling")
            for seed in seeds
        ]

    def check_length(self, prompt: int, completion: int, param: str) -> None:
        """An `ApiError` with the numbers, if so many tokens exceed the context."""
        if prompt + completion > self.context:
            raise ApiError(
                400,
                f"the context is {self.context} tokens, but the prompt has {prompt} and the "
                f"completion may have {completion}: {prompt + completion} in all; shorten either",
                param=param,
                code="context_length_exceeded",
            )

    def close(self) -> None:
        """End the threads and the template's process."""
        for pool in (self._pool, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._template.close()


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}{uuid.uuid4().hex}"


def usage(flight: Flight, n: int = 1) -> dict[str, Any]:
    """Tokens of a flight, each prompt counted once though it has `n` completions."""
    prompts = flight.requests[::n]
    prompt = sum(len(request.prompt) for request in prompts)
    completion = sum(len(request.output) for request in flight.requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(request.cached_tokens for request in prompts)
        },
    }


def _told(work: Callable[[], T]) -> T:
    try:
        return work()
    except UserError as error:
        raise translated(error) from error


def _wrapped(seed: int) -> int:
    """Within 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
