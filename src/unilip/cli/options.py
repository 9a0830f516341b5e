"""Command-line parsing: words after `unilip` -> typed options, by the table `verbs.json` and readers of values."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NoReturn

from unilip import shapes
from unilip.errors import UniLIPError
from unilip.files import read_table
from unilip.machine import PERFORMANCES
from unilip.method.config import SAMPLING_PRESETS, SOLVERS, TOKEN_PIXELS

Reader = Callable[[str], Any]  # of an option's value
Options = argparse.Namespace  # has what the entry of its verb names, and the `report` of what is done


def whole(low: int, high: int, hint: str = "") -> Callable[[str], int]:
    """Return a reader of whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limits = f"between {low} and {high}" if high < 2**31 else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}{hint}")
        return value

    return read


def number(low: float, high: float = math.inf, hint: str = "", above: bool = False) -> Callable[[str], float]:
    """Return a reader of finite numbers from `low` (or above it) to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            least = f"above {low:g}" if above else f"of at least {low:g}"
            most = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {least}{most}{hint}")
        return value

    return read


def device_name(text: str) -> str:
    """Read the name of a device; whether it is there is asked later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"there is no device {text!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    return text


def picture_size(text: str) -> tuple[int, int]:
    """Read the size of a picture that can be drawn, as it was asked for: 448x336, or 448 for a square."""
    try:
        size = shapes.parse(text)
        shapes.nearest(*size)
    except UniLIPError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return size


def pixels(text: str) -> int:
    """Read the side of a square picture: a multiple of 28."""
    side = whole(TOKEN_PIXELS, 4480)(text)
    if side % TOKEN_PIXELS:
        near = round(side / TOKEN_PIXELS) * TOKEN_PIXELS
        raise argparse.ArgumentTypeError(f"{side} is not a multiple of {TOKEN_PIXELS}; the nearest is {near}")
    return side


def origin(text: str) -> str:
    """Check an origin as browsers write it."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin; it must look like https://chat.example or be *")
    return text.lower()


TABLE: dict[str, Any] = read_table("unilip.cli", "verbs.json")
READERS: dict[str, Reader] = {reader.__name__: reader for reader in (device_name, picture_size, pixels, origin)}
READERS["pixel_count"] = whole(TOKEN_PIXELS**2, shapes.MAX_DRAWN)  # of a picture that keeps its source's shape
MAKERS: dict[str, Callable[..., Reader]] = {"whole": whole, "number": number}
PLACES = ("DIR", "FILE", "MODEL", "PATH")  # what a shell does not expand behind an equals sign: --runs=~/runs
CHOICES = {"solvers": SOLVERS, "presets": SAMPLING_PRESETS, "performances": PERFORMANCES}


def named(options: Sequence[str]) -> Iterator[str]:
    """Yield names of options, those of a group in place of "+GROUP"."""
    for name in options:
        yield from named(TABLE["groups"][name[1:]]) if name.startswith("+") else (name,)


@dataclass(frozen=True)
class Verb:
    """A verb: its function "MODULE.NAME", its number of `words`, `given` values, changes that verbs share (`like`)."""

    function: str
    usage: str
    help: str
    example: Sequence[str]
    options: Sequence[str]
    given: Sequence[str] = ()
    words: tuple[int, int | None] = (0, 0)
    like: Sequence[str] = ()
    changes: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, o: Options) -> int:
        module, _, name = self.function.partition(".")
        code: int | None = getattr(import_module(f"unilip.cli.{module}"), name)(*self.given, o)
        return code or 0

    def option(self, name: str) -> dict[str, Any]:
        """Return the arguments of `add_argument` for one of the verb's options."""
        option = dict(TABLE["options"][name])
        for changes in (*(TABLE["shared"][group] for group in self.like), self.changes):
            option |= changes.get(name, {})
        kind, choices = option.get("type"), option.get("choices")
        if option.get("metavar") in PLACES:
            option["type"] = os.path.expanduser
        elif isinstance(kind, str):
            option["type"] = READERS[kind]
        elif kind is not None:  # {"whole": {"low": 1, "high": 64}}
            option["type"] = next(MAKERS[maker](**limits) for maker, limits in kind.items())
        return option if not isinstance(choices, str) else option | {"choices": CHOICES[choices]}


VERBS = {name: Verb(**record | {"options": [*named(record["options"])]}) for name, record in TABLE["verbs"].items()}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UniLIPError(f"{message.removeprefix('argument ').rstrip('.')}; see `{self.prog} --help`.")


def make_parser(name: str, verb: Verb) -> Parser:
    """Build the parser of one verb."""
    examples = "\n".join(f"  {line}" for line in verb.example)
    parser = Parser(
        prog=f"unilip {name}",
        usage=f"unilip {name} {verb.usage}",
        description=verb.help,
        epilog=f"example{'s' if len(verb.example) > 1 else ''}:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in verb.options:
        parser.add_argument(option, **verb.option(option))
    if "--performance" in verb.options:  # which chooses the type where nobody did
        parser.set_defaults(dtype=None)
    return parser
