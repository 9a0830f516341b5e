"""A Hugging Face dataset as a source: streamed shard by shard through the `datasets` library.

In: `hf:NAME?split=train&caption=prompt`, NAME being a hub id or a folder that `load_dataset` takes. The fields are
those of a JSONL line, TRL's `images` and `messages` too; `field=column` renames, `name=` chooses a configuration,
`revision=` a version. Out: samples by shard and place; a shard is written to the cache folder as a tar file in its
turn.
"""

import json
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from os.path import expanduser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from unilip.data.records import KINDS, kinds_of
from unilip.data.shards import TEXTS, Shards, writing
from unilip.errors import DataError, reason
from unilip.files import content_hash, stamp

SCHEME = "hf:"
TRL = {"image": "images", "conversations": "messages"}  # where there is no column of our name
MEMBERS = {  # by field
    "image": "jpg", "caption": "txt", "source": "input.jpg", "instruction": "txt", "target": "output.jpg",
    "conversations": "json",
}  # fmt: skip


class HubStream(Shards):
    """The samples of a dataset. Raises DataError: it cannot be opened, or has no columns that make a sample."""

    beside = False

    def __init__(self, location: str, keep_gb: float = 50.0) -> None:
        name, _, query = location.removeprefix(SCHEME).partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        options: dict[str, str] = {key: given.pop(key) for key in ("split", "name", "revision") if key in given}
        if unknown := sorted(set(given) - set(MEMBERS)):
            allowed = ", ".join(("split", "name", "revision", *MEMBERS))
            raise DataError(f"{location} sets {', '.join(unknown)}; allowed: {allowed}.")
        self._stream, self._rows, self._versions = _open(expanduser(name), options, location)
        columns = set(self._stream.column_names or ())
        theirs = {field: name for field, name in TRL.items() if field not in columns}
        named = {field: field for field in MEMBERS} | theirs | given
        self.columns = {field: column for field, column in named.items() if column in columns}
        missing = sorted(column for column in given.values() if column not in columns)
        members = {MEMBERS[field]: field for field in self.columns}
        self._kinds = Counter(kind for kind, _ in kinds_of(members, texts=not TEXTS.isdisjoint(members)))
        if missing or not self._kinds:
            have = ", ".join(sorted(columns)) or "none that are known"
            want = f"no column {', '.join(missing)}" if missing else "no columns for a sample"
            raise DataError(f"{location} has {want}; its columns are: {have}. Name them: ?image=COLUMN&caption=COLUMN.")
        shards = [f"hf://{location.removeprefix(SCHEME)}#{i}" for i in range(self._stream.num_shards)]
        super().__init__(shards, location, keep_gb)

    def _identify(self) -> list[Any]:
        versions = self._versions
        return versions if len(versions) == len(self.shards) else [content_hash(versions)] * len(self.shards)

    def _head(self, shard: int) -> dict[str, Any]:
        if self._rows is not None:
            counts = {kind: self._rows[shard] * self._kinds[kind] for kind in KINDS}
            return {"fault": "", "counts": counts, "ignored": {}}
        return super()._head(shard)

    def _write(self, location: str, path: Path) -> None:
        """Write the samples of one shard of the stream to a tar file."""
        number = int(location.rpartition("#")[2])
        with writing(path) as write:
            for i, row in enumerate(self._stream.shard(num_shards=self._stream.num_shards, index=number)):
                write(f"{i:08d}", dict(_member(field, row[column]) for field, column in self.columns.items()))


def _open(name: str, options: dict[str, str], location: str) -> tuple[Any, list[int] | None, list[Any]]:
    """Open a stream with undecoded pictures; also the rows of its shards if they are Parquet, and files' versions."""
    import datasets
    import fsspec
    from pyarrow.parquet import read_metadata

    def rows(file: str) -> int:
        with fsspec.open(file, "rb") as opened:
            return int(read_metadata(opened).num_rows)

    split = options.pop("split", "train")
    try:
        builder = datasets.load_dataset_builder(name, **options)
        stream = datasets.load_dataset(name, split=split, streaming=True, **options)
        raw = datasets.Image(decode=False)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, raw)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of pictures
                stream = stream.cast_column(column, replace(feature, feature=raw))
        listed = (builder.config.data_files or {}).get(split) or ()
        files, origins = list(map(str, listed)), getattr(listed, "origin_metadata", ())
        parquet = len(files) == stream.num_shards and all(file.endswith(".parquet") for file in files)
        versions = [
            (str(file), str(origin), stamp(Path(str(file))) if Path(str(file)).exists() else None)
            for file, origin in zip_longest(files, origins)
        ]
        return stream, [rows(file) for file in files] if parquet else None, versions or [str(builder.hash)]
    except Exception as error:  # the library documents none
        raise DataError(f"{location} cannot be opened by the datasets library ({reason(error, 300)}).") from error


def _member(field: str, value: Any) -> tuple[str, bytes]:
    """The member of a field; an empty one where there is nothing, so that the sample keeps its place."""
    ending = MEMBERS[field]
    if isinstance(value, list) and ending.endswith("jpg"):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, dict) and ("bytes" in value or "path" in value) and ending != "json":
        if value.get("bytes") is not None:
            return ending, bytes(value["bytes"])
        path = value.get("path")
        return ending, Path(path).read_bytes() if path and Path(path).is_file() else b""
    if value is None or isinstance(value, bytes):
        return ending, value or b""
    if isinstance(value, str):
        return ending, value.encode()
    return ("texts" if ending == "txt" else ending), json.dumps(value).encode()  # several captions, or none that is one
