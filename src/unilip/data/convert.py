"""Published data sets -> WebDataset shards `LAYOUT-000000.tar` ... that training reads, each with an index beside it.

A sample that cannot be read is left out, counted by reason and named. A shard holds the same range of the data in every
run, so one that was interrupted goes on with the first shard that is missing.

    gpt-image-edit      JSON lists of edits (input, output, instruction; or two images with a conversation), or shards
    sharegpt-4o-image   text_to_image.json and text_and_image_to_image.json
    blip3o-60k          tar files with jpg + txt, or any other place that training reads
"""

import contextlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from unilip.data.folders import Lines, marks
from unilip.data.records import Record, Source, Unreadable, clean_text, decode_picture, one_text
from unilip.data.shards import INDEX_SUFFIX, is_written, writing_shard
from unilip.data.sources import open_source
from unilip.errors import DataError, check_choice, differences
from unilip.files import content_hash, png_bytes, read_json, write_json
from unilip.pictures import open_picture

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
Place = tuple[str, Source]  # the kind of samples that are taken from a source


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
    places = LAYOUTS[layout](source)
    contents = {place: place.signature() for _, place in places}
    entries = [
        (kind, place, shard, at)
        for kind, place in places
        for shard, count in enumerate(place.counts(kind))
        for at in range(count)
    ]
    if not entries:
        raise DataError(f"{source} holds no sample of the layout {layout}.")
    packed = [
        path
        for path in sorted(Path(source).expanduser().rglob("*.tar"))
        if output.resolve() not in path.resolve().parents
    ]
    about = {
        "layout": layout, "shard_size": shard_size, "shorter_side": shorter_side, "entries": len(entries),
        "content": content_hash([(kind, contents[place]) for kind, place in places], marks(packed)),
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
                for i, (kind, place, shard, at) in enumerate(part, start):
                    try:
                        record = one_text(place.read(kind, shard, at), i)
                        write(f"{i:08d}", members(kind, record, shorter_side))
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

    def read(self, home: Path, name: str) -> bytes:
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


def sharegpt_4o_image(source: str) -> list[Place]:
    """FreedomIntelligence/ShareGPT-4o-Image: 45 k pictures of prompts, 46 k edits."""
    folder = _folder(source)
    lists = {"caption": folder / "text_to_image.json", "edit": folder / "text_and_image_to_image.json"}
    if not any(path.exists() for path in lists.values()):
        names = " nor ".join(path.name for path in lists.values())
        raise DataError(f"{source} has neither {names}; give the downloaded folder.")
    files = Files(folder)
    return [(kind, Lines(path, kind, partial(files.read, folder))) for kind, path in lists.items() if path.exists()]


def gpt_image_edit(source: str) -> list[Place]:
    """UCSC-VLAA/GPT-Image-Edit-1.5M: every JSON list of edits in the folder, paths relative to it, or its shards."""
    folder = _folder(source)
    found = [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")]
    lists = sorted(p for p in found if not p.name.endswith(INDEX_SUFFIX))
    if not lists and any(folder.glob("*.tar")):  # shards with input, output and text, as it is published, too
        return [("edit", open_source(source))]
    if not lists:
        raise DataError(f"{source} holds no .json or .jsonl list of edits; give the folder of the download.")
    files = Files(folder)
    return [("edit", Lines(path, "edit", partial(files.read, path.parent))) for path in lists]


def any_place(source: str) -> list[Place]:
    """A place that training reads as it is: captions and edits, checked and cut into new shards."""
    place = open_source(source)
    return [("caption", place), ("edit", place)]


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; download the data set first.")
    return folder


LAYOUTS: dict[str, Callable[[str], list[Place]]] = {
    "gpt-image-edit": gpt_image_edit,
    "sharegpt-4o-image": sharegpt_4o_image,
    "blip3o-60k": any_place,
}
