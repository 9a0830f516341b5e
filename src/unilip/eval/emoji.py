"""The evaluation in the emoji world is ``unilip.emoji.score``; this is its former name."""

from unilip.emoji.score import evaluate

__all__ = ["evaluate"]
