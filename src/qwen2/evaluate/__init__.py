"""Evaluation: how well a model predicts text."""

from qwen2.evaluate.score import Score, score_text

__all__ = ["Score", "score_text"]
