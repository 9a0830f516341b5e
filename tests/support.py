"""Helpers of the tests."""

from collections.abc import Callable, Iterable
from typing import Any


def failures(check: Callable[[Any], object], cases: Iterable[Any]) -> list[str]:
    """What fails when a check runs over all cases: one test with a list, in place of a test for each."""
    found = []
    for case in cases:
        try:
            check(case)
        except Exception as error:
            found.append(f"{case}: {type(error).__name__} {error}")
    return found
