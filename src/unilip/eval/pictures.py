"""Pictures from where people keep them: a folder, tar shards, Parquet files or a saved dataset.

Out: a `Pictures` that knows its names at once, and reads and decodes one picture at a time.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unilip.errors import ImageError, UniLIPError
from unilip.pictures import load_image, open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COLUMNS = ("image", "jpg", "png", "img")  # of datasets, the first that is there


class Pictures:
    """Named pictures, read when asked for: `names[i]`, `load(i)`, and `digest(i)`, which knows them by their bytes."""

    def __init__(self, names: Sequence[str], read: Callable[[int], bytes]) -> None:
        self.names = list(names)
        self.read = read

    def __len__(self) -> int:
        return len(self.names)

    def digest(self, index: int) -> str:
        """Return the SHA-256 of a picture's file, in hex. Raises ImageError, naming it: it cannot be read."""
        return hashlib.sha256(self._data(index)).hexdigest()

    def load(self, index: int) -> Image.Image:
        """Return an upright RGB picture. Raises ImageError: it cannot be decoded; the message names it."""
        return decode(self._data(index), self.names[index])

    def _data(self, index: int) -> bytes:
        try:
            return self.read(index)
        except Exception as error:  # whatever a file system or table raises
            raise ImageError(f"{self.names[index]} cannot be read ({error}); remove or replace it.") from error


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a picture file's bytes to an upright RGB picture. Raises ImageError, beginning with NAME: it cannot be."""
    try:
        return load_image(open_picture(data))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # whatever the decoder of a format raises for a broken file
        raise ImageError(f"{name} cannot be decoded ({error}); remove or replace it.") from error


def open_pictures(path: str | Path, count: int | None = None) -> Pictures:
    """Find the first COUNT pictures of a folder (subfolders too), of .tar or .parquet files or of a saved dataset.

    Raises UniLIPError: nothing is there, or nothing of these kinds.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UniLIPError(f"There is nothing at {path}; give a folder of pictures, .tar or .parquet files.")
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        found = Pictures([path.name], lambda _: path.read_bytes())
    elif shards := _files(path, ".tar"):
        found = _of_tars(shards)
    elif tables := _files(path, ".parquet"):
        rows = ParquetRows(tables)
        column = rows.image_column()
        found = Pictures([f"{n:08d}" for n in range(len(rows))], lambda i: rows.image(i, column))
    elif (path / "dataset_info.json").is_file():
        data, column = open_dataset(path)
        found = Pictures([f"{n:08d}" for n in range(len(data))], lambda i: cell_bytes(data[i][column]))
    else:
        files = sorted(file for file in path.glob("**/*") if file.suffix.lower() in SUFFIXES and file.is_file())
        names = [file.relative_to(path).as_posix() for file in files]
        found = Pictures(names, lambda i: files[i].read_bytes())
    if not len(found):
        raise UniLIPError(f"{path} holds no pictures; allowed: {', '.join(SUFFIXES)}, .tar, .parquet, a saved dataset.")
    if count is not None:
        found.names = found.names[:count]
    return found


def _files(path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == suffix else []
    return sorted(path.glob(f"*{suffix}"))


def _of_tars(shards: Sequence[Path]) -> Pictures:
    places: list[tuple[Path, int, int]] = []
    names = []
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                        places.append((shard, member.offset_data, member.size))
                        names.append(f"{shard.name}/{member.name}")
        except tarfile.TarError as error:
            raise UniLIPError(f"{shard} is no whole tar file ({error}); fetch it again.") from error

    def read(index: int) -> bytes:
        shard, start, size = places[index]
        with shard.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    return Pictures(names, read)


def open_dataset(path: Path, column: str | None = None) -> tuple[Any, str]:
    """Return a saved dataset of `datasets`, pictures encoded, and their column. Raises UniLIPError: it has none."""
    from datasets import Image as Pictured
    from datasets import load_from_disk

    data = load_from_disk(str(path))
    data = data["train"] if hasattr(data, "keys") else data
    column = next((name for name in ([column] if column else COLUMNS) if name in data.column_names), None)
    if column is None:
        raise UniLIPError(f"{path} has no column of pictures; it has {', '.join(data.column_names)}.")
    return data.cast_column(column, Pictured(decode=False)), column


class ParquetRows:
    """Rows of Parquet files: plain columns at once, pictures one row group at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow.parquet as parquet

        self.files = [parquet.ParquetFile(file) for file in files]
        self.starts: list[tuple[int, int, int]] = []  # first row of a row group, file, row group
        total = 0
        for f, file in enumerate(self.files):
            for group in range(file.num_row_groups):
                self.starts.append((total, f, group))
                total += file.metadata.row_group(group).num_rows
        self.total = total
        self.columns: list[str] = list(self.files[0].schema_arrow.names)
        self._group = lru_cache(maxsize=2)(self._read_group)

    def __len__(self) -> int:
        return self.total

    def plain(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        return [row for file in self.files for row in file.read(columns=list(columns)).to_pylist()]

    def image_column(self) -> str:
        column = next((name for name in COLUMNS if name in self.columns), None)
        if column is None:
            raise UniLIPError(f"The Parquet files have no column of pictures; they have {', '.join(self.columns)}.")
        return column

    def image(self, row: int, column: str) -> bytes:
        n = int(np.searchsorted([start for start, _, _ in self.starts], row, side="right")) - 1
        start, file, group = self.starts[n]
        return cell_bytes(self._group(file, group, column)[row - start])

    def _read_group(self, file: int, group: int, column: str) -> list[Any]:
        values: list[Any] = self.files[file].read_row_group(group, columns=[column]).column(0).to_pylist()
        return values


def cell_bytes(cell: object) -> bytes:
    """Return the picture in a cell: bytes, or {"bytes", "path"} as datasets stores it. Raises ImageError: neither."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if data is None and isinstance(cell, Mapping) and cell.get("path"):
        return Path(str(cell["path"])).read_bytes()
    if not isinstance(data, bytes):
        raise ImageError(f"The cell holds {type(data).__name__}, not the bytes of a picture.")
    return data
