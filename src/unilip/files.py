"""Files: written whole or not at all, read with an error that says what is wrong, and told apart by their content.

Values are read as UTF-8 with or without a byte order mark; fingerprints change when a file's content does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unilip.errors import UniLIPError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

T = TypeVar("T")
PART = ".part"  # ending of what is not finished
TAIL = 4096  # bytes at the end of a file's data that, with its size, tell pictures apart; texts are mostly no longer


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name, of this process alone, that takes `path`'s place when the block ends well, else vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(path.name.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    temporary = path.with_name(f".{name}.{os.getpid()}{PART}")
    for left in path.parent.glob(f".{name}.*{PART}"):  # of processes that were killed
        if left == temporary or not _alive(left.name.split(".")[2]):
            remove(left)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def _alive(process: str) -> bool:
    """Whether a process of this machine is there; what is no number of one counts as being so."""
    try:
        os.kill(int(process), 0)
    except (ValueError, OSError) as error:
        return not isinstance(error, ProcessLookupError)
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; makes its folder."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; half a surrogate pair, as of a file's name, is escaped as in JSON."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def png_bytes(image: Image.Image, notes: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture as PNG with text chunks; equal pictures and notes give equal bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=png_notes(notes or {}))
    return stream.getvalue()


def png_notes(notes: Mapping[str, str]) -> PngInfo:
    """Return the text chunks of a PNG."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in notes.items():
        info.add_text(key, value) if value.isascii() else info.add_itxt(key, value)
    return info


def decode_text(data: bytes) -> str:
    """Decode UTF-8, without a byte order mark if there is one; raises UnicodeDecodeError."""
    return data.decode("utf-8-sig")


def read_text(path: Path, what: str = "file") -> str:
    """Read UTF-8 text without its byte order mark. Raises UniLIPError: there is no such file, or no UTF-8 text."""
    try:
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UniLIPError(f"There is no {what} {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UniLIPError(f"The {what} {path} cannot be read ({error}); give a UTF-8 text file.") from error


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON value. Raises UniLIPError: there is no such file, or it is not JSON."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UniLIPError(f"The {what} {path} cannot be read ({error}); give a whole JSON file.") from error


def read_table(package: str, name: str) -> Any:
    """Read a JSON file that lies in a package."""
    return json.loads((resources.files(package) / name).read_text(encoding="utf-8"))


def fill_page(package: str, name: str, /, **values: Any) -> str:
    """Fill a page of HTML, a Jinja template that lies in a package: values are escaped, and none may be missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader(package, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return pages.get_template(name).render(values)


def lines_of(text: str) -> list[str]:
    r"""Split text at \n and \r\n alone: U+2028 and its kin may stand inside a JSON string."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_lines(path: Path, what: str = "file") -> list[dict[str, Any]]:
    """Read JSON lines, one object each, but for empty ones. Raises UniLIPError: no such file, a line is no object."""
    lines = enumerate(lines_of(read_text(path, what)), 1)
    return [read_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def read_object(line: str, where: str) -> dict[str, Any]:
    """Read a line of JSON lines. Raises UniLIPError, which says `where`: it is no JSON, or no object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UniLIPError(f"{where} is not JSON ({error}); write one object on each line.") from error
    if not isinstance(row, dict):
        raise UniLIPError(f"{where} is not a JSON object; write one object on each line.")
    return row


def retried(call: Callable[[], T], attempts: int = 3, wait: float = 0.2) -> T:
    """Return what `call` returns, trying again after `wait`, 4 x `wait`, ... seconds; the last error is raised."""
    for attempt in range(attempts - 1):
        try:
            return call()
        except Exception:  # each file system and network library has its own
            time.sleep(wait * 4**attempt)
    return call()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*parts: object) -> str:
    """Return 24 hex digits of bytes, strings and JSON-like values; the order of a mapping's keys does not count."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        text = part if isinstance(part, (str, bytes)) else json.dumps(part, sort_keys=True, default=str)
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def stable_hash(*parts: object) -> int:
    """Return 64 bits that depend on the text of PARTS alone: the same on every machine and in every run."""
    text = "\x1f".join(str(part) for part in parts)
    data = text.encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def stable_fraction(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the text of PARTS alone."""
    return stable_hash(*parts) / 2.0**64


def generator(*parts: object) -> random.Random:
    """Return a fresh generator seeded from PARTS, such as (seed, split, index)."""
    return random.Random(stable_hash(*parts))


def stamp(path: Path) -> list[int]:
    """Return size, times of change and inode of a file: equal stamps, equal content, whatever its own time."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def mark(path: Path) -> list[int]:
    """Return size and a checksum of the last bytes of a file: cheap, and different for different pictures."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - TAIL))
        return [size, zlib.crc32(stream.read(TAIL))]


def crc(path: Path) -> list[int]:
    """Return the size of a file in bytes and the CRC-32 of all of it."""
    value = size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


class Lock(contextlib.AbstractContextManager["Lock"]):
    """A lock file that one process holds until it ends. Raises UniLIPError, as `busy` says: another holds it."""

    def __init__(self, file: Path, busy: str) -> None:
        from filelock import FileLock, Timeout

        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = file, FileLock(file, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise UniLIPError(busy) from None

    def release(self) -> None:
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # Windows: it is open still
                self._file.unlink()
            self._lock.release()

    def __exit__(self, *_: object) -> None:
        self.release()
