"""Inference: sampling, incremental text, paged cache, scheduler, engine."""

from qwen2.inference.engine import Engine, EngineConfig, EngineDead, EngineStats, QueueFull
from qwen2.inference.request import Completion, FinishReason, Output, Request, TokenLogprob
from qwen2.inference.sampling import Grammar, SamplingParams
from qwen2.inference.thread import EngineThread

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineStats",
    "EngineThread",
    "FinishReason",
    "Grammar",
    "Output",
    "QueueFull",
    "Request",
    "SamplingParams",
    "TokenLogprob",
]
