"""`qwen2 quickstart`: the report in miniature, on the real text of this machine.

collect -> tokenizer -> shards -> pre-train -> long context -> upcycle -> evaluate -> export -> talk
-> report. Each stage is a function of the run and leaves files in the run's folder.
"""

from qwen2.pipeline.quickstart.recipe import QuickRun, QuickstartRecipe
from qwen2.pipeline.quickstart.stages import STAGES, terminal_summary

__all__ = ["STAGES", "QuickRun", "QuickstartRecipe", "terminal_summary"]
