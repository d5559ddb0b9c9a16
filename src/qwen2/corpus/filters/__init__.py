"""Heuristic filters: editors (text to text), measures (texts to numbers), rules (to decisions)."""

from qwen2.corpus.filters.c4 import C4Lines, keep_lines
from qwen2.corpus.filters.calibration import (
    Calibrated,
    CalibrationConfig,
    Evidence,
    calibrate,
    with_limits,
)
from qwen2.corpus.filters.code import licence, without_licence_header
from qwen2.corpus.filters.defaults import CODE_RULES, TEXT_RULES
from qwen2.corpus.filters.measures import (
    CODE_STATISTICS,
    TEXT_STATISTICS,
    measure_code,
    measure_text,
)
from qwen2.corpus.filters.pii import PII, Find, find, mask
from qwen2.corpus.filters.rules import Failure, Limits, Rule, Rules
from qwen2.corpus.filters.sets import FilterSet
from qwen2.corpus.filters.unicode import repair

__all__ = [
    "CODE_RULES",
    "CODE_STATISTICS",
    "PII",
    "TEXT_RULES",
    "TEXT_STATISTICS",
    "C4Lines",
    "Calibrated",
    "CalibrationConfig",
    "Evidence",
    "Failure",
    "FilterSet",
    "Find",
    "Limits",
    "Rule",
    "Rules",
    "calibrate",
    "find",
    "keep_lines",
    "licence",
    "mask",
    "measure_code",
    "measure_text",
    "repair",
    "with_limits",
    "without_licence_header",
]
