"""WebDataset shards, local or remote: tar files whose members `KEY.jpg`, `KEY.txt` ... make one sample for each KEY.

Goes in: the paths or addresses of tar files. Comes out: any sample by shard and place, without reading what lies
before it. An index of each shard's members is built once (a pass over the headers) and kept in the cache folder, or
comes as `NAME.tar.index.json` beside the shard. A remote shard is fetched whole when its turn comes and kept on disk
within a limit. Members of a sample: `jpg` (or png, webp) with `txt`; `input.jpg`, `output.jpg`, `txt`; `json` with
conversations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unilip.data.errors import DataError
from unilip.data.records import IMAGE_SUFFIXES, KINDS, Record, Unreadable

logger = logging.getLogger(__name__)
FORMAT = 1  # of the index files
INDEX_SUFFIX = ".index.json"
ZEROS = bytes(tarfile.BLOCKSIZE)
PICTURES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
ATTEMPTS = 3  # to fetch a remote shard
OPEN_SHARDS = 32  # files and indices that a process holds

Members = dict[str, tuple[int, int]]  # ending -> offset and size of the data


def cache_folder() -> Path:
    """Where indices and fetched shards are kept: $UNILIP_CACHE, or ~/.cache/unilip/shards."""
    return Path(os.environ.get("UNILIP_CACHE") or Path.home() / ".cache" / "unilip" / "shards").expanduser()


def is_remote(location: str) -> bool:
    """Whether a location is an address rather than a path."""
    return "://" in location


# --- the index of one shard -----------------------------------------------------------------------------------------


@dataclass
class ShardIndex:
    """The samples of a shard by kind: key and members. `fault` says where a damaged shard ends to be readable."""

    size: int
    fault: str
    samples: dict[str, list[tuple[str, Members]]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each kind."""
        return {kind: len(self.samples[kind]) for kind in KINDS}

    def head(self) -> dict[str, Any]:
        """What is asked of a shard before any sample is: the first line of its index file."""
        return {"format": FORMAT, "size": self.size, "fault": self.fault, "counts": self.counts}

    def write(self, path: Path) -> None:
        """Write the index, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.head()) + "\n")
            file.write(json.dumps(self.samples) + "\n")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Read an index file back."""
        with path.open(encoding="utf-8") as file:
            head, samples = json.loads(file.readline()), json.loads(file.readline())
        return cls(head["size"], head["fault"], samples)


def read_head(path: Path, size: int | None) -> dict[str, Any] | None:
    """Return the first line of an index file if it belongs to a shard of that size, else None."""
    try:
        with path.open(encoding="utf-8") as file:
            head: dict[str, Any] = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    fits = head.get("format") == FORMAT and (size is None or head.get("size") == size)
    return head if fits else None


def scan(path: Path) -> ShardIndex:
    """Read the headers of a tar file: -> its samples, up to the place where it is damaged, if it is."""
    size = path.stat().st_size
    groups: dict[str, Members] = {}
    fault = ""
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    if member.isfile():
                        if member.offset_data + member.size > size:
                            raise tarfile.ReadError("unexpected end of data")
                        key, ending = split_name(member.name)
                        groups.setdefault(key, {})[ending] = (member.offset_data, member.size)
            except tarfile.TarError as error:
                fault = f"{error} after byte {tar.offset}"
            if not fault:
                fault = _unfinished(path, tar.offset, size)
    except (tarfile.TarError, OSError, EOFError) as error:
        fault = f"no tar file ({error})"
    if fault and len(groups) > 1 and len(list(groups.values())[-1]) < len(list(groups.values())[-2]):
        groups.popitem()  # the sample that the damage cut in two
    samples: dict[str, list[tuple[str, Members]]] = {kind: [] for kind in KINDS}
    for key, members in groups.items():
        for kind, parts in kinds_of(members):
            samples[kind].append((key, parts))
    return ShardIndex(size, fault, samples)


def _unfinished(path: Path, offset: int, size: int) -> str:
    """Say what is wrong where the tar library silently stopped: an archive ends with a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block == ZEROS:
        return ""
    return f"damaged after byte {offset}" if len(block) == tarfile.BLOCKSIZE else f"cut off at byte {size}"


def split_name(name: str) -> tuple[str, str]:
    """Split the path of a member at the first dot of its file name, as WebDataset does: -> key, ending."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def kinds_of(members: Members) -> Iterator[tuple[str, Members]]:
    """Yield each kind that a sample can serve as, with the members that it needs."""
    cached = next((kind for kind in KINDS if f"{kind}.npz" in members), None)
    if cached is not None:
        yield (
            cached,
            {part: members[part] for part in ("txt", "json") if part in members} | {"npz": members[f"{cached}.npz"]},
        )
        return
    plain = next((members[e] for e in PICTURES if e in members), None)
    pair = [
        next((members[f"{part}.{e}"] for e in PICTURES if f"{part}.{e}" in members), None)
        for part in ("input", "output")
    ]
    text = {"txt": members["txt"]} if "txt" in members else {}
    for picture in (plain, *pair):
        if picture is not None:
            yield "image", {"image": picture}
    if any(pair):
        found = {name: part for name, part in zip(("source", "target"), pair, strict=True) if part is not None}
        yield "edit", found | text
    elif plain is not None and (text or "json" not in members):
        yield "caption", {"image": plain} | text
    if "json" in members:
        talk = {"json": members["json"]} | text
        if plain is not None:
            yield "talk", {"image": plain} | talk
        elif not any(pair):
            yield "text", talk


# --- shards ---------------------------------------------------------------------------------------------------------


class Shards:
    """The samples of a list of tar files. `keep_gb` bounds the remote shards on disk.

    A damaged shard is named in the log and in `faults`; what comes before the damage is used.

    Raises:
        DataError: none of the shards can be read.
    """

    def __init__(self, shards: Sequence[str], location: str, keep_gb: float = 50.0) -> None:
        self.shards, self.location, self.keep_gb = list(shards), location, keep_gb
        self.faults: list[str] = []
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Path]] = {}
        self._process = os.getpid()
        self._heads = [self._head(shard) for shard in self._watched()]
        for shard, head in zip(self.shards, self._heads, strict=True):
            if head["fault"]:
                self.faults.append(f"{shard}: {head['fault']}")
                used = sum(head["counts"][kind] for kind in KINDS if kind != "image")
                logger.warning("%s is damaged (%s); %d samples of it are used", shard, head["fault"], used)
        if not any(sum(head["counts"].values()) for head in self._heads):
            known = "; their members must be jpg + txt, input.jpg + output.jpg + txt, or json"
            why = f" ({self.faults[0]})" if self.faults else known
            raise DataError(f"{location}: none of {len(self.shards)} shards holds a sample{why}.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_pool": None, "_coming": {}}

    def counts(self, kind: str) -> list[int]:
        """Return how many samples of a kind each shard has."""
        return [int(head["counts"][kind]) for head in self._heads]

    def read(self, kind: str, shard: int, place: int) -> Record:
        """Read one sample; raises `Unreadable`."""
        self._own_process()
        file, index = self._opened(shard)
        key, members = index.samples[kind][place]
        name = f"{self.shards[shard]}/{key}"
        try:
            data = {part: _read_at(file, offset, size) for part, (offset, size) in members.items()}
        except OSError as error:
            raise Unreadable("shard unreadable", f"{name}: {error}") from error
        if kind == "edit" and "npz" not in data and not {"source", "target"} <= data.keys():
            raise Unreadable("picture missing", f"{name} has only one of input and output")
        pictures = tuple(data[part] for part in ("image", "source", "target") if part in data)
        return Record(name, pictures, data.get("txt"), data.get("json"), data.get("npz"))

    def expect(self, shards: Sequence[int]) -> None:
        """Begin to fetch remote shards in the background."""
        self._own_process()
        for shard in shards:
            if is_remote(self.shards[shard]) and shard not in self._coming and not _kept(self.shards[shard]).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="fetch")
                self._coming[shard] = self._pool.submit(self._bring, self.shards[shard])

    def _bring(self, location: str) -> Path:
        """Return where a shard lies on this machine, after fetching it if need be."""
        return fetch(location, self.keep_gb) if is_remote(location) else Path(location)

    def _own_process(self) -> None:
        """Forget what a parent process opened: a forked one would share its places in files, and has no threads."""
        if self._process != os.getpid():
            self._open, self._pool, self._coming, self._process = OrderedDict(), None, {}, os.getpid()

    def _watched(self) -> Iterator[str]:
        """The shards, with a bar where there are many to be indexed."""
        from tqdm.auto import tqdm

        yield from tqdm(self.shards, desc="shards", unit="shard", leave=False, delay=5, disable=None)

    def _head(self, shard: str) -> dict[str, Any]:
        try:
            path, size = self._index_path(shard)
            head = None if path is None else read_head(path, size)
            if head is None:
                head = self._build(shard).head()
            return head
        except (OSError, Unreadable) as error:
            return {"fault": f"cannot be opened ({error})", "counts": dict.fromkeys(KINDS, 0)}

    def _index_path(self, shard: str) -> tuple[Path | None, int | None]:
        """Where the index of a shard lies, and the size that its shard must have (None: not known yet)."""
        own = index_cache(shard)
        if is_remote(shard):
            if own.exists() or _fetch_index(shard, own):
                return own, None
            return None, None
        stat = Path(shard).stat()
        beside = Path(shard + INDEX_SUFFIX)
        if beside.exists() and beside.stat().st_mtime >= stat.st_mtime:
            return beside, stat.st_size
        fresh = own.exists() and own.stat().st_mtime >= stat.st_mtime
        return (own if fresh else None), stat.st_size

    def _build(self, shard: str) -> ShardIndex:
        index = scan(self._bring(shard))
        with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, not the run
            index.write(index_cache(shard))
        return index

    def _opened(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        location = self.shards[shard]
        try:
            coming = self._coming.pop(shard, None)
            path = self._bring(location) if coming is None else coming.result()
            where, size = self._index_path(location)
            if where is not None and read_head(where, size) is not None:
                index = ShardIndex.read(where)
            else:
                index = self._build(location)
            file = path.open("rb")
        except OSError as error:
            raise Unreadable("shard unreadable", f"{location}: {error}") from error
        if index.counts != self._heads[shard]["counts"]:
            file.close()
            raise DataError(f"{location} has changed since the run began; leave shards alone while it reads them.")
        self._open[shard] = file, index
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard]


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError(f"it ends {size - len(data)} bytes early")
    return data


def _name_in_cache(location: str) -> str:
    text = location if is_remote(location) else str(Path(location).resolve())
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def index_cache(location: str) -> Path:
    """Where the index of a shard is kept."""
    return cache_folder() / f"{_name_in_cache(location)}{INDEX_SUFFIX}"


# --- remote shards --------------------------------------------------------------------------------------------------


def _kept(location: str) -> Path:
    return cache_folder() / f"{_name_in_cache(location)}.tar"


def fetch(location: str, keep_gb: float, bring: Callable[[str, Path], None] | None = None) -> Path:
    """Bring a remote shard to the cache folder, once for all processes of the machine; drops those not used for long.

    `bring` writes it to a path in another way than by downloading.

    Raises:
        Unreadable: it cannot be fetched after three attempts.
    """
    from filelock import FileLock

    path = _kept(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with FileLock(str(path.with_suffix(".lock"))):
            if not path.exists():
                (bring or _download)(location, path)
                _drop_old(path, keep_gb)
    with contextlib.suppress(OSError):
        os.utime(path)  # the time of the last use
    return path


def _download(location: str, path: Path) -> None:
    import fsspec

    temporary = path.with_name(f".{path.name}.part")
    for attempt in range(ATTEMPTS):
        try:
            system, place = fsspec.core.url_to_fs(location)
            system.get_file(place, str(temporary))
            os.replace(temporary, path)
            return
        except Exception as error:  # each file system has its own
            temporary.unlink(missing_ok=True)
            if attempt == ATTEMPTS - 1:
                why = " ".join(str(error).split()) or type(error).__name__
                raise Unreadable("shard unreachable", f"{location}: {why}") from error
            time.sleep(0.2 * 4**attempt)


def _fetch_index(location: str, path: Path) -> bool:
    """Bring the index that lies beside a remote shard, if one does."""
    import fsspec

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        system, place = fsspec.core.url_to_fs(location + INDEX_SUFFIX)
        system.get_file(place, str(temporary))
        if read_head(temporary, None) is None:
            raise OSError("no index")
        os.replace(temporary, path)
        return True
    except Exception:  # mostly: there is none
        temporary.unlink(missing_ok=True)
        return False


def _drop_old(newest: Path, keep_gb: float) -> None:
    """Delete fetched shards, the longest unused first, until the rest fits; an open one stays readable (POSIX)."""
    found = sorted(newest.parent.glob("*.tar"), key=lambda p: p.stat().st_mtime)
    total = sum(p.stat().st_size for p in found)
    for path in found:
        if total <= keep_gb * 1e9 or path == newest:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


# --- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples to `NAME-000000.tar`, ..., at most `count` samples in each, every shard with its index beside it.

    A shard appears under its name when it is whole; what was left of an earlier attempt is written anew.
    """

    def __init__(self, folder: Path, name: str, count: int = 10_000, first: int = 0) -> None:
        self.folder, self.name, self.count = folder, name, count
        self.number, self.inside = first, 0
        self.written: list[Path] = []
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Begin a shard where none is being written; one that gets no sample is written, too."""
        import webdataset

        if self._writer is None:
            self._file = self._temporary().open("wb")
            self._writer = webdataset.TarWriter(self._file, encoder=False, mtime=0.0)

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Add a sample: ending -> bytes."""
        self.begin()
        self._writer.write({"__key__": key, **members})
        self.inside += 1
        if self.inside >= self.count:
            self.close()

    def close(self) -> None:
        """Finish the shard that is being written."""
        if self._writer is None:
            return
        self._writer.close()
        self._file.close()
        self._writer = None
        path = self.folder / f"{self.name}-{self.number:06d}.tar"
        index = scan(self._temporary())
        os.replace(self._temporary(), path)
        index.write(Path(f"{path}{INDEX_SUFFIX}"))
        self.written.append(path)
        self.number, self.inside = self.number + 1, 0

    def _temporary(self) -> Path:
        return self.folder / f".{self.name}-{self.number:06d}.tar.part"
