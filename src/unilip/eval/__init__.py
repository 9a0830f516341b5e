"""Evaluation: the judge of the emoji world, which no network trains (``judge``), and the runs that use it (``emoji``).

Importing this package loads neither torch nor the art; import the module that is wanted.
"""
