"""The command line: `unilip VERB ...`, each verb a typed function of its options.

In: the words after `unilip`. Out: files, and lines on stdout (paths, answers, or one JSON object); messages
and progress on stderr. Exit codes: 0 done, 1 failed or found a difference, 2 bad input, 130 interrupted.
"""

import difflib
import errno
import io
import itertools
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from unilip import __version__
from unilip.cli.options import VERBS, Options, make_parser
from unilip.cli.terminal import Report, say
from unilip.errors import UniLIPError, install, reason

EXTRAS = {  # package -> extra of ours that brings it
    "matplotlib": "eval", "openai": "eval", "datasets": "eval", "pyarrow": "eval", "peft": "train",
    "tensorboard": "train", "webdataset": "train", "ray": "ray", "torchao": "quantize", "fastapi": "serve",
    "starlette": "serve", "pydantic": "serve", "uvicorn": "serve", "prometheus_client": "serve",
}  # fmt: skip

OTHER = "another place"
PLACES = {  # what to do about a file or folder that was named
    errno.ENAMETOOLONG: "a shorter one", errno.EACCES: OTHER, errno.EROFS: OTHER, errno.ENOTDIR: OTHER,
    errno.EISDIR: OTHER,
}  # fmt: skip


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """Return a verb's name and options. Raises UniLIPError: unknown, or out of range; SystemExit: help was printed."""
    argv = list(argv)
    plain = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    name = next((" ".join(plain[:n]) for n in (3, 2, 1) if " ".join(plain[:n]) in VERBS), None)
    if name is None:
        _help_or_complain(argv, plain)
    verb, given = VERBS[name], argv[len(name.split()) :]
    end = given.index("--") if "--" in given else len(given)  # behind it are words alone, even if they begin with -
    found, unknown = make_parser(name, verb).parse_known_intermixed_args(given[:end], Options())
    if unknown:
        hint = did_you_mean(unknown[0].partition("=")[0], verb.options)
        raise UniLIPError(f"unrecognized arguments: {' '.join(unknown)}.{hint} See `unilip {name} --help`.")
    found.words = [*found.words, *given[end + 1 :]]
    least, most = verb.words
    if not least <= len(found.words) <= (math.inf if most is None else most):
        told = f"{len(found.words)} were given: {' '.join(found.words)}" if found.words else "nothing was given"
        loose = [word for word in found.words if "=" in word and "--set" in argv]
        hint = f" Each setting has a --set of its own: --set {' --set '.join(loose)}." if loose else ""
        raise UniLIPError(f"`unilip {name} {verb.usage}` is how it works, but {told}.{hint}")
    return name, found


def _help_or_complain(argv: list[str], plain: list[str]) -> NoReturn:
    if "--version" in argv[:1]:
        print(f"unilip {__version__}")
        raise SystemExit(0)
    prefix = next((plain[:n] for n in range(len(plain), -1, -1) if _below(plain[:n])), [])
    names, rest = _below(prefix), plain[len(prefix) :]
    if not rest and ({"-h", "--help"} & set(argv) or not argv):
        width = max(len(name) for name in names)
        print(f"usage: unilip {' '.join([*prefix, 'VERB'])} [OPTIONS]\n")
        print("One CLIP encoder that understands, reconstructs, generates and edits.\n")
        print("\n".join(f"  {name:<{width}}  {VERBS[name].help.split('. ')[0].rstrip('.')}" for name in names))
        print("\n`unilip VERB --help` tells the options and gives an example; `unilip --version` the version.")
        raise SystemExit(0)
    if not rest and prefix:
        raise UniLIPError(f"The verbs there are: {', '.join(names)}.")
    given = " ".join([*prefix, *(rest or argv)[:1]])
    hint = did_you_mean(given, [*names, *{name.split()[0] for name in names}])
    raise UniLIPError(f"There is no verb {given!r}.{hint} All of them: {', '.join(names)}.")


def did_you_mean(given: str, names: Sequence[str]) -> str:
    """Return a sentence that asks for the name nearest to what was given; empty where none is near."""
    near = difflib.get_close_matches(given, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _below(words: list[str]) -> list[str]:
    """Return the verbs that begin with these words, and have more."""
    return [name for name in VERBS if name.startswith(" ".join(words) + " ") or not words]


class Speaker(logging.Handler):
    """Shows the library's log to the person."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def set_up(debug: bool) -> None:
    """Let our own log through, and silence what other libraries say unless it is wanted."""
    logger = logging.getLogger("unilip")
    if not any(isinstance(handler, Speaker) for handler in logger.handlers):
        logger.addHandler(Speaker())
    logger.setLevel(logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for name in ("torchao", "torch.utils._pytree"):  # optional kernels that do not load, deprecations within
            logging.getLogger(name).setLevel(logging.ERROR)


def explain(error: Exception) -> tuple[str, int]:
    """Turn an error into one line and an exit code."""
    text = reason(error)
    full = os.strerror(errno.ENOSPC) in text
    if isinstance(error, UniLIPError):
        return text, 1 if full else 2
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "memory ran out; try a smaller --batch-size or picture, --dtype bfloat16, or another --device.", 1
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        how = install(extra) if extra else f"install it with pip install {error.name}"
        return f"the package {error.name} is missing; {how}.", 1
    if isinstance(error, OSError) and error.filename and error.errno in PLACES:
        name = str(error.filename)
        return f"{error.strerror}: {name[:200]}{'...' if name[200:] else ''}; give {PLACES[error.errno]}.", 2
    if isinstance(error, OSError) and error.strerror:
        advice = "make room, and give the same command again" if full else "--debug shows where"
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}; {advice}.", 1
    return f"unexpected {type(error).__name__}: {text[:300]}; --debug shows where it happened.", 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    for closed in (one for one in ("stdin", "stdout", "stderr") if getattr(sys, one) is None):  # by who called
        setattr(sys, closed, open(os.devnull, "r" if closed == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the locale lacks ends no work that is half done
    try:
        name, found = parse(argv)
        set_up(debug)
        found.report = Report(name, getattr(found, "json", False))
        return VERBS[name].run(found)
    except SystemExit as stop:  # help was asked for, or a training was interrupted
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        line, code = explain(error)
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        say(f"error{' in process ' + os.environ.get('RANK', '?') if several else ''}: {line}")
        return code
