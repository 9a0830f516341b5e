"""Pictures to measure, from where people keep them: what training reads, Parquet files or a saved dataset."""

import hashlib
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from unilip.data.sources import open_source
from unilip.errors import DataError, ImageError, UniLIPError, reason
from unilip.pictures import load_image, open_picture

COLUMNS = ("image", "jpg", "png", "img")  # of datasets, the first that is there


class Pictures:
    """Pictures as (name, bytes), read when asked for. Raises ImageError, naming the picture: it cannot be read."""

    def __init__(self, count: int, read: Callable[[int], tuple[str, bytes]]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def mark(self, index: int) -> tuple[str, str]:
        """Return a picture's name, and the SHA-256 of its file in hex."""
        name, data = self.read(index)
        return name, hashlib.sha256(data).hexdigest()

    def load(self, index: int) -> Image.Image:
        """Return an upright RGB picture."""
        name, data = self.read(index)
        return decode(data, name)


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a picture file's bytes to an upright RGB picture. Raises ImageError, beginning with NAME: it cannot be."""
    try:
        return load_image(open_picture(data))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def open_pictures(place: str | Path, count: int | None = None) -> Pictures:
    """Find the first COUNT pictures of what training reads, .parquet files or a dataset. Raises UniLIPError: none."""
    path = Path(place).expanduser()
    if path.suffix == ".parquet" or any(path.glob("*.parquet")) or (path / "dataset_info.json").is_file():
        data, column, _ = open_dataset(path)
        size = len(data) if count is None else min(len(data), count)
        return Pictures(size, lambda i: (f"{i:08d}", cell(data[i][column], f"{place}, row {i}")))
    try:
        source = open_source(str(place))
        shards = source.counts("image")
        found = list(islice(((shard, n) for shard, size in enumerate(shards) for n in range(size)), count))
        if not found:
            raise DataError("None of its samples has one.")
    except DataError as error:
        raise UniLIPError(
            f"{place} holds no pictures that can be measured ({error}) Give a folder of pictures or .tar shards, a "
            ".jsonl file, hf:NAME, .parquet files or a saved dataset."
        ) from error

    def read(index: int) -> tuple[str, bytes]:
        try:
            record = source.read("image", *found[index])
        except DataError as error:
            raise ImageError(f"{error}; remove or replace it.") from error
        return record.name.removeprefix(f"{path}/"), record.pictures[0]

    return Pictures(len(found), read)


def open_dataset(path: Path, column: str | None = None) -> tuple[Any, str, list[Path]]:
    """Return .parquet files or a dataset, its column of encoded pictures, its files. Raises UniLIPError: none there."""
    import datasets

    files = [path] if path.suffix == ".parquet" else sorted(path.glob("**/*.parquet"))
    try:
        if files:
            data = datasets.Dataset.from_parquet([str(file) for file in files])
        else:
            data, files = datasets.load_from_disk(str(path)), sorted(path.glob("**/*.arrow"))
    except Exception as error:  # the library documents none
        raise UniLIPError(f"{path} holds no Parquet files and no saved dataset ({error}).") from error
    data = data["train"] if isinstance(data, Mapping) else data
    column = next((name for name in ([column] if column else COLUMNS) if name in data.column_names), None)
    if column is None:
        raise UniLIPError(f"{path} has no column of pictures; it has {', '.join(data.column_names)}.")
    return data.cast_column(column, datasets.Image(decode=False)), column, files


def cell(value: Mapping[str, Any] | None, name: str) -> bytes:
    """Return the bytes of a picture as datasets stores it, {"bytes", "path"}. Raises ImageError, naming it: none."""
    try:
        held = value or {"bytes": b""}
        return Path(held["path"]).read_bytes() if held["bytes"] is None else bytes(held["bytes"])
    except (OSError, TypeError) as error:
        raise ImageError(f"{name} holds no picture ({reason(error)}); remove or replace it.") from error
