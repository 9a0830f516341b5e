"""Evaluation of a model on files, benchmarks and the paper's claims; that of the emoji world is in ``unilip.emoji``."""
