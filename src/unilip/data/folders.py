"""A folder of pictures with texts beside them, or a JSONL file that lists samples, as a source of one shard.

A folder, any depth: `NAME.jpg` + `NAME.txt`; `NAME.input.jpg`, `NAME.output.jpg` + `NAME.txt` for an edit; with
`NAME.json` instead of or beside the text, a conversation about the picture. It is what a WebDataset shard unpacks to.
A JSONL line: {"image", "caption"}, {"source", "instruction", "target"} or {"image", "conversations"}; paths are
relative to the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unilip.data.errors import DataError
from unilip.data.records import IMAGE_SUFFIXES, KINDS, Record, Unreadable, read_bytes

logger = logging.getLogger(__name__)


class Folder:
    """The samples of a folder.

    Raises:
        DataError: there is no such folder, or it holds no pictures.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder.")
        self.location = str(folder)
        self.faults: list[str] = []
        files = sorted(folder.rglob("*"))
        found = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise DataError(f"{folder} holds no pictures to learn from ({', '.join(IMAGE_SUFFIXES)}).")
        plain = [p for p in found if not p.stem.endswith((".input", ".output"))]
        pairs: dict[Path, list[Path | None]] = {}
        for path in found:
            for place, part in enumerate((".input", ".output")):
                if path.stem.endswith(part):
                    stem = path.with_name(path.stem.removesuffix(part))
                    pairs.setdefault(stem, [None, None])[place] = path
        texts = {p for p in files if p.suffix in (".json", ".txt")}
        talks = [p for p in plain if p.with_name(f"{p.stem}.json") in texts]
        alone = {p.with_name(f"{p.stem}.json") for p in plain}
        self._found: dict[str, list[Any]] = {
            "image": found,
            "caption": [p for p in plain if p not in set(talks) or p.with_name(f"{p.stem}.txt") in texts],
            "edit": [(stem, *pair) for stem, pair in pairs.items()],
            "talk": talks,
            "text": sorted(p for p in texts if p.suffix == ".json" and p not in alone),
        }

    def counts(self, kind: str) -> list[int]:
        """Return how many samples of a kind there are: one shard."""
        return [len(self._found[kind])]

    def read(self, kind: str, shard: int, place: int) -> Record:
        """Read one sample; raises `Unreadable`."""
        entry = self._found[kind][place]
        if kind == "edit":
            stem, source, target = entry
            if source is None or target is None:
                raise Unreadable("picture missing", f"{stem} has only one of input and output")
            pictures = (read_bytes(source, "picture"), read_bytes(target, "picture"))
            return Record(str(stem), pictures, read_bytes(Path(f"{stem}.txt"), "instruction"))
        if kind == "text":
            return Record(str(entry), conversation=read_bytes(entry, "conversation"))
        picture = (read_bytes(entry, "picture"),)
        text = entry.with_name(f"{entry.stem}.txt")
        if kind == "image":
            return Record(str(entry), picture)
        if kind == "caption":
            return Record(str(entry), picture, read_bytes(text, "caption"))
        talk = read_bytes(entry.with_name(f"{entry.stem}.json"), "conversation")
        return Record(str(entry), picture, text.read_bytes() if text.exists() else None, talk)

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing has to be fetched."""


class Lines:
    """The samples of a JSONL file. Lines that are no JSON object of a known kind are named and left out.

    Raises:
        DataError: the file cannot be read or holds no sample.
    """

    def __init__(self, file: Path) -> None:
        self.location, self.file = str(file), file
        self.faults: list[str] = []
        self._offsets: dict[str, list[int]] = {kind: [] for kind in KINDS}
        try:
            with file.open("rb") as lines:
                offset = 0
                for number, line in enumerate(lines, 1):
                    self._sort(line, offset, number)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}).") from error
        if not any(self._offsets.values()):
            why = f" ({self.faults[0]})" if self.faults else ""
            raise DataError(
                f'{file} holds no sample{why}; its lines must be like {{"image": ..., "caption": ...}}, '
                '{"source": ..., "instruction": ..., "target": ...} or {"image": ..., "conversations": [...]}.'
            )

    def _sort(self, line: bytes, offset: int, number: int) -> None:
        if not line.strip():
            return
        try:
            kinds = kinds_of_object(json.loads(line))
        except ValueError as error:
            kinds, why = [], str(error)
        else:
            why = "no sample of a known kind"
        if not kinds:
            self.faults.append(f"{self.file}, line {number}: {why}")
            logger.warning("%s, line %d is left out: %s", self.file, number, why)
        for kind in kinds:
            self._offsets[kind].append(offset)

    def counts(self, kind: str) -> list[int]:
        """Return how many samples of a kind there are: one shard."""
        return [len(self._offsets[kind])]

    def read(self, kind: str, shard: int, place: int) -> Record:
        """Read one sample; raises `Unreadable`."""
        offset = self._offsets[kind][place]
        try:
            with self.file.open("rb") as file:
                file.seek(offset)
                values = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise Unreadable("line unreadable", f"{self.file} at byte {offset}: {error}") from error
        name = f"{self.file} at byte {offset}"

        def bring(field: str) -> bytes:
            return read_bytes(self.file.parent / Path(values[field]).expanduser(), "picture")

        if kind == "edit":
            return Record(name, (bring("source"), bring("target")), values.get("instruction"))
        if kind == "text":
            return Record(name, conversation=values)
        field = "image" if "image" in values else "target"
        return Record(name, (bring(field),), values.get("caption"), values.get("conversations"))

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing has to be fetched."""


def kinds_of_object(values: object) -> list[str]:
    """Return the kinds that a JSON object can serve as; an empty list where none."""
    if not isinstance(values, Mapping):
        return []
    paths = {key for key in ("image", "source", "target") if isinstance(values.get(key), str)}
    if {"source", "target"} <= paths:
        return ["image", "edit"]
    talks = isinstance(values.get("conversations"), list)
    if "image" in paths:
        return ["image", *(["caption"] if "caption" in values else []), *(["talk"] if talks else [])]
    return ["text"] if talks and not paths else []
