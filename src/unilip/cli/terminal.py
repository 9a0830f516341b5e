"""What verbs share: requests read and checked, where results go, what is told, and which model on which device.

Heavy libraries are imported inside the functions that need them, after what can be checked without them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unilip import __version__
from unilip.cli.options import Options
from unilip.errors import UniLIPError
from unilip.files import decode_text, lines_of, png_notes, read_object, read_text
from unilip.machine import choose_device

if TYPE_CHECKING:
    from PIL import Image

    from unilip.checkpoints.hub import Source
    from unilip.model import UniLIP

ADAPTER = "adapter_config.json"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class Request(NamedTuple):
    """One thing to do."""

    text: str
    images: tuple[str, ...]  # that the words are about; a joint edit is one of the first
    seed: int  # of the first result


def read_prompts(name: str) -> list[dict[str, Any]]:
    """Read prompts or JSON objects, one a line; `-` is standard input. Raises UniLIPError: none, or a bad line."""
    try:
        given = (
            getattr(sys.stdin, "buffer", sys.stdin).read() if name == "-" else read_text(Path(name), "file of prompts")
        )
        text = given if isinstance(given, str) else decode_text(given)
    except UnicodeDecodeError as error:
        raise UniLIPError(f"--prompts - is no {error.encoding} text ({error.reason}); give UTF-8.") from error
    lines = [(i, line.strip("\ufeff \t")) for i, line in enumerate(lines_of(text), 1)]
    found = [_entry(line, f"{name}, line {i}") for i, line in lines if line.strip()]
    if not found:
        raise UniLIPError(f"--prompts {name} holds no prompt; write one on each line.")
    return found


# what a line of --prompts may hold, and whether a value of it will do
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "image": lambda value: bool(value) and all(isinstance(one, str) for one in _listed(value)),
    "seed": lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63,
}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _entry(line: str, where: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line.strip()}
    entry = read_object(line, where)
    if not isinstance(entry.get("prompt"), str):
        raise UniLIPError(f'{where} has no "prompt"; write {{"prompt": "..."}}.')
    if wrong := [name for name, value in entry.items() if name not in ALLOWED or not ALLOWED[name](value)]:
        raise UniLIPError(
            f"{where}: {', '.join(wrong)} is not understood; allowed: prompt (text), image (text, or "
            "list of texts), seed (0 to 2^63 - 1)."
        )
    return entry


def requests(o: Options, what: str, image: str, together: bool = False) -> list[Request]:
    """Turn words and --prompts into requests, all checked; `image`: "never", "maybe" or "always" part of one.

    Each picture has a request of its own, unless all of a line's belong `together`.
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
        *images, last = o.words
        entries = [{"prompt": last}]
        if os.path.isfile(last):
            raise UniLIPError(f"There is no {what} behind {last}; give it last, in quotes.")
        if last.lower().endswith(tuple(FORMATS)) and len(last.split()) == 1:  # a name of a picture, and no words
            raise UniLIPError(f"There is no file {last}; check the path, and give the {what} last, in quotes.")
    from unilip.pictures import load_image
    from unilip.sampling import check_joint, check_prompt

    found = []
    for entry in entries:
        text = check_prompt(entry["prompt"], what)
        own = _listed(entry.get("image", images))
        if own and image == "never":
            raise UniLIPError("A prompt of `unilip generate` takes no image; use `unilip edit` to change one.")
        if not own and image == "always":
            raise UniLIPError(f"There is no image; give at least one before the {what}.")
        seed = entry.get("seed", o.seed)
        if together and image == "always":
            check_joint(together, len(own))
        if together or not own:
            found.append(Request(text, tuple(own), seed))
        else:
            found += [Request(text, (path,), seed) for path in own]
    for path in dict.fromkeys(path for request in found for path in request.images):
        load_image(path)
    return found


def slug(text: str) -> str:
    """Make a short file name of a text."""
    return re.sub(r"\W+", "-", text.lower()).strip("-_")[:48].rstrip("-_") or "picture"


def printable(text: str) -> str:
    """Return a text that every file and terminal can hold: what is no Unicode of a file's name is written as \\xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def print_json(value: Any) -> None:
    """Print a value as JSON, with escapes only where stdout cannot hold the text."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


class Destination:
    """Where pictures go: a named file, or a folder in which free names are taken. Files appear whole or not at all."""

    def __init__(self, o: Options, count: int) -> None:
        output, self.force, self.metadata = o.output, o.force, o.metadata
        self.written: list[Path] = []
        path = Path(output or ".")
        try:
            path.exists()
        except OSError as error:  # a name that is too long, for instance
            raise UniLIPError(f"--output {str(path)[:60]}... cannot be used: {error.strerror}.") from error
        is_folder = path.is_dir() or (output and (output.endswith(("/", os.sep)) or not path.suffix))
        self.folder = path if is_folder else path.parent
        self.file = None if is_folder else path
        if self.file and path.suffix.lower() not in FORMATS:
            raise UniLIPError(f"{path} has an unknown ending; allowed: {', '.join(FORMATS)}, or a folder.")
        if self.file and count > 1:
            raise UniLIPError(f"{path} is one file, but {count} pictures will be made; give a folder as --output.")
        if self.file and os.path.lexists(path) and not self.force:
            raise UniLIPError(f"{path} exists already; give another --output, or --force to overwrite it.")
        if self.folder.exists() and not self.folder.is_dir():
            raise UniLIPError(f"{self.folder} is a file, not a folder; give another --output.")
        base = self.folder if self.folder.exists() or self.file else self.folder.absolute().parent
        if not base.is_dir():
            raise UniLIPError(f"There is no folder {base} to write {path.name} to; make it: `mkdir -p {base}`.")
        if not os.access(base, os.W_OK):
            raise UniLIPError(f"The folder {base} cannot be written to; give another --output.")

    def _stem(self, words: Sequence[str]) -> str:
        """Join words to the stem of a file name, shortened so that the file system takes it with an ending."""
        limit = 255
        with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows, or a file system that does not say
            limit = os.pathconf(self.folder, "PC_NAME_MAX")
        *long, last = words
        size = (limit - 44) // max(1, len(long))  # in bytes
        return "-".join([*(printable(word).encode()[:size].decode("utf-8", "ignore") for word in long), last])

    def write(self, image: Image.Image, words: Sequence[str], about: Mapping[str, object]) -> Path:
        """Write a picture under the name asked for, or the first free one of the words: a-b.png, a-b-2.png, ..."""
        texts = {"Software": f"unilip {__version__}", **about} if self.metadata else {}
        self.folder.mkdir(exist_ok=True)
        suffix = self.file.suffix.lower() if self.file else ".png"
        temporary = self.folder / f".unilip-{os.getpid()}{suffix}.part"
        try:
            notes = png_notes({key: printable(str(value)) for key, value in texts.items() if value is not None})
            image.save(temporary, FORMATS[suffix], pnginfo=notes, quality=95)  # each format knows one of these
            path = self._publish(temporary, self._stem(words))
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

    def __init__(self, verb: str, as_json: bool) -> None:
        self.as_json, self.silent = as_json, False
        self.record: dict[str, Any] = {"verb": verb}
        self.started = time.perf_counter()

    def loaded(self, **about: Any) -> str:
        """Begin to count the seconds of the work itself, with what is loaded; returns how long that took."""
        seconds = time.perf_counter() - self.started
        self.record |= {**about, "load_seconds": round(seconds, 3)}
        self.started += seconds
        return f"loaded in {seconds:.1f} s"

    def line(self, *texts: object) -> None:
        for text in texts if not (self.as_json or self.silent) else ():
            print(printable(str(text)), flush=True)

    def end(self, note: str = "", **more: Any) -> None:
        """Print the JSON object, or a last remark on stderr."""
        seconds = time.perf_counter() - self.started
        if self.silent:
            return
        if self.as_json:
            print_json({**self.record, **more, "seconds": round(seconds, 3)})
        elif note:
            before = f"loaded in {self.record['load_seconds']:.1f} s, " if "load_seconds" in self.record else ""
            say(f"{note} ({before}{'then ' if before else ''}{seconds:.1f} s)")


def say(message: str) -> None:
    """Tell the person something that is no result."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, or a full disk
        print(f"unilip: {message}", file=sys.stderr, flush=True)


def bars(o: Options) -> bool:
    """Whether progress bars are shown."""
    return getattr(o, "progress", False) and sys.stderr.isatty()


@contextlib.contextmanager
def bar(wanted: bool, unit: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal, if wanted; yields what is told how much is done, of how much."""
    from tqdm.auto import tqdm

    with tqdm(total=total, disable=None if wanted else True, leave=False, unit=unit) as shown:

        def progress(done: int, total: int, *_: object) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


def adapter_of(text: str) -> tuple[str, float]:
    """Split PATH[:SCALE]; a path may hold colons. Raises UniLIPError: no adapter, or a scale that is not finite."""
    folder, scale = os.path.expanduser(text), 1.0
    path, _, tail = folder.rpartition(":")
    if path and not os.path.isdir(folder):
        with contextlib.suppress(ValueError):
            folder, scale = path, float(tail)
    if not math.isfinite(scale):
        raise UniLIPError(f"--adapter {text}: the scale is {tail}; give a finite number, such as {path}:0.5.")
    if not os.path.isfile(os.path.join(folder, ADAPTER)):
        raise UniLIPError(f"--adapter {folder} holds no {ADAPTER}; give a folder that `unilip train` or peft wrote.")
    return folder, scale


def source_of(o: Options) -> Source:
    """Return the model that the options name, with its adapters."""
    from unilip.checkpoints.hub import Adapted

    given = tuple(adapter_of(text) for text in getattr(o, "adapter", ()))
    return Adapted(o.model, given) if given else o.model


def load(o: Options, *parts: str) -> UniLIP:
    """Load the model, or some of its parts, as the options say, with its adapters; --performance chooses the rest."""
    performance, quantized = getattr(o, "performance", "exact"), getattr(o, "quantize", None)
    low_memory = getattr(o, "low_memory", False)
    compiled = getattr(o, "compile", False)
    if low_memory and compiled:
        raise UniLIPError("--compile and --low-memory exclude each other: compiled parts have to stay; leave one out.")
    source = source_of(o)
    from unilip.checkpoints.read import open_checkpoint
    from unilip.model import DRAWING, UniLIP

    opened = open_checkpoint(source)
    given = opened.adapters
    if "mllm" in parts and "mllm" in opened.parts and opened.tokenizer_path is None:
        raise UniLIPError(f"{opened.path} has no tokenizer, without which it reads no words; put its files beside it.")
    for folder, _ in given:
        from unilip.adapters import read_adapter

        changed = read_adapter(folder).parts
        if parts and not set(changed) & set(parts):
            say(f"{folder} changes {', '.join(changed)}, which this verb does not use")
    device = choose_device(o.device)
    if bars(o):
        say(f"loading {o.model or 'the embedded model'} on {device}")
    # beside a GPU plain weights rest in main memory; else they are read from disk (and quantised where they work)
    on_gpu = low_memory and device != "cpu" and quantized is None
    drawing = set(parts) == set(DRAWING)
    stays = True if low_memory and not on_gpu else False if given or compiled or on_gpu else None
    model = UniLIP.from_pretrained(
        opened, device="cpu" if on_gpu else device, dtype=o.dtype, parts="drawing" if drawing else parts or None,
        low_memory=stays, quantization=quantized or ("none" if given or on_gpu else None), performance=performance,
        decoder=getattr(o, "decoder", None),
    )  # fmt: skip
    if on_gpu:
        model.enable_tiling().enable_cpu_offload(device)
    return model.compile() if compiled else model


def describe_model(o: Options, model: UniLIP) -> dict[str, Any]:
    """Name a model as reports and metadata do."""
    name = f"embedded ({model.config.name})" if o.model is None else o.model
    name = " + ".join([name, *getattr(o, "adapter", ())])
    return {"model": name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def sides(o: Options) -> dict[str, Any]:
    """The size of pictures, as the model takes it; what is rounded is said, once."""
    from unilip.shapes import drawn

    most = getattr(o, "max_pixels", None)
    if o.size and most:
        raise UniLIPError("Give either --size or --max-pixels: a size needs no limit.")
    o.size = drawn(*o.size) if o.size else None
    width, height = o.size or (None, None)
    return {"width": width, "height": height} | ({"max_pixels": most} if most else {})


def pick(o: Options, *names: str) -> dict[str, Any]:
    """Return options by their names, for a function that calls them so, too, and has its own values where none is."""
    return {name: value for name in names if (value := getattr(o, name)) is not None}


def plural(count: int, noun: str) -> str:
    """Return "1 picture", "2 pictures"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
