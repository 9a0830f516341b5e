"""Errors that a user can cause and mend: `UniLIPError`, with what was given, what is allowed and what to do.

The command line turns one into exit code 2, the server into a 4xx. Programming mistakes stay `TypeError` and the like.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

LARGEST = 3e38  # of float32


class UniLIPError(ValueError):
    """Bad input: the message names the value, the allowed values and the remedy."""


class CheckpointError(UniLIPError):
    """A checkpoint is missing, truncated, of the wrong kind, or does not fit the model."""


class ConfigError(UniLIPError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class ImageError(UniLIPError):
    """An image cannot be read or has an impossible size."""


class PromptError(UniLIPError):
    """A prompt is empty, too long, or the tokenizer lacks the special tokens that it needs."""


class DataError(UniLIPError):
    """Data are missing or broken; or a world, task or edit was asked for that does not exist."""


def install(extra: str) -> str:
    """Return how to get an extra of this package, which is in no index: the words that end every such message."""
    return f"install it with pip install '.[{extra}]' in a checkout of UniLIP"


def reason(error: BaseException, most: int | None = None) -> str:
    """Return what an error says on one line, in so many characters at most; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


Kind = type[UniLIPError]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return which values are others there than they are here, in words; empty: none."""

    def told(old: Any, new: Any) -> str:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return f": {differences(old, dict.fromkeys(old) | dict(new))}"
        return f" ({old} there, {new} here)"

    return ", ".join(f"{k}{told(there.get(k), v)}" for k, v in here.items() if there.get(k) != v)


def check_choice(what: str, value: object, allowed: Iterable[str], kind: Kind = UniLIPError) -> None:
    """Raise an error of a kind where a value, of whatever type, is none of the texts allowed."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise kind(f"There is no {what} {value!r}; allowed: {', '.join(names)}.")


def check_number(
    name: str, value: Any, least: float, most: float = math.inf, *, whole: bool = False, kind: Kind = UniLIPError
) -> Any:
    """Return a number in range. Raises an error of a kind: no number, no whole one where asked for, or out of range."""
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
        raise kind(f"{name} is {value!r}; it must be a {'whole ' * whole}number.")
    if not least <= number <= most or abs(number) > LARGEST:
        allowed = f"at least {least:.12g}" if math.isinf(most) else f"between {least:.12g} and {most:.12g}"
        raise kind(f"{name} is {value!r}; it must be {'' if whole else 'a number '}{allowed}.")
    return number if whole or abs(number) < 2**63 else float(number)  # torch takes no longer ones


def check_flag(name: str, value: Any) -> bool:
    """Return True or False, or say what was given instead."""
    flag = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if not isinstance(flag, bool):
        raise UniLIPError(f"{name} is {value!r}; it must be True or False.")
    return flag
