"""Evaluation of a model on files, benchmarks and the paper's claims; that of the emoji world is in ``unilip.emoji``.

Importing this package loads neither torch nor a model; import the module that is wanted.
"""
