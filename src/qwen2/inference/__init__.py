"""Inference: sampling, incremental text, generation."""

from qwen2.inference.generation import Completion, Sequence, generate, step, stream
from qwen2.inference.sampling import SamplingParams

__all__ = ["Completion", "SamplingParams", "Sequence", "generate", "step", "stream"]
