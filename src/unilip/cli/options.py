"""Command-line parsing: words after `unilip` -> typed options; readers of values, shared options, and what a verb is.

A module of verbs has a table `VERBS` and, for options of its own, a table `OPTIONS`; the package puts them together.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from unilip import shapes
from unilip.errors import UniLIPError
from unilip.method.config import QUANTIZATIONS, SAMPLING_PRESETS, SOLVERS, TOKEN_PIXELS

DTYPES = ("float32", "bfloat16", "float16", "auto")
Options = argparse.Namespace  # has what the entry of its verb in `VERBS` names


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


OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(metavar="MODEL", help="a folder, a file or a hub id (owner/name); the embedded model by default"),
    "--adapter": dict(
        action="append", default=[], metavar="PATH[:SCALE]",
        help="a LoRA or DoRA adapter, how strongly it acts (1 as trained); repeatable, several add up",
    ),
    "--device": dict(
        type=device_name, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (auto: CUDA, MPS or CPU)"
    ),
    "--dtype": dict(
        choices=DTYPES, default="float32",
        help="of the weights in memory; auto is what is stored, where that is faster (float32)",
    ),
    "--seed": dict(
        type=whole(0, 2**63 - 1), default=0, metavar="N",
        help="picture i of a prompt uses seed N + i, whatever the batch size: same seed, same picture (0)",
    ),
    "--output": dict(
        metavar="PATH",
        help="a .png, .jpg or .webp file for one picture, or a folder (made if new) for any number; without it free "
        "names in the current folder. A file is overwritten only with --force",
    ),
    "--force": dict(action="store_true", help="overwrite what is there"),
    "--steps": dict(type=whole(1, 1000, " (20 is usual)"), metavar="N", help="sampling steps (the model's own)"),
    "--guidance-scale": dict(
        type=number(0, hint=" (1 switches guidance off)"), metavar="G",
        help="how far to follow the words; 1 is off and twice as fast (the model's own)",
    ),
    "--solver": dict(choices=SOLVERS, help="sampling method (the model's own)"),
    "--plan": dict(
        choices=("auto", "yes", "no"), default="auto",
        help="let the language model write the prompt out first, and draw that; auto: if it was trained for it (auto)",
    ),
    "--preset": dict(
        choices=SAMPLING_PRESETS, default="quality",
        help="quality samples as published; balanced and fast take fewer steps and lose a little; turbo jumps, with a "
        "model that was trained for it (quality)",
    ),
    "--compile": dict(
        action="store_true", help="compile what runs often: slow once, then faster; for many pictures of one size"
    ),
    "--low-memory": dict(
        action="store_true",
        help="hold one part of the model at a time, and decode picture by picture, in strips; the same pictures, later",
    ),
    "--quantize": dict(
        choices=QUANTIZATIONS, help="keep the weights of linear layers in few bits; needs the package torchao"
    ),
    "--best-of": dict(
        type=whole(1, 64), default=1, metavar="N",
        help="draw N for each picture and keep the one that the model itself likes best; costs N times as much (1)",
    ),
    "--decoder": dict(
        metavar="PATH", help="another pixel decoder: a folder, or small: the one beside the weights (the model's own)"
    ),
    "--negative-prompt": dict(metavar="TEXT", help="what guidance moves away from"),
    "--num-images": dict(type=whole(1, 10_000), default=1, metavar="N", help="pictures of each prompt (1)"),
    "--batch-size": dict(
        type=whole(1, 4096), default=4, metavar="N", help="how many at once: speed and memory, not results (4)"
    ),
    "--size": dict(
        type=picture_size, metavar="WxH",
        help="width and height, or the side of a square; rounded to multiples of 28 (the model's own square)",
    ),
    "--fit": dict(
        choices=("resize", "crop", "pad"), default="resize",
        help="how a picture gets its size: stretched, its centre cut out, or with a white border; the last two make a "
        "square where no size is given (resize)",
    ),
    "--keep-aspect": dict(action="store_true", help="give the result exactly the shape of the source again"),
    "--prompts": dict(
        metavar="FILE",
        help='a prompt a line, or JSON lines {"prompt": ..., "image": ..., "seed": ...}; - is stdin',
    ),
    "--together": dict(action="store_true", help="one question about all the images, not one about each"),
    "--max-new-tokens": dict(type=whole(1, 100_000), default=128, metavar="N", help="longest answer (128)"),
    "--temperature": dict(type=number(0), default=0.0, metavar="T", help="0 gives the likeliest answer (0)"),
    "--top-p": dict(type=number(0, 1, above=True), default=1.0, metavar="P", help="sample the likeliest share P (1)"),
    "--max-tiles": dict(
        type=whole(1, 64), default=1, metavar="N", help="read large pictures as up to N squares and a thumbnail (1)"
    ),
    "--ray": dict(type=whole(1, 10_000), metavar="N", help="N Ray workers, here or in the cluster of RAY_ADDRESS"),
    "--no-metadata": dict(
        action="store_false", dest="metadata", help="do not write model, prompt, seed and settings into PNG files"
    ),
    "--no-progress": dict(action="store_false", dest="progress", help="no progress bars"),
    "--json": dict(action="store_true", help="print one JSON object: paths or answers, settings, seconds"),
    "--debug": dict(action="store_true", help="show warnings, and the traceback of an error"),
}  # fmt: skip

LOADING = ("--model", "--device", "--dtype")
SAVING = ("--adapter", "--low-memory", "--quantize")
SAMPLING = ("--preset", "--steps", "--guidance-scale", "--solver", "--negative-prompt")
DRAWING = (*SAMPLING, "--num-images", "--batch-size", "--size")
WRITING = ("--output", "--force", "--no-metadata")
TELLING = ("--no-progress", "--json", "--debug")


@dataclass(frozen=True)
class Verb:
    """A verb: its function, what it says of itself, which options it takes, and where these differ from the rest."""

    run: Callable[[Options], int]
    usage: str
    help: str
    example: str
    options: tuple[str, ...]
    words: tuple[int, float] = (0, 0)
    changes: Mapping[str, dict[str, Any]] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UniLIPError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`.")


def make_parser(name: str, verb: Verb, known: Mapping[str, dict[str, Any]]) -> Parser:
    """Build the parser of one verb, whose options are among `known`."""
    examples = "\n".join(f"  {line}" for line in verb.example.splitlines())
    parser = Parser(
        prog=f"unilip {name}",
        usage=f"unilip {name} {verb.usage}",
        description=verb.help,
        epilog=f"example{'s' if len(verb.example.splitlines()) > 1 else ''}:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in verb.options:
        parser.add_argument(option, **(known[option] | verb.changes.get(option, {})))
    return parser
