"""Published data sets -> WebDataset shards `LAYOUT-000000.tar` ... that training reads, each with an index beside it.

A sample that cannot be read is left out, counted by reason and named. A shard holds the same range of the data in every
run, so one that was interrupted goes on with the first shard that is missing.

    gpt-image-edit      JSON lists of edits (input, output, instruction; or two images with a conversation), or shards
    sharegpt-4o-image   text_to_image.json and text_and_image_to_image.json
    blip3o-60k          tar files with jpg + txt, or any other place that training reads
"""

import contextlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from unilip.data.records import Record, Unreadable, clean_text, decode_picture, filled, one_text
from unilip.data.shards import INDEX_SUFFIX, is_written, writing_shard
from unilip.data.sources import open_source
from unilip.errors import DataError, check_choice, differences
from unilip.files import content_hash, decode_text, lines_of, png_bytes, read_json, write_json
from unilip.pictures import open_picture

SOURCES = ("input", "input_image", "source", "source_image")  # what the lists of edits call their parts
TARGETS = ("output", "output_image", "target", "target_image")
TEXTS = ("instruction", "edit_instruction", "input_prompt", "prompt", "edit")
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
Entry = tuple[str, tuple[Any, ...], Callable[[], Record]]  # kind; what tells it from another; reads it, or `Unreadable`


@dataclass
class Converted:
    """What a conversion did: shards there now, samples by kind, and those left out, by reason."""

    shards: list[Path] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)


def convert(
    layout: str,
    source: str,
    output: Path,
    *,
    shard_size: int = 10_000,
    shorter_side: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write a data set (the folder of a download, as one of `LAYOUTS` has it) as shards, or go on where it stopped.

    In: shard_size: samples in a shard. shorter_side: longer shorter sides are scaled down to it and kept as JPEG (None:
    pictures keep their bytes). progress: told samples done and in all.
    Raises DataError: an unknown layout, or nothing of it in the folder.
    """
    check_choice("layout", layout, LAYOUTS, DataError)
    if not (entries := LAYOUTS[layout](source)):
        raise DataError(f"{source} holds no sample of the layout {layout}.")
    about = {
        "layout": layout, "shard_size": shard_size, "shorter_side": shorter_side, "entries": len(entries),
        "content": content_hash([(kind, *identity) for kind, identity, _ in entries]),
    }  # fmt: skip
    note = output / f".{layout}.json"
    before = read_json(note) if note.exists() else about
    if other := differences(before, about):
        raise DataError(f"{output} holds shards of another conversion: {other}. Give another --output.")
    write_json(note, about)
    result = Converted()
    for number, start in enumerate(range(0, len(entries), shard_size)):
        path = output / f"{layout}-{number:06d}.tar"
        part = entries[start : start + shard_size]
        if not is_written(path):
            with writing_shard(path) as write:
                for i, (kind, _, read) in enumerate(part, start):
                    try:
                        write(f"{i:08d}", members(kind, one_text(read(), i), shorter_side))
                        result.samples[kind] += 1
                    except Unreadable as error:
                        result.skipped[error.reason] += 1
                        result.named.append(str(error))
                    progress(i + 1, len(entries))
        progress(start + len(part), len(entries))
        result.shards.append(path)
    return result


def members(kind: str, record: Record, shorter_side: int | None) -> dict[str, bytes]:
    """Turn a record into the members of a sample, after trying that each of them can be read."""
    names = ("input.", "output.") if kind == "edit" else ("",)
    try:
        found = {"txt": clean_text(record.text, "instruction" if kind == "edit" else "caption").encode()}
        for name, data in zip(names, record.pictures, strict=True):
            ending, data = encoded(data, shorter_side)
            found[f"{name}{ending}"] = data
    except Unreadable as error:
        raise Unreadable(error.reason, f"{record.name}: {error}") from error
    return found


def encoded(data: bytes, shorter_side: int | None) -> tuple[str, bytes]:
    """Return ending and bytes of a picture that can be read, scaled down if it is larger than wanted."""
    picture = decode_picture(data)
    if shorter_side is not None and min(picture.size) > shorter_side:
        scale = shorter_side / min(picture.size)
        size = tuple(max(shorter_side, round(side * scale)) for side in picture.size)
        file = io.BytesIO()
        picture.resize((size[0], size[1]), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        return "jpg", file.getvalue()
    ending = ENDINGS.get(open_picture(data).format or "")
    return (ending, data) if ending else ("png", png_bytes(picture))


class Files:
    """Files of a download by their path inside it, on disk or in tar files that have not been unpacked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def packed(self) -> dict[str, tuple[Path, int, int]]:
        found = dict[str, tuple[Path, int, int]]()
        for archive in sorted(self.folder.rglob("*.tar")):
            try:
                with tarfile.open(archive, "r:") as tar:
                    found |= {m.name.removeprefix("./"): (archive, m.offset_data, m.size) for m in tar}
            except tarfile.TarError as error:
                raise DataError(f"{archive} is damaged ({error}); download it again.") from error
        return found

    def read(self, name: str, home: Path) -> bytes:
        """The file of this name: in the folder, in another one that is its home, or in a tar file."""
        for path in (self.folder / name, home / name):
            with contextlib.suppress(OSError, ValueError):  # a name that no file can have
                if path.is_file():
                    return path.read_bytes()
        if (inside := name.removeprefix("./")) not in self.packed:
            raise Unreadable("picture missing", f"{name} is neither in {self.folder} nor in a tar file there")
        archive, offset, size = self.packed[inside]
        with archive.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def read_list(path: Path) -> list[Mapping[str, Any]]:
    """Read a JSON list of objects, or one object a line."""
    try:
        text = decode_text(path.read_bytes())
        listed = text.lstrip().startswith("[")
        rows = json.loads(text) if listed else [json.loads(line) for line in lines_of(text) if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON list that can be read ({error}).") from error
    return [filled(row) for row in rows if isinstance(row, Mapping)]


def sharegpt_4o_image(source: str) -> list[Entry]:
    """Entries of FreedomIntelligence/ShareGPT-4o-Image: 45 k pictures of prompts, 46 k edits."""
    folder = _folder(source)
    files = Files(folder)
    lists = {"caption": folder / "text_to_image.json", "edit": folder / "text_and_image_to_image.json"}
    if not any(path.exists() for path in lists.values()):
        names = " nor ".join(path.name for path in lists.values())
        raise DataError(f"{source} has neither {names}; give the downloaded folder.")
    rows = [(kind, path.name, row) for kind, path in lists.items() if path.exists() for row in read_list(path)]
    return [
        _entry(kind, files, folder, _paths(row, kind), row.get("input_prompt"), f"{name}: {row.get('output_image')}")
        for kind, name, row in rows
    ]


def gpt_image_edit(source: str) -> list[Entry]:
    """Entries of UCSC-VLAA/GPT-Image-Edit-1.5M: every JSON list of edits in the folder, paths relative to it."""
    folder = _folder(source)
    found = [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")]
    lists = sorted(p for p in found if not p.name.endswith(INDEX_SUFFIX))
    if not lists and any(folder.glob("*.tar")):  # shards with input, output and text, as it is published, too
        return [entry for entry in any_place(source) if entry[0] == "edit"]
    if not lists:
        raise DataError(f"{source} holds no .json or .jsonl list of edits; give the folder of the download.")
    files = Files(folder)
    return [
        _entry("edit", files, path.parent, _paths(row, "edit"), _instruction(row), f"{path.name}, entry {number}")
        for path in lists
        for number, row in enumerate(read_list(path))
    ]


def any_place(source: str) -> list[Entry]:
    """Entries of a place that training reads as it is: captions and edits, checked and cut into new shards."""
    place = open_source(source)
    content = place.signature()
    return [
        (kind, (content, shard, i), partial(place.read, kind, shard, i))
        for kind in ("caption", "edit")
        for shard, count in enumerate(place.counts(kind))
        for i in range(count)
    ]


def _entry(kind: str, files: Files, home: Path, paths: tuple[str, ...], text: Any, name: str) -> Entry:
    """An entry of a list, which lies in the folder `home`: paths of pictures, and a text."""

    def read() -> Record:
        if not paths:
            raise Unreadable("entry malformed", f"{name} does not name its pictures")
        pictures = tuple(files.read(path, home) for path in paths)
        return Record(name, pictures, text if isinstance(text, str) else None)

    return kind, (name, paths, text), read


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; download the data set first.")
    return folder


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The value of the first of these names that a row has; a list with one entry counts as that entry."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            return value
    return None


def _paths(row: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    """Paths of the pictures of a row; empty where it does not name what it needs."""
    target = _first(row, TARGETS)
    if kind == "caption":
        return (target,) if target is not None else ()
    both = row.get("image", row.get("images"))
    if isinstance(both, list) and len(both) == 2 and all(isinstance(path, str) for path in both):
        return both[0], both[1]
    source = _first(row, SOURCES)
    return (source, target) if source is not None and target is not None else ()


def _instruction(row: Mapping[str, Any]) -> str | None:
    """The instruction of a row: a field, or what the human says in its conversation."""
    found = _first(row, TEXTS)
    turns = row.get("conversations")
    if found is None and isinstance(turns, list):
        asked = [turn for turn in turns if isinstance(turn, Mapping) and turn.get("from") in ("human", "user")]
        value = asked[0].get("value") if asked else None
        found = value.replace("<image>", "").strip() if isinstance(value, str) else None
    return found


LAYOUTS: dict[str, Callable[[str], list[Entry]]] = {
    "gpt-image-edit": gpt_image_edit,
    "sharegpt-4o-image": sharegpt_4o_image,
    "blip3o-60k": any_place,
}
