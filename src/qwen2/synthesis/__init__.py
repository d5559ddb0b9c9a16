"""Text that a model writes for training (report, sections 3.1 and 4.1): asked for, kept, checked.

`generator.py`, `endpoint.py`, `in_process.py` and `store.py` know nothing of what is asked; tasks,
checks and plan are those of pre-training.
"""

from qwen2.synthesis.endpoint import EndpointConfig, EndpointGenerator
from qwen2.synthesis.generator import Answer, Generator, Prompt, Sampling
from qwen2.synthesis.in_process import EngineGenerator, InProcess
from qwen2.synthesis.recipe import SynthesisRecipe
from qwen2.synthesis.run import Answerer, Outcome, synthesize
from qwen2.synthesis.store import AnswerLog, Answers

__all__ = [
    "Answer",
    "AnswerLog",
    "Answerer",
    "Answers",
    "EndpointConfig",
    "EndpointGenerator",
    "EngineGenerator",
    "Generator",
    "InProcess",
    "Outcome",
    "Prompt",
    "Sampling",
    "SynthesisRecipe",
    "synthesize",
]
