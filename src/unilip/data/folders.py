"""A folder of pictures with texts beside them, or a JSONL file that lists samples, as a source of one shard.

A folder, any depth: `NAME.jpg` + `NAME.txt`; `NAME.input.jpg`, `NAME.output.jpg` + `NAME.txt` for an edit; with
`NAME.json` instead of or beside the text, a conversation about the picture. It is what a WebDataset shard unpacks to.
A JSONL line, or an entry of a JSON list: {"image", "caption"}, {"source", "instruction", "target"} or {"image",
"conversations"}, also with TRL's {"images", "messages"} and as published lists of edits name them; paths are relative
to the file. A caption may be a list of several.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from unilip.data import records
from unilip.errors import DataError
from unilip.files import content_hash, decode_text, mark

logger = logging.getLogger(__name__)
MARKED = 4096  # files whose content a signature looks at, spread over all
LISTS = ("metadata.jsonl", "metadata.csv")  # of other programs, which say what the texts are
SOURCES = ("input", "input_image", "source", "source_image")  # what published lists of edits call their parts
TARGETS = ("output", "output_image", "target", "target_image")
INSTRUCTIONS = ("instruction", "edit_instruction", "input_prompt", "prompt", "edit")
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, too
READ = (*records.IMAGE_SUFFIXES, ".txt", ".json", ".jsonl", ".csv")


class Folder(records.Source):
    """The samples of a folder. Raises DataError: there is no such folder, or it holds no pictures."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder.")
        self.location, self.folder = str(folder), folder
        try:
            files = sorted(path for path in walk(folder) if not records.is_litter(path.relative_to(folder).as_posix()))
        except OSError as error:
            raise DataError(f"{error.filename or folder} cannot be read ({error.strerror}).") from error
        if not (found := [p for p in files if p.suffix.lower() in records.IMAGE_SUFFIXES]):
            raise DataError(f"{folder} holds no pictures to learn from ({', '.join(records.IMAGE_SUFFIXES)}).")
        texts = [p for p in files if p.suffix.lower() == ".txt"]
        jsons = {p: records.json_meaning(_bytes(p)) for p in files if p.suffix.lower() == ".json"}
        beside: dict[Path, dict[str, Path]] = {}  # texts, by path without ending
        for path, meaning in (dict.fromkeys(texts, "txt") | jsons).items():
            if meaning:
                beside.setdefault(key(path), {})[meaning] = path
        samples: dict[tuple[Path, Path | None], dict[str, Path]] = {}  # pictures: one, or a pair of one stem
        for path in found:
            part = next((part for part in ("input", "output") if path.stem.endswith(f".{part}")), "")
            sample: tuple[Path, Path | None] = (key(path, f".{part}"), None) if part else (key(path), path)
            samples.setdefault(sample, {})[f"{part}.{path.suffix[1:].lower()}".lstrip(".")] = path
        plain = {stem for stem, path in samples if path is not None}
        some = not plain.isdisjoint(beside)  # then a picture without a text misses its own
        self._found: dict[str, list[Any]] = {kind: [] for kind in records.KINDS}
        for (stem, _), pictures in samples.items():
            for kind, parts in records.kinds_of(pictures | beside.get(stem, {}), some):
                self._found[kind].append(parts)
        self._found["image"].sort(key=lambda parts: parts["image"])
        self._found["text"] = [{"json": p} for p, meaning in jsons.items() if meaning == "json" and key(p) not in plain]
        self._read = [*found, *texts, *jsons]
        self.faults = [f"{p}: it is not read; name a .jsonl file as the place" for p in files if p.name in LISTS]
        for fault in self.faults:
            logger.warning("%s", fault)
        stems = {stem for stem, _ in samples}
        lonely = Counter("txt without a picture" for path in texts if key(path) not in stems)
        lonely["json without a conversation or a caption"] = list(jsons.values()).count("")
        lonely.update(p.suffix.lower() or p.name for p in files if p.suffix.lower() not in READ)
        told = ", ".join(f"{what} ({count:,})" for what, count in lonely.most_common(9) if count)
        self.notes = [f"files that no sample has a use for: {told}"] if told else []

    def counts(self, kind: str) -> list[int]:
        return [len(self._found[kind])]

    def read(self, kind: str, shard: int, place: int) -> records.Record:
        parts: dict[str, Path] = self._found[kind][place]
        words = {"json": "conversation", "txt": "instruction" if kind == "edit" else "caption", "about": "caption"}
        data = {part: records.read_bytes(path, words.get(part, "picture")) for part, path in parts.items()}
        return records.make_record(str(next(iter(parts.values()))), kind, data)

    def signature(self) -> str:
        """Return a hash of the names in the folder, and of size and end of its files."""
        return content_hash([p.relative_to(self.folder).as_posix() for p in self._read], marks(self._read))


def key(path: Path, part: str = "") -> Path:
    """A path without its ending: what belongs to one sample has the same."""
    return path.with_name(path.stem.removesuffix(part) or path.stem)


def walk(folder: str | Path) -> Iterator[Path]:
    """Every plain file below a folder, or link to one; pipes and devices, which may never end, are none."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)
        elif entry.is_file():
            yield Path(entry.path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # reading the sample says so


def marks(paths: Sequence[Path]) -> list[Any]:
    """Size of files, and of so many that it takes a moment a checksum of the end; None for one that cannot be read."""
    found, step = list[Any](), max(1, len(paths) // MARKED)
    for number, path in enumerate(paths):
        try:
            found.append(path.stat().st_size if number % step else mark(path))
        except (OSError, ValueError):  # ValueError: a name that no file can have
            found.append(None)
    return found


class Lines(records.Source):
    """The samples of a JSONL file, or of a JSON list as LLaVA has it. Raises DataError: unreadable, or no sample.

    In: kind: of every entry, whatever it lacks (empty: what its fields say). fetch: reads a picture by its path in the
    list, in place of the files that lie beside it.
    """

    def __init__(self, file: Path, kind: str = "", fetch: Callable[[str], bytes] | None = None) -> None:
        self.location, self.file, self.kind, self._fetch = str(file), file, kind, fetch
        self.faults: list[str] = []  # lines of no known kind, which are left out
        self.notes: list[str] = []
        self._found: dict[str, list[Any]] = {kind: [] for kind in records.KINDS}  # offsets of lines, or entries
        self._content = hashlib.blake2b(digest_size=12)
        self._pictures, self._lines, self._every = list[list[Path]](), 0, 1  # of every so many lines
        try:
            with file.open("rb") as opened:
                may_be_whole = kind != "" or file.suffix.lower() == ".json"  # what is called lines is read as lines
                if may_be_whole and opened.peek(64).lstrip(BLANK).startswith(b"["):
                    data = opened.read()
                    self._content.update(data)
                    for number, row in enumerate(json.loads(decode_text(data)), 1):
                        self._sort(row, f"entry {number}")
                else:
                    self._scan(opened)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is no JSON list, [{{...}}, ...], and no JSONL file ({error}).") from error
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}).") from error
        if not kind and not any(self._found.values()):
            why = f" ({self.faults[0]})" if self.faults else ""
            raise DataError(
                f'{file} holds no sample{why}; its lines must be like {{"image": ..., "caption": ...}}, '
                '{"source": ..., "instruction": ..., "target": ...} or {"image": ..., "conversations": [...]}.'
            )

    def _scan(self, lines: BinaryIO) -> None:
        """Sort the lines by where they begin; the file is not kept in memory."""
        offset = 0
        for number, line in enumerate(lines, 1):
            self._content.update(line)
            if line.strip(BLANK):
                row, why = None, ""
                try:
                    row = json.loads(decode_text(line))
                except (ValueError, RecursionError) as error:
                    if self.file.suffix.lower() == ".json":  # something else in JSON
                        raise
                    why = str(error)
                self._sort(row, f"line {number}", offset, why)
            offset += len(line)

    def _sort(self, row: Any, name: str, offset: int | None = None, why: str = "") -> None:
        values, kinds = sample_of(row, self.kind)
        if not kinds:
            why = why or "no sample of a known kind"
            self.faults.append(f"{self.file}, {name}: {why}")
            logger.warning("%s, %s is left out: %s", self.file, name, why)
        for kind in kinds:
            self._found[kind].append((name, values) if offset is None else offset)
        if kinds and self._lines % self._every == 0:
            named = (values.get(field) for field in ("image", "source", "target"))
            self._pictures.append([self._place(path) for path in named if isinstance(path, str)])
            if len(self._pictures) > MARKED // 3:
                self._pictures, self._every = self._pictures[::2], 2 * self._every
        self._lines += bool(kinds)

    def _place(self, path: str) -> Path:
        """Where a picture lies that the list names."""
        return self.file.parent / os.path.expanduser(path)

    def counts(self, kind: str) -> list[int]:
        return [len(self._found[kind])]

    def read(self, kind: str, shard: int, place: int) -> records.Record:
        entry = self._found[kind][place]
        if isinstance(entry, tuple):
            name, values = f"{self.file}, {entry[0]}", entry[1]
        else:
            name = f"{self.file} at byte {entry}"
            try:
                with self.file.open("rb") as file:
                    file.seek(entry)
                    values, kinds = sample_of(json.loads(decode_text(file.readline())), self.kind)
            except (OSError, ValueError, RecursionError) as error:
                raise records.Unreadable("line unreadable", f"{name}: {error}") from error
            if kind not in kinds:
                raise records.Unreadable("line unreadable", f"{name}: the file has changed since it was opened")

        def bring(field: str) -> bytes:
            if not isinstance(path := values.get(field), str):
                raise records.Unreadable("entry malformed", f"{name} does not name its pictures")
            if self._fetch is not None:
                return self._fetch(path)
            return records.read_bytes(self._place(path), "picture")

        if kind == "edit":
            return records.Record(name, (bring("source"), bring("target")), values.get("instruction"))
        if kind == "text":
            return records.Record(name, conversation=values)
        field = "image" if "image" in values else "target"
        return records.Record(name, (bring(field),), values.get("caption"), values.get("conversations"))

    def signature(self) -> str:
        """Return a hash of the list, and of size and end of pictures beside it, of lines spread over all."""
        return content_hash(self._content.hexdigest(), marks([path for line in self._pictures for path in line]))


def sample_of(row: Any, kind: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return a row with our names, where TRL has `images` (one) and `messages`, and the kinds that it can serve as.

    A kind that is given is what it serves as, whatever it lacks. Otherwise the names of published lists, of which some
    mean texts elsewhere, count only where a row is of no other kind and they name files of pictures.
    """
    values = records.filled(row) if isinstance(row, Mapping) else {}
    if kind:
        return published(values, kind), [kind]
    if isinstance(values.get("messages"), list):
        values.setdefault("conversations", values["messages"])
    images = values.get("images")
    if isinstance(images, list) and len(images) == 1 and "image" not in values:
        values["image"] = images[0].get("path") if isinstance(images[0], Mapping) else images[0]
    paths = {key for key in ("image", "source", "target") if isinstance(values.get(key), str)}
    if {"source", "target"} <= paths:
        return values, ["image", "edit"]
    talks = isinstance(values.get("conversations"), list)
    if "image" in paths:
        return values, ["image", *(["caption"] if "caption" in row else []), *(["talk"] if talks else [])]
    pictured = bool(paths) or bool(values.get("image")) or bool(values.get("images"))
    if talks:
        return values, [] if pictured else ["text"]
    if not values.keys() & {"image", "images"}:
        edit, caption = published(values, "edit"), published(values, "caption")
        if is_picture(edit["source"]) and is_picture(edit["target"]):
            return edit, ["image", "edit"]
        drawn = {"input_prompt", "output_image"} <= values.keys() and "input_image" not in row  # nor one that is null
        if drawn and is_picture(caption["image"]):
            return caption, ["image", "caption"]
    return values, []


def is_picture(name: Any) -> bool:
    """Whether a value of a row is the name of a picture, by its ending."""
    return isinstance(name, str) and name.lower().endswith(records.IMAGE_SUFFIXES)


def published(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of a caption or an edit, None where a row does not have them under one of the published names."""
    source, target, text = (_first(values, names) for names in (SOURCES, TARGETS, INSTRUCTIONS))
    if kind == "caption":
        return {"image": target, "caption": text}
    pair = values.get("image", values.get("images"))
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(path, str) for path in pair):
        source, target = pair
    turns = values.get("conversations")
    if text is None and isinstance(turns, list):
        asked = [turn for turn in turns if isinstance(turn, Mapping) and turn.get("from") in ("human", "user")]
        said = asked[0].get("value") if asked else None
        text = said.replace(records.PICTURE_MARK, "").strip() if isinstance(said, str) else None
    return {"source": source, "target": target, "instruction": text}


def _first(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first text under these names; a list with one entry counts as that entry."""
    found = (values.get(name) for name in names)
    plain = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in found)
    return next((value for value in plain if isinstance(value, str)), None)
