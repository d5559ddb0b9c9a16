"""Answers of a model in this process, by the engine's continuous batching.

In fp32 an answer does not depend on what else is in the batch (see inference/engine.py); in bf16
two nearly equal tokens may change places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import sha256_of
from qwen2.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from qwen2.model.hub import load, locate, open_checkpoint
from qwen2.synthesis.generator import Answer, Answering, Prompt, digest, never
from qwen2.tokenizer.chatml import ChatTemplate


class InProcess(Config):
    """How the model is held."""

    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    engine: EngineConfig = EngineConfig()


class EngineGenerator:
    """An engine that nobody else uses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._template = ChatTemplate.of(engine.tokenizer)

    @classmethod
    def load(cls, model: str, held: InProcess) -> EngineGenerator:
        """The engine of a checkpoint.

        Raises:
            UserError: there is no such checkpoint, or it can't be used.
        """
        loaded = load(
            model, dtype=held.dtype, device=held.device, quantize=held.quantize, inference=True
        )
        return cls(Engine(*loaded, held.engine))

    def generate(
        self, prompts: Iterable[Prompt], stopped: Callable[[], object] = never
    ) -> Answering:
        """See `Generator`; a prompt that the model's context can't hold is a failure."""
        source = iter(prompts)
        flying: dict[Request, int] = {}
        # Some wait, so that whoever ends is followed at once.
        room = self.engine.config.max_running + min(8, self.engine.config.max_queue)
        try:
            while not stopped():
                while len(flying) < room and (prompt := next(source, None)) is not None:
                    try:
                        flying[self._submit(prompt)] = prompt.index
                    except UserError as error:
                        yield prompt.index, Answer.failure(str(error))
                if not flying:
                    return
                self.engine.step()
                for request in [each for each in flying if each.finish_reason is not None]:
                    yield flying.pop(request), _answer(Completion.of(request))
        finally:
            for request in flying:
                self.engine.cancel(request)

    def _submit(self, prompt: Prompt) -> Request:
        ids, _ = self._template.encode(
            self.engine.tokenizer, prompt.messages, add_generation_prompt=True
        )
        room = self.engine.context_length - len(ids)
        if room < prompt.sampling.max_tokens:  # as servers do: an answer is never cut by it unseen
            raise UserError(
                f"the prompt has {len(ids)} tokens and the answer may have "
                f"{prompt.sampling.max_tokens}, but the context {self.engine.context_length}"
            )
        params = SamplingParams(**prompt.sampling.model_dump(), seed=prompt.seed)
        request = self.engine.prepare(ids, params)
        self.engine.scheduler.waiting.append(request)  # the queue's bound is for strangers
        return request


def identity_in_process(model: str, held: InProcess) -> dict[str, Any]:
    """What an answer depends on besides its prompt: the checkpoint's bytes and how it is held.

    Weights are not loaded for it, but read once (not those of the hub, whose commit tells them).
    """
    template = ChatTemplate.of(open_checkpoint(model).tokenizer()).source
    return {
        "model": Path(model).name,
        "weights": _weights(locate(model)),
        "template": digest(template),
        "dtype": held.dtype,
        "quantize": held.quantize,
        "kv_dtype": held.engine.kv_dtype,
    }


def _answer(completion: Completion) -> Answer:
    if completion.finish_reason not in ("stop", "length"):
        return Answer.failure(completion.error or completion.finish_reason)
    return Answer(
        completion.text,
        completion.finish_reason,
        len(completion.prompt_token_ids),
        len(completion.token_ids),
    )


def _weights(path: Path) -> str:
    """The commit of a snapshot of the hub, else sha256 of the files that are read."""
    if path.parent.name == "snapshots":
        return f"commit {path.name}"
    if path.is_file():
        return f"sha256 {sha256_of(path)}"
    names = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    names += [p for p in (path / "merges.txt",) if p.exists()]
    together = "".join(f"{p.name} {sha256_of(p)}\n" for p in names)
    return f"sha256 {hashlib.sha256(together.encode()).hexdigest()}"
