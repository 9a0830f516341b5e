"""The command line: `unilip VERB ...`, each verb a typed function of its options.

Goes in: the words after `unilip`. Comes out: files, and lines on stdout (paths, answers, or one JSON object); messages
and progress on stderr. Exit codes: 0 done, 1 failed or found a difference, 2 bad input, 130 interrupted.
Heavy libraries are imported inside the functions that need them, after what can be checked without them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from unilip import __version__
from unilip.config import SOLVERS, TOKEN_PIXELS
from unilip.errors import UniLIPError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from unilip.model import UniLIP

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DTYPES = ("float32", "bfloat16", "float16", "auto")


# --- reading the words ----------------------------------------------------------------------------------------------


class Options(argparse.Namespace):
    """Every option with its type; a verb has those that its entry in `VERBS` names."""

    words: list[str]
    model: str | None
    device: str
    dtype: str | None
    seed: int
    output: str | None
    force: bool
    steps: int | None
    guidance_scale: float | None
    solver: str | None
    negative_prompt: str | None
    num_images: int
    batch_size: int
    image_size: int | None
    fit: str
    keep_aspect: bool
    prompts: str | None
    together: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    max_tiles: int
    metadata: bool
    progress: bool
    json: bool
    debug: bool
    listing: bool
    runs: str
    settings: list[str]
    restart: bool
    stop_after: int | None
    to: str
    max_shard_size: str
    tolerance: float
    source: str | None
    count: int | None
    seeds: int | None
    parts: str | None
    world: str | None


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


def pixels(text: str) -> int:
    """Read the side of a square picture: a multiple of 28."""
    side = whole(TOKEN_PIXELS, 4480)(text)
    if side % TOKEN_PIXELS:
        near = round(side / TOKEN_PIXELS) * TOKEN_PIXELS
        raise argparse.ArgumentTypeError(f"{side} is not a multiple of {TOKEN_PIXELS}; the nearest is {near}")
    return side


OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(metavar="MODEL", help="a folder, a file or a hub id (owner/name); the embedded model by default"),
    "--device": dict(
        type=device_name, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (auto: CUDA, MPS or CPU)"
    ),
    "--dtype": dict(
        choices=DTYPES, default="float32", help="of the weights in memory; auto is what the checkpoint stores (float32)"
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
    "--negative-prompt": dict(metavar="TEXT", help="what guidance moves away from"),
    "--num-images": dict(type=whole(1, 10_000), default=1, metavar="N", help="pictures of each prompt (1)"),
    "--batch-size": dict(
        type=whole(1, 4096), default=4, metavar="N", help="how many at once: speed and memory, not results (4)"
    ),
    "--image-size": dict(
        type=pixels, metavar="PX", help=f"side of the square, a multiple of {TOKEN_PIXELS} (the model's own)"
    ),
    "--fit": dict(
        choices=("resize", "crop", "pad"), default="resize",
        help="how a picture becomes square: stretched, its centre cut out, or with a white border (resize)",
    ),
    "--keep-aspect": dict(action="store_true", help="give the result the shape of the source again"),
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
    "--no-metadata": dict(
        action="store_false", dest="metadata", help="do not write model, prompt, seed and settings into PNG files"
    ),
    "--no-progress": dict(action="store_false", dest="progress", help="no progress bars"),
    "--json": dict(action="store_true", help="print one JSON object: paths or answers, settings, seconds"),
    "--debug": dict(action="store_true", help="show warnings, and the traceback of an error"),
    "--list": dict(action="store_true", dest="listing", help="list the recipes"),
    "--runs": dict(default="runs", metavar="DIR", help="folder of all runs; this one writes to DIR/RECIPE (runs)"),
    "--set": dict(
        action="append", default=[], dest="settings", metavar="NAME=VALUE", help="change a setting; repeatable"
    ),
    "--restart": dict(action="store_true", help="begin anew, even where checkpoints exist"),
    "--stop-after": dict(type=whole(1, 2**31 - 1), metavar="N", help="save and stop after N more steps"),
    "--to": dict(choices=("unilip", "authors"), default="unilip", help="format to write (unilip)"),
    "--max-shard-size": dict(default="5GB", metavar="SIZE", help="split the weights into files of this size (5GB)"),
    "--tolerance": dict(type=number(0), default=1e-4, metavar="E", help="largest absolute error allowed (1e-4)"),
    "--source": dict(metavar="DIR", help="folder of the three npm packages; without it npm fetches them"),
    "--count": dict(type=whole(1, 100_000), metavar="N", help="prompts of each task and kind of edit (12)"),
    "--seeds": dict(type=whole(1, 1000), metavar="N", help="pictures of each prompt (4)"),
    "--parts": dict(metavar="NAMES", help="of recon,vqa,gen,edit,riddle, with commas between (all that the model can)"),
    "--world": dict(metavar="NAME", help="pico, nano or tiny (the one with the model's picture size)"),
}  # fmt: skip

LOADING = ("--model", "--device", "--dtype")
SAMPLING = ("--steps", "--guidance-scale", "--solver", "--negative-prompt")
DRAWING = (*SAMPLING, "--num-images", "--batch-size", "--image-size")
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


def make_parser(name: str, verb: Verb) -> Parser:
    """Build the parser of one verb."""
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
        parser.add_argument(option, **(OPTIONS[option] | verb.changes.get(option, {})))
    return parser


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """Return the name of the verb that the words call, and its options.

    Raises:
        UniLIPError: there is no such verb or option, or a value out of range.
        SystemExit: help or the version was asked for and printed.
    """
    argv = list(argv)
    plain = []
    for word in argv:
        if word.startswith("-"):
            break
        plain.append(word)
    name = next((" ".join(plain[:n]) for n in (3, 2, 1) if " ".join(plain[:n]) in VERBS), None)
    if name is None:
        _help_or_complain(argv, plain)
    verb = VERBS[name]
    options = make_parser(name, verb).parse_intermixed_args(argv[len(name.split()) :], Options())
    least, most = verb.words
    if not least <= len(options.words) <= most:
        given = f"{len(options.words)} were given" if options.words else "nothing was given"
        raise UniLIPError(f"`unilip {name} {verb.usage}` is how it works, but {given}.")
    return name, options


def _help_or_complain(argv: list[str], plain: list[str]) -> NoReturn:
    group = [name for name in VERBS if plain and name.startswith(" ".join(plain) + " ")]
    if "--version" in argv[:1]:
        print(f"unilip {__version__}")
        raise SystemExit(0)
    if {"-h", "--help"} & set(argv) or not argv:
        names = group or list(VERBS)
        if plain and not group:
            raise UniLIPError(_no_verb(plain))
        width = max(len(name) for name in names)
        print(f"usage: unilip {' '.join([*plain, 'VERB'])} [OPTIONS]\n")
        print("One CLIP encoder that understands, reconstructs, generates and edits.\n")
        print("\n".join(f"  {name:<{width}}  {VERBS[name].help.split('. ')[0].rstrip('.')}" for name in names))
        print("\n`unilip VERB --help` tells the options and gives an example; `unilip --version` the version.")
        raise SystemExit(0)
    raise UniLIPError(f"The verbs there are: {', '.join(group)}." if group else _no_verb(plain or argv))


def _no_verb(words: list[str]) -> str:
    near = difflib.get_close_matches(words[0], VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no verb {words[0]!r}.{hint} All of them: {', '.join(VERBS)}."


# --- what to work on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One thing to do: words, the picture they are about, if any, and the seed of the first result."""

    text: str
    image: str | None
    seed: int


def read_prompts(name: str) -> list[dict[str, Any]]:
    """Read a file of prompts: a prompt a line, or JSON objects a line; `-` is standard input.

    Raises:
        UniLIPError: no such file, no prompt in it, or a line that cannot be understood.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UniLIPError(f"--prompts {name} cannot be read ({_reason(error)}); give a UTF-8 text file.") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UniLIPError(f"--prompts {name} holds no prompt; write one on each line.")
    if not lines[0][1].startswith("{"):
        return [{"prompt": line} for _, line in lines]
    entries = []
    for i, line in lines:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UniLIPError(f"{name}, line {i} is not JSON ({error}); write one object on each line.") from error
        kinds = {"prompt": str, "image": str, "seed": int}
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UniLIPError(f'{name}, line {i} has no "prompt"; write {{"prompt": "..."}}.')
        wrong = [k for k, v in entry.items() if k not in kinds or type(v) is not kinds[k]]
        if wrong or entry.get("seed", 0) < 0:
            what = ", ".join(wrong) or "seed"
            raise UniLIPError(
                f"{name}, line {i}: {what} is not understood; allowed: prompt, image (texts), seed (>= 0)."
            )
        entries.append(entry)
    return entries


def requests(o: Options, what: str, image: str) -> list[Request]:
    """Turn words and --prompts into requests, and check every text and picture before any model is loaded.

    `what` is what a text is called; `image` says whether a picture is "never", "maybe" or "always" part of a request.
    """
    if o.prompts is not None:
        if image == "never" and o.words:
            raise UniLIPError("A prompt and --prompts FILE were given; give one of them, not both.")
        images, entries = o.words, read_prompts(o.prompts)
    elif not o.words:
        raise UniLIPError(f"There is no {what}; say in words what you want, or give --prompts FILE.")
    elif image == "never":
        images, entries = [], [{"prompt": " ".join(o.words)}]
    else:
        images, entries = o.words[:-1], [{"prompt": o.words[-1]}]
        if os.path.isfile(o.words[-1]):
            raise UniLIPError(f"There is no {what} behind {o.words[-1]}; give it last, in quotes.")
    from unilip.preprocess import check_prompt, load_image

    found = []
    for entry in entries:
        text = check_prompt(entry["prompt"], what)
        own = [entry["image"]] if "image" in entry else images
        if own and image == "never":
            raise UniLIPError("A prompt of `unilip generate` takes no image; use `unilip edit` to change one.")
        if not own and image == "always":
            raise UniLIPError(f"There is no image; give at least one before the {what}.")
        found += [Request(text, path, entry.get("seed", o.seed)) for path in own or [None]]
    for path in dict.fromkeys(request.image for request in found if request.image is not None):
        load_image(path)
    return found


def slug(text: str) -> str:
    """Make a short file name of a text."""
    return re.sub(r"\W+", "-", text.lower()).strip("-_")[:48].rstrip("-_") or "picture"


# --- where results go -----------------------------------------------------------------------------------------------


class Destination:
    """Where pictures go: a named file, or a folder in which free names are taken. Files appear whole or not at all."""

    def __init__(self, output: str | None, force: bool, count: int) -> None:
        self.force = force
        self.file: Path | None = None
        self.written: list[Path] = []
        path = Path(output or ".").expanduser()
        if path.is_dir() or (output and (output.endswith(("/", os.sep)) or not path.suffix)):
            self.folder = path
        elif path.suffix.lower() not in FORMATS:
            raise UniLIPError(f"{path} has an unknown ending; allowed: {', '.join(FORMATS)}, or a folder.")
        elif count > 1:
            raise UniLIPError(f"{path} is one file, but {count} pictures will be made; give a folder as --output.")
        else:
            self.folder, self.file = path.parent, path
        if self.file is not None and self.file.exists() and not force:
            raise UniLIPError(f"{path} exists already; give another --output, or --force to overwrite it.")
        if self.folder.exists() and not self.folder.is_dir():
            raise UniLIPError(f"{self.folder} is a file, not a folder; give another --output.")
        base = self.folder if self.folder.exists() or self.file else self.folder.absolute().parent
        if not base.is_dir():
            raise UniLIPError(
                f"There is no folder {base} to write {path.name} to; make it first with `mkdir -p {base}`."
            )
        if not os.access(base, os.W_OK):
            raise UniLIPError(f"The folder {base} cannot be written to; give another --output.")

    def write(self, image: Image.Image, stem: str, texts: Mapping[str, str]) -> Path:
        """Write a picture under the name asked for, or under the first free one of stem.png, stem-2.png, ..."""
        from PIL.PngImagePlugin import PngInfo

        self.folder.mkdir(exist_ok=True)
        suffix = self.file.suffix.lower() if self.file else ".png"
        temporary = self.folder / f".unilip-{os.getpid()}{suffix}.part"
        try:
            if suffix == ".png":
                info = PngInfo()
                for key, value in texts.items():
                    info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
                image.save(temporary, "PNG", pnginfo=info)
            else:
                image.save(temporary, FORMATS[suffix], quality=95)
            path = self._publish(temporary, stem)
        finally:
            temporary.unlink(missing_ok=True)
        self.written.append(path)
        return path

    def _publish(self, temporary: Path, stem: str) -> Path:
        for i in range(1, 1_000_000):
            target = self.file or self.folder / f"{stem}{f'-{i}' if i > 1 else ''}.png"
            if self.force and target not in self.written:
                os.replace(temporary, target)
                return target
            try:
                os.link(temporary, target)  # unlike a rename this fails where a file is, however it got there
                return target
            except FileExistsError:
                if self.file:
                    raise UniLIPError(f"{target} has appeared meanwhile; give another --output, or --force.") from None
            except OSError:  # a file system without hard links
                if not target.exists():
                    os.replace(temporary, target)
                    return target
        raise UniLIPError(f"{self.folder} has no free name left for {stem}.png; give another --output.")


class Report:
    """Tells what was done: line by line for people and pipes, or as one JSON object at the end."""

    def __init__(self, o: Options, verb: str) -> None:
        self.as_json = o.json
        self.record: dict[str, Any] = {"verb": verb}
        self.started = time.perf_counter()

    def line(self, text: str) -> None:
        """Print a result."""
        if not self.as_json:
            print(text, flush=True)

    def end(self, note: str = "", **more: Any) -> None:
        """Print the JSON object, or a last remark on stderr."""
        seconds = time.perf_counter() - self.started
        if self.as_json:
            print(json.dumps({**self.record, **more, "seconds": round(seconds, 3)}, ensure_ascii=False))
        elif note:
            say(f"{note} in {seconds:.1f} s")


def say(message: str) -> None:
    """Tell the person something that is no result."""
    print(f"unilip: {message}", file=sys.stderr, flush=True)


# --- the model ------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> str:
    """Return a device that is there.

    Raises:
        UniLIPError: the one asked for is not.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if gpus else "mps" if mps else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus:
        have = f"has {gpus} CUDA device{'s' if gpus > 1 else ''}, numbered from 0" if gpus else "offers no CUDA device"
        raise UniLIPError(f"--device {name}: PyTorch {have} here; use --device cpu, or auto.")
    if name == "mps" and not mps:
        raise UniLIPError("--device mps: PyTorch offers no Apple GPU here; use --device cpu, or auto.")
    return name


def load(o: Options, *parts: str) -> UniLIP:
    """Load the model that the options name, or only some of its parts."""
    device = choose_device(o.device)
    from unilip.model import UniLIP

    return UniLIP.from_pretrained(o.model, device=device, dtype=o.dtype, parts=parts or None)


def describe_model(o: Options, model: UniLIP) -> dict[str, str]:
    """Name a model as reports and metadata do."""
    name = f"embedded ({model.config.name})" if o.model is None else o.model
    return {"model": name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same everywhere."""
    import torch

    return torch.Generator().manual_seed(seed)


def sampling(o: Options, model: UniLIP) -> dict[str, Any]:
    """The settings of `generate` and `edit`, the model's own where none are given."""
    own = model.config.sampling
    return {
        "num_inference_steps": own.num_inference_steps if o.steps is None else o.steps,
        "guidance_scale": own.guidance_scale if o.guidance_scale is None else o.guidance_scale,
        "solver": own.solver if o.solver is None else o.solver,
        "negative_prompt": o.negative_prompt,
        "image_size": o.image_size or model.config.image_size,
    }


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Cut a sequence into pieces of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


def paint(
    o: Options, report: Report, model: UniLIP, work: Sequence[Request], out: Destination,
    draw: Callable[[Sequence[Request], dict[str, Any]], Sequence[Any]],
) -> int:  # fmt: skip
    """Draw the pictures of all requests in batches, write each as soon as it is there, and report."""
    settings, about = sampling(o, model), describe_model(o, model)
    report.record |= {**about, "settings": settings}
    made = []
    for batch in batches(work, o.batch_size):
        for request, image in zip(batch, draw(batch, settings), strict=True):
            named = {"prompt": request.text, "seed": request.seed} | ({"image": request.image} if request.image else {})
            texts = {"Software": f"unilip {__version__}", "model": about["model"], **named, **settings}
            stem = f"{Path(request.image).stem}-{slug(request.text)}" if request.image else slug(request.text)
            kept = {key: str(value) for key, value in texts.items() if value is not None} if o.metadata else {}
            path = out.write(image, f"{stem}-{request.seed}", kept)
            made.append({"path": str(path), **named})
            report.line(str(path))
    steps = settings["num_inference_steps"]
    report.end(f"{plural(len(made), 'picture')} of {plural(steps, 'step')}", images=made)
    return 0


def plural(count: int, noun: str) -> str:
    """Return "1 picture", "2 pictures"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def each_image(o: Options, found: Sequence[Request]) -> list[Request]:
    """Repeat every request --num-images times, with seeds that count up."""
    return [Request(r.text, r.image, r.seed + i) for r in found for i in range(o.num_images)]


def check_negative(o: Options) -> None:
    """Complain about a negative prompt before the model is loaded."""
    if o.negative_prompt is not None:
        from unilip.preprocess import check_prompt

        check_prompt(o.negative_prompt, "negative prompt")


# --- the verbs ------------------------------------------------------------------------------------------------------


def generate(o: Options) -> int:
    """Draw pictures from words."""
    report = Report(o, "generate")
    work = each_image(o, requests(o, "prompt", "never"))
    check_negative(o)
    out = Destination(o.output, o.force, len(work))
    model = load(o, "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Sequence[Request], settings: dict[str, Any]) -> Sequence[Any]:
        generators = [seeded(r.seed) for r in batch]
        texts = [r.text for r in batch]
        images: list[Any] = model.generate(texts, generator=generators, progress=o.progress, **settings).images
        return images

    return paint(o, report, model, work, out, draw)


def edit(o: Options) -> int:
    """Change pictures as told."""
    report = Report(o, "edit")
    work = each_image(o, requests(o, "instruction", "always"))
    check_negative(o)
    out = Destination(o.output, o.force, len(work))
    model = load(o, "encoder", "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Sequence[Request], settings: dict[str, Any]) -> Sequence[Any]:
        sources = [r.image or "" for r in batch]
        images: list[Any] = model.edit(
            sources, [r.text for r in batch], generator=[seeded(r.seed) for r in batch], progress=o.progress,
            fit=o.fit, keep_aspect=o.keep_aspect, **settings,  # type: ignore[arg-type]
        ).images  # fmt: skip
        return images

    return paint(o, report, model, work, out, draw)


def reconstruct(o: Options) -> int:
    """Encode pictures and draw them again from their features."""
    report = Report(o, "reconstruct")
    from unilip.preprocess import fit_square, load_image, unfit_square

    for word in o.words:
        load_image(word)
    out = Destination(o.output, o.force, len(o.words))
    model = load(o, "encoder", "latent_head", "pixel_decoder")
    from unilip.demo import psnr

    size = o.image_size or model.config.image_size
    about = describe_model(o, model)
    report.record |= {**about, "settings": {"image_size": size, "fit": o.fit, "keep_aspect": o.keep_aspect}}
    made = []
    for batch in batches(o.words, o.batch_size):
        sources = [load_image(word) for word in batch]
        squares = [fit_square(source, size, o.fit) for source in sources]  # type: ignore[arg-type]
        for word, source, square, image in zip(
            batch, sources, squares, model.reconstruct(squares, image_size=size).images, strict=True
        ):
            score = psnr(square, image)
            texts = {"Software": f"unilip {__version__}", "model": about["model"], "image": word} if o.metadata else {}
            shaped = unfit_square(image, source.size, o.fit) if o.keep_aspect else image  # type: ignore[arg-type]
            path = out.write(shaped, f"{Path(word).stem}-reconstructed", texts)
            made.append({"path": str(path), "image": word, "psnr": round(score, 3) if math.isfinite(score) else None})
            report.line(str(path))
    mean = sum(entry["psnr"] or 0.0 for entry in made) / len(made)
    report.end(f"{plural(len(made), 'picture')}, PSNR {mean:.2f} dB,", images=made)
    return 0


def ask(o: Options) -> int:
    """Answer questions about pictures, or without any."""
    report = Report(o, "ask")
    found = requests(o, "question", "maybe")
    groups: list[tuple[list[str], Request]] = [([r.image] if r.image else [], r) for r in found]
    if o.together:
        seen: dict[str, list[str]] = {}
        for request in found:
            seen.setdefault(request.text, []).extend([request.image] if request.image else [])
        groups = [(images, Request(text, None, o.seed)) for text, images in seen.items()]
    model = load(o, "encoder", "mllm")
    choices = {
        "max_new_tokens": o.max_new_tokens,
        "temperature": o.temperature,
        "top_p": o.top_p,
        "max_tiles": o.max_tiles,
    }
    report.record |= {**describe_model(o, model), "settings": choices}
    if len(groups) == 1 and not o.json:
        images, request = groups[0]
        for piece in model.ask(images, request.text, generator=seeded(request.seed), stream=True, **choices):  # type: ignore[arg-type]
            print(piece, end="", flush=True)
        print()
        return 0
    answers: list[dict[str, Any]] = []
    for batch in batches(groups, 1 if o.temperature else o.batch_size):  # one generator serves one question
        pictures, texts = [images for images, _ in batch], [request.text for _, request in batch]
        generator = seeded(batch[0][1].seed)
        for (images, request), answer in zip(
            batch, model.ask(pictures, texts, generator=generator, **choices), strict=True  # type: ignore[arg-type]
        ):  # fmt: skip
            answers.append({"images": images, "question": request.text, "answer": answer})
            report.line("\t".join([",".join(images) or "-", request.text, answer]))
    report.end(answers=answers)
    return 0


def train(o: Options) -> int:
    """Run a training recipe, or go on with it."""
    from unilip.train.recipe import override
    from unilip.train.recipes import all_recipes, get_recipe

    if o.listing:
        return list_recipes(o, all_recipes().values())
    if not o.words:
        raise UniLIPError("There is no recipe; give its name, or --list to see them all.")
    recipe = override(get_recipe(o.words[0]), o.settings)
    report = Report(o, "train")
    device = choose_device(o.device)
    from unilip.train import loop

    try:
        folder = loop.train(
            recipe, o.runs, device=device, restart=o.restart, progress=o.progress, stop_after=o.stop_after
        )
    except loop.Interrupted as error:
        say(str(error))
        return 130
    finished = folder.name == "final"
    report.record |= {"recipe": recipe.name, "device": device, "finished": finished, "path": str(folder)}
    report.line(str(folder))
    report.end("finished" if finished else f"stopped; `unilip train {recipe.name}` goes on from there,")
    return 0


def list_recipes(o: Options, recipes: Iterable[Any]) -> int:
    """Print the table of recipes."""
    from unilip.train.recipe import leaves

    recipes = list(recipes)
    if o.json:
        print(json.dumps({recipe.name: leaves(recipe) for recipe in recipes}))
        return 0
    rows = [("recipe", "objective", "steps", "batch", "trains", "note")]
    for r in recipes:
        trains = " ".join(part if factor == 1 else f"{part}:{factor:g}" for part, factor in r.trains)
        rows.append((r.name, type(r.objective).__name__.lower(), f"{r.steps:,}", str(r.batch_size), trains, r.note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]).rstrip())
    return 0


def convert(o: Options) -> int:
    """Rewrite a checkpoint in another format."""
    source, target = o.words
    folder = Path(target).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not o.force:
        raise UniLIPError(f"{target} is not empty; give a new folder, or --force to replace a UniLIP checkpoint there.")
    report = Report(o, "convert")
    from unilip import checkpoint

    checkpoint.parse_size(o.max_shard_size)
    dtype = checkpoint.parse_dtype("auto" if o.dtype is None else o.dtype)
    path = checkpoint.convert(source, folder, o.to, dtype=dtype, max_shard_size=o.max_shard_size)
    report.line(str(path))
    report.end(f"converted to the {o.to} format", source=source, path=str(path), format=o.to)
    return 0


def info(o: Options) -> int:
    """Tell what a checkpoint is and holds."""
    from unilip.info import describe

    found = describe(o.words[0] if o.words else None)
    if o.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    config = found.pop("config")
    parts = found.pop("parts")
    dropped: dict[str, int] = {}
    for reason in found.pop("dropped").values():
        dropped[reason] = dropped.get(reason, 0) + 1
    found["left_out"] = [f"{plural(count, 'tensor')}: {reason}" for reason, count in dropped.items()]
    for key, value in found.items():
        if isinstance(value, dict):
            value = [f"{name}: {entry}" for name, entry in value.items()]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        for line in value if isinstance(value, list) else [value]:
            print(f"{key.replace('_', ' '):<20} {line}")
    print("\nparameters of each part")
    for name, count in parts.items():
        print(f"{name:<20} {count:,}")
    print("\nconfig")
    print(json.dumps(config, indent=1))
    return 0


def verify(o: Options) -> int:
    """Recompute recorded numbers with a checkpoint, and compare."""
    report = Report(o, "verify")
    checkpoint, expected = o.words
    if not Path(expected).is_file():
        raise UniLIPError(f"There is no file {expected}; give a safetensors file of recorded numbers.")
    device = choose_device(o.device)
    from tqdm.auto import tqdm

    from unilip import verify as numbers

    with tqdm(disable=None if o.progress else True, leave=False, unit="entry") as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rows = numbers.verify(checkpoint, expected, o.tolerance, device, o.dtype or "float32", progress)
    good = bool(rows) and all(row.ok for row in rows)
    report.line(numbers.format_rows(rows))
    entries = [asdict(row) | {"max_abs_error": finite(row.max_abs_error)} for row in rows]
    report.end(ok=good, device=device, entries=entries)
    return 0 if good else 1


def finite(value: float) -> float | None:
    """Give None in place of what JSON cannot hold."""
    return value if math.isfinite(value) else None


def demo(o: Options) -> int:
    """Show what the embedded model can do."""
    report = Report(o, "demo")
    device = choose_device(o.device)
    from unilip import demo as page

    folder = Path(o.output or "demo").expanduser()
    page.check_folder(folder)
    page.examples()
    model = load(o)
    say(f"{describe_model(o, model)['model']} on {device}, loaded in {time.perf_counter() - report.started:.1f} s")
    result = page.run(model, folder, o.seed, say)
    report.line(f"{folder / page.PAGE}")
    report.end("the page is ready,", **describe_model(o, model), **result)
    return 0


def data_prepare_emoji(o: Options) -> int:
    """Fetch and rasterise the art of the emoji world."""
    report = Report(o, "data prepare emoji")
    from tqdm.auto import tqdm

    from unilip.data.art import prepare

    if o.source is not None and not Path(o.source).is_dir():
        raise UniLIPError(f"There is no folder {o.source}; give the one with the npm packages, or leave --source away.")
    with tqdm(disable=None if o.progress else True, leave=False, unit="drawing") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = prepare(Path(o.output) if o.output else None, Path(o.source) if o.source else None, progress)
    report.line(str(path))
    report.end("the art is ready,", path=str(path))
    return 0


def eval_emoji(o: Options) -> int:
    """Measure a model in the emoji world."""
    report = Report(o, "eval emoji")
    folder = Path(o.output or "results").expanduser()
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another --output.")
    device = choose_device(o.device)
    from unilip.data.world import World
    from unilip.eval import emoji

    parts = None if o.parts is None else [part.strip() for part in o.parts.split(",")]
    unknown = sorted(set(parts or ()) - set(emoji.PARTS))
    if unknown:
        raise UniLIPError(f"--parts names {', '.join(map(repr, unknown))}; allowed: {', '.join(emoji.PARTS)}.")
    if o.world is not None:
        World.preset(o.world)
    results = emoji.run(
        o.model,
        folder,
        o.world,
        parts=parts,
        count=o.count,
        seeds=o.seeds,
        steps=o.steps,
        guidance_scale=o.guidance_scale,
        device=device,
        dtype=o.dtype,
        batch_size=o.batch_size,
        progress=o.progress and sys.stderr.isatty(),
    )
    for name in ("results.md", "index.html"):
        report.line(str(folder / name))
    report.end("measured", output=str(folder), results=results)
    return 0


VERBS: dict[str, Verb] = {
    "generate": Verb(
        generate,
        "[OPTIONS] PROMPT",
        "Draw pictures from words. Every file is named after its prompt and seed.",
        'unilip generate "three yellow stars"\n'
        'unilip generate "a blue car" --num-images 4 --seed 7 --output pictures/\n'
        "unilip generate --prompts prompts.txt --output pictures --json",
        ("--prompts", *DRAWING, "--seed", *WRITING, *LOADING, *TELLING),
        (0, math.inf),
    ),
    "edit": Verb(
        edit,
        "[OPTIONS] IMAGE [IMAGE ...] INSTRUCTION",
        "Change pictures as told. One instruction is followed on every image.",
        'unilip edit car.png "change the color of the car to blue"\n'
        'unilip edit wide.jpg "change the background to pink" --fit pad --keep-aspect --output pink.png',
        ("--prompts", *DRAWING, "--fit", "--keep-aspect", "--seed", *WRITING, *LOADING, *TELLING),
        (0, math.inf),
    ),
    "ask": Verb(
        ask,
        "[OPTIONS] [IMAGE ...] QUESTION",
        "Answer a question about pictures. Each image is asked about by itself; without one only the words count.",
        'unilip ask cat.png "What is this?"\nunilip ask a.png b.png "How many stars are there?" --json',
        (
            "--prompts",
            "--together",
            "--max-new-tokens",
            "--temperature",
            "--top-p",
            "--max-tiles",
            "--batch-size",
            "--seed",
            *LOADING,
            *TELLING,
        ),
        (0, math.inf),
        {"--seed": dict(help="of sampled answers, at a temperature above 0 (0)")},
    ),
    "reconstruct": Verb(
        reconstruct,
        "[OPTIONS] IMAGE [IMAGE ...]",
        "Encode pictures to CLIP features and draw them again. What is lost is what the encoder does not know.",
        "unilip reconstruct photo.jpg --output again.png",
        ("--batch-size", "--image-size", "--fit", "--keep-aspect", *WRITING, *LOADING, *TELLING),
        (1, math.inf),
    ),
    "train": Verb(
        train,
        "[OPTIONS] RECIPE | --list",
        "Run a training recipe, or go on where it stopped. The result is a model folder, DIR/RECIPE/final.",
        "unilip train --list\nunilip train pico/recon --set steps=500 --set optim.lr=2e-4",
        ("--list", "--runs", "--set", "--restart", "--stop-after", "--device", *TELLING),
        (0, 1),
    ),
    "convert": Verb(
        convert,
        "[OPTIONS] SOURCE DESTINATION",
        "Rewrite a checkpoint in our format or in the authors'. Weights pass through memory one file at a time.",
        "unilip convert kanashi6/UniLIP-1B unilip-1b\nunilip convert unilip-1b for-their-code --to authors",
        ("--to", "--dtype", "--max-shard-size", "--force", "--json", "--debug"),
        (2, 2),
        {
            "--dtype": dict(default=None, help="stored type of the weights; as they are by default"),
            "--force": dict(help="replace the UniLIP checkpoint at the destination"),
        },
    ),
    "info": Verb(
        info,
        "[OPTIONS] [CHECKPOINT]",
        "Tell what a checkpoint is and holds. Only names and shapes are read; the embedded model by default.",
        "unilip info\nunilip info kanashi6/UniLIP-1B",
        ("--json", "--debug"),
        (0, 1),
    ),
    "verify": Verb(
        verify,
        "[OPTIONS] CHECKPOINT EXPECTED",
        "Recompute recorded numbers with a checkpoint. Exit code 1 tells that they differ.",
        "unilip verify kanashi6/UniLIP-1B expected.safetensors --tolerance 1e-4",
        ("--tolerance", "--device", "--dtype", *TELLING),
        (2, 2),
    ),
    "demo": Verb(
        demo,
        "[OPTIONS]",
        "Show what the embedded model can do. Writes a web page with its pictures.",
        "unilip demo --output demo",
        ("--output", "--seed", *LOADING, "--json", "--debug"),
        changes={
            "--output": dict(metavar="DIR", help="a new or empty folder, or that of an earlier demo (demo)"),
            "--seed": dict(help="of every picture (0)"),
        },
    ),
    "data prepare emoji": Verb(
        data_prepare_emoji,
        "[OPTIONS]",
        "Fetch the art of the emoji world and rasterise it. Training and judging the embedded models need it.",
        "unilip data prepare emoji",
        ("--source", "--output", *TELLING),
        changes={"--output": dict(metavar="DIR", help="folder of the art ($UNILIP_DATA, or ~/.cache/unilip/emoji)")},
    ),
    "eval emoji": Verb(
        eval_emoji,
        "[OPTIONS]",
        "Measure a model in the emoji world. The items are held out; no network judges.",
        "unilip eval emoji --model runs/pico/sft/final --output results",
        (
            "--output",
            "--count",
            "--seeds",
            "--parts",
            "--world",
            "--steps",
            "--guidance-scale",
            "--batch-size",
            *LOADING,
            *TELLING,
        ),
        changes={
            "--output": dict(metavar="DIR", help="folder of the results; a rerun goes on where one stopped (results)"),
            "--batch-size": dict(default=None, help="how many at once: speed and memory, not results (24)"),
        },
    ),
}


# --- running --------------------------------------------------------------------------------------------------------


class Speaker(logging.Handler):
    """Shows the library's log to the person."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
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


def _reason(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: Exception) -> tuple[str, int]:
    """Turn an error into one line and an exit code."""
    text = _reason(error)
    if isinstance(error, UniLIPError):
        return text, 2
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "memory ran out; try a smaller --batch-size or --image-size, --dtype bfloat16, or another --device.", 1
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; install it, for example with pip install {error.name}.", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}; --debug shows where.", 1
    return f"unexpected {type(error).__name__}: {text[:300]}; --debug shows where it happened.", 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        name, options = parse(argv)
        set_up(debug)
        return VERBS[name].run(options)
    except SystemExit as stop:  # help was asked for
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
        say(f"error: {line}")
        return code


if __name__ == "__main__":
    sys.exit(main())
