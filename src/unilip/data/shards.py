"""WebDataset shards, local or remote: tar files whose members `KEY.jpg`, `KEY.txt` ... make one sample for each KEY.

In: paths or addresses of tar files. Out: any sample by shard and place. An index of each shard's members is built once
and kept in the cache folder, or comes as `NAME.tar.index.json` beside the shard. A remote shard is fetched whole in its
turn. Members: `jpg` (or png, webp) with `txt`; `input.jpg`, `output.jpg`, `txt`; `json` with conversations.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tarfile
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from unilip.data.records import KINDS, PICTURES, Record, Unreadable, is_litter, json_meaning, kinds_of, make_record
from unilip.errors import DataError, UniLIPError, reason
from unilip.files import TAIL, content_hash, read_json, replacing, retried, stamp, write_json, write_text

logger = logging.getLogger(__name__)
FORMAT = 3  # of the index files
INDEX_SUFFIX = ".index.json"
ZEROS = bytes(tarfile.BLOCKSIZE)
TEXTS = {"txt", "texts", "about", "json"}  # a text, several in JSON, metadata with a caption, a conversation
ENDINGS = {
    *PICTURES, *TEXTS, *(f"{part}.{e}" for part in ("input", "output") for e in PICTURES),
    *(f"{kind}.npz" for kind in KINDS),
}  # fmt: skip
PROBES = 16  # members of a shard that are looked at to tell whether an index is its own
MAX_HEAD = 1 << 20
BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of JSON that is not what it should be
TELLING = (  # what file systems call that which changes with a file
    "size", "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "mtime",
    "modified", "created", "generation", "md5Hash", "md5", "blob_id", "version_id", "VersionId", "ino",
)  # fmt: skip
OPEN_SHARDS = 32  # files and indices that a process holds

Member = tuple[int, int, int]  # offset and size of the data, and a checksum of the header and of the data's end
Members = dict[str, Member]  # by ending
Head = dict[str, Any]  # what is asked of a shard before any sample is: the first line of its index file
Samples = dict[str, list[tuple[str, Members]]]  # by kind: key and members; the second line


def is_remote(location: str) -> bool:
    """Whether a location is an address rather than a path."""
    return "://" in location


# --- the index of one shard -----------------------------------------------------------------------------------------


def write_index(path: Path, head: Head, samples: Samples) -> None:
    """Write the two lines of an index file."""
    write_text(path, json.dumps(head) + "\n" + json.dumps(samples) + "\n")


def read_head(path: Path) -> Head | None:
    """Return the first line of an index file, or None where it is none of this format."""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline(MAX_HEAD))
        numbers = [*head["counts"].values(), *head["ignored"].values()]
        whole = head["format"] == FORMAT and all(type(n) is int and 0 <= n <= head["size"] for n in numbers)
        whole = whole and set(head["counts"]) == set(KINDS) and isinstance(head["fault"], str)
        whole = whole and bool(head["content"]) and "stamp" in head
        return head if whole and all(_fits(probe, head["size"]) for probe in head["probes"]) else None
    except (OSError, *BROKEN):
        return None


def read_samples(path: Path, head: Head) -> Samples | None:
    """Return the second line of an index file, or None where it is not that of its head, or says what cannot be."""
    try:
        with path.open(encoding="utf-8") as file:
            samples: Samples = json.loads(file.readlines()[1])
        whole = set(samples) == set(KINDS) and content_hash(samples) == head["content"]
        for key, parts in itertools.chain(*samples.values()):
            whole = whole and isinstance(key, str) and all(_fits(member, head["size"]) for member in parts.values())
        return samples if whole else None
    except BROKEN:
        return None


def _fits(member: Sequence[Any], shard: int) -> bool:
    """Whether what an index says of a member can be true of a shard of so many bytes."""
    offset, size, check = member
    numbers = type(offset) is type(size) is type(check) is int
    return numbers and offset >= tarfile.BLOCKSIZE and 0 <= size <= shard - offset


def belongs(head: Head, path: Path) -> bool:
    """Whether a shard holds what an index says, by its size and by looking where some of its members should be."""
    try:
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == head["size"]
            return whole and all(_read_member(file, *probe) is not None for probe in head["probes"])
    except OSError:
        return False


def scan(path: Path) -> tuple[Head, Samples]:
    """Make the index of a tar file, or of several concatenated ones, from the headers, as far as they are whole."""
    size, fault, archive = path.stat().st_size, "", 0
    found: dict[tuple[int, str], Member] = {}  # in the order of the shard: archive and name -> member
    meanings: dict[tuple[int, str], str] = {}  # of each json
    with path.open("rb") as file:
        offset: int | None = 0
        while offset is not None and not fault:
            file.seek(offset)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    try:
                        for member in tar:
                            if member.isfile():
                                if member.size < 0 or member.offset_data + member.size > size:
                                    raise tarfile.ReadError("unexpected end of data")
                                place = archive, member.name.removeprefix("./")
                                found[place] = _measure(file, member.offset_data, member.size)
                                if place[1].lower().endswith(".json"):
                                    file.seek(member.offset_data)
                                    meanings[place] = json_meaning(file.read(member.size))
                    except tarfile.TarError as error:
                        fault = f"{error} after byte {tar.offset}"
                    end = tar.offset
                if not fault:
                    fault, offset = _after(file, end, size)
            except (tarfile.TarError, OSError, EOFError) as error:
                fault = f"no tar file{f' after byte {offset}' if offset else ''} ({error})"
            archive += 1
    return _index(size, fault, found, meanings)


def _after(file: BinaryIO, end: int, size: int) -> tuple[str, int | None]:
    """Where the tar library stopped: what is wrong there, and where another archive begins behind the end mark."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block != ZEROS:
        where = f"damaged after byte {end}" if len(block) == tarfile.BLOCKSIZE else f"cut off at byte {size}"
        return where, None
    while block == ZEROS:
        end += tarfile.BLOCKSIZE
        block = file.read(tarfile.BLOCKSIZE)
    return "", end if block.strip(b"\0") else None


def _measure(file: BinaryIO, offset: int, size: int) -> Member:
    """A member with the checksum of its header and of the end of its data."""
    file.seek(offset - tarfile.BLOCKSIZE)
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(offset + max(0, size - TAIL))
    return offset, size, zlib.crc32(file.read(min(size, TAIL)), zlib.crc32(header))


def _read_member(file: BinaryIO, offset: int, size: int, check: int) -> bytes | None:
    """The data of a member, or None where another one lies there."""
    file.seek(offset - tarfile.BLOCKSIZE)
    data = file.read(tarfile.BLOCKSIZE + size)
    header, data = data[: tarfile.BLOCKSIZE], data[tarfile.BLOCKSIZE :]
    whole = len(data) == size and zlib.crc32(data[max(0, size - TAIL) :], zlib.crc32(header)) == check
    return data if whole else None


def _index(
    size: int, fault: str, found: Mapping[tuple[int, str], Member], meanings: Mapping[tuple[int, str], str]
) -> tuple[Head, Samples]:
    groups: dict[tuple[int, str], dict[str, Members]] = {}  # by archive and key: by what is between key and ending
    for (archive, name), member in found.items():
        if is_litter(name):
            continue
        folder, slash, file = name.rpartition("/")
        key, _, ending = file.partition(".")  # at the first dot, as WebDataset does
        stem, ending = "", ending.lower()
        if ending not in ENDINGS:  # a name with dots, or what belongs to the sample but is not read
            stem, _, ending = ending.rpartition(".")
            if ending in PICTURES and stem.endswith((".input", ".output")):
                stem, _, part = stem.rpartition(".")
                ending = f"{part}.{ending}"
        group = groups.setdefault((archive, f"{folder}{slash}{key}"), {"": {}}).setdefault(stem, {})
        group[meanings[archive, name] or "metadata" if ending == "json" else ending] = member
    ignored: Counter[str] = Counter()
    named: list[tuple[str, Members]] = []
    for (_, key), stems in groups.items():
        plain = stems.pop("")
        known = {ending: member for ending, member in plain.items() if ending in ENDINGS}
        ignored.update(ending or "none" for ending in plain if ending not in known)
        if known:
            named.append((key, known))
        for stem, group in stems.items():
            pair = any(ending.rpartition(".")[2] in PICTURES for ending in group) and not TEXTS.isdisjoint(group)
            if pair or not (known or ENDINGS.isdisjoint(group)):
                named.append((f"{key}.{stem}", group))
            else:
                ignored.update(".".join(filter(None, (stem, ending))) for ending in group)
    if fault and len(named) > 1 and len(named[-1][1]) < len(named[-2][1]):
        named.pop()  # the sample that the damage cut in two
    texts = any(not TEXTS.isdisjoint(group) for _, group in named)
    samples: Samples = {kind: [] for kind in KINDS}
    for key, group in named:
        kinds = list(kinds_of(group, texts))
        for kind, parts in kinds:
            samples[kind].append((key, parts))
        if not kinds:
            ignored.update(f"{ending} without a picture" for ending in group)
    members = [member for rows in samples.values() for _, parts in rows for member in parts.values()]
    probes = {*members[:: max(1, len(members) // PROBES)], *members[-1:]}
    head = {
        "format": FORMAT, "size": size, "fault": fault, "counts": {kind: len(rows) for kind, rows in samples.items()},
        "ignored": dict(ignored.most_common(9)), "stamp": None, "content": content_hash(samples),
        "probes": sorted(probes),
    }  # fmt: skip
    return head, samples


# --- shards ---------------------------------------------------------------------------------------------------------


class Shards:
    """The samples of tar files, of damaged ones what comes before. Raises DataError: none of the shards can be read."""

    beside = True  # whether an index may lie beside a remote shard
    _process: int | None = None  # the one that has the rest
    _open: OrderedDict[int, tuple[BinaryIO, Samples]]
    _turn: threading.Lock  # one shard is fetched ahead at a time
    _coming: dict[int, threading.Thread]

    def __init__(self, shards: Sequence[str], location: str, keep_gb: float = 50.0) -> None:
        self.shards, self.location, self.keep_gb = list(shards), location, keep_gb  # at most, of remote ones on disk
        self.faults: list[str] = []
        self._stamps = self._identify()
        bar = tqdm(range(len(self.shards)), desc="shards", unit="shard", leave=False, delay=5, disable=None)
        self._heads = [self._head(number) for number in bar]
        ignored: Counter[str] = Counter()
        for shard, head in zip(self.shards, self._heads, strict=True):
            ignored.update(head["ignored"])
            if head["fault"]:
                self.faults.append(f"{shard}: {head['fault']}")
                used = sum(head["counts"][kind] for kind in KINDS if kind != "image")
                logger.warning("%s is damaged (%s); %d samples of it are used", shard, head["fault"], used)
        members = ", ".join(f"{ending} ({count:,})" for ending, count in ignored.most_common(9))
        self.notes = [f"members that no sample has a use for: {members}"] if members else []
        if not any(sum(head["counts"].values()) for head in self._heads):
            known = "; their members must be jpg + txt, input.jpg + output.jpg + txt, or json"
            why = f" ({self.faults[0]})" if self.faults else known
            raise DataError(f"{location}: none of {len(self.shards)} shards holds a sample{why}.")

    def __getstate__(self) -> dict[str, Any]:
        own = ("_process", "_open", "_turn", "_coming")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def counts(self, kind: str) -> list[int]:
        return [int(head["counts"][kind]) for head in self._heads]

    def read(self, kind: str, shard: int, place: int) -> Record:
        self._own_process()
        file, samples = self._opened(shard)
        key, members = samples[kind][place]
        name = f"{self.shards[shard]}/{key}"
        data: dict[str, bytes] = {}
        for part, member in members.items():
            try:
                found = _read_member(file, *member)
            except OSError as error:
                raise Unreadable("shard unreadable", f"{name}: {error}") from error
            if found is None:
                raise Unreadable("shard unreadable", f"{name} is not where it was; the file has changed or was cut off")
            data[part] = found
        return make_record(name, kind, data)

    def signature(self) -> str:
        """Return a hash of the content of all shards, whatever they are called and wherever they lie."""
        known = zip(self._heads, self._stamps, strict=True)
        return content_hash([head.get("content") or stamped or head["counts"] for head, stamped in known])

    def expect(self, shards: Sequence[int]) -> None:
        self._own_process()
        for shard in shards:
            if is_remote(self.shards[shard]) and shard not in self._coming and not self._kept(shard).exists():
                # unlike a pool's, such a thread keeps no program from ending
                self._coming[shard] = threading.Thread(target=self._fetch, args=(shard,), daemon=True, name="fetch")
                self._coming[shard].start()

    def _fetch(self, shard: int) -> None:
        with self._turn, contextlib.suppress(Exception):  # who reads the shard tries again, and is told
            self._bring(shard)

    def _identify(self) -> list[Any]:
        """What says that a remote shard is another one than before, of each; None for those on this machine."""
        with ThreadPoolExecutor(16, thread_name_prefix="ask") as pool:
            return list(pool.map(lambda shard: remote_stamp(shard) if is_remote(shard) else None, self.shards))

    def _kept(self, shard: int) -> Path:
        return index_cache(self.shards[shard], self._stamps[shard], ".tar")

    def _bring(self, shard: int) -> Path:
        """Return where a shard lies here; a remote one is fetched once for all processes, and old ones are dropped."""
        if not is_remote(self.shards[shard]):
            return Path(self.shards[shard])
        from filelock import FileLock

        path = self._kept(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(str(path.with_suffix(".lock"))):
                if not path.exists():
                    try:
                        self._write(self.shards[shard], path)
                    except Exception as error:  # of the network, of the format, of a library
                        raise Unreadable("shard unreachable", f"{self.shards[shard]}: {reason(error)}") from error
                    found = sorted(path.parent.glob("*.tar"), key=lambda p: p.stat().st_mtime)
                    total = sum(p.stat().st_size for p in found)
                    for old in found:  # the longest unused first; an open one stays readable (POSIX)
                        if total <= self.keep_gb * 1e9 or old == path:
                            break
                        total -= old.stat().st_size
                        old.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of the last use
        return path

    def _write(self, location: str, path: Path) -> None:
        """Fetch a remote shard, in three attempts."""
        retried(lambda: _get(location, path))

    def _own_process(self) -> None:
        """Forget what a parent process opened: a forked one would share its places in files, and has no threads."""
        if self._process != os.getpid():
            self._open, self._turn, self._coming, self._process = OrderedDict(), threading.Lock(), {}, os.getpid()

    def _head(self, shard: int) -> Head:
        try:
            known = self._known(shard)
            return known[1] if known else self._build(shard)[0]
        except (OSError, Unreadable) as error:
            return {"fault": f"cannot be opened ({error})", "counts": dict.fromkeys(KINDS, 0), "ignored": {}}

    def _known(self, shard: int) -> tuple[Path, Head] | None:
        """An index of just this shard, kept or beside it, and its head."""
        location = self.shards[shard]
        own = index_cache(location, self._stamps[shard])
        head = read_head(own)
        if is_remote(location):
            if head is None and self.beside:
                with contextlib.suppress(Exception):  # mostly: none lies there
                    _get(location + INDEX_SUFFIX, own)
                head = read_head(own)
            return None if head is None else (own, head)
        if head is not None and head["stamp"] == stamp(Path(location)):
            return own, head
        beside = Path(location + INDEX_SUFFIX)
        head = read_head(beside)
        return (beside, head) if head is not None and belongs(head, Path(location)) else None

    def _build(self, shard: int) -> tuple[Head, Samples]:
        path = self._bring(shard)
        before = None if is_remote(self.shards[shard]) else stamp(path)
        head, samples = scan(path)
        head["stamp"] = before
        with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, not the run
            write_index(index_cache(self.shards[shard], self._stamps[shard]), head, samples)
        return head, samples

    def _opened(self, shard: int) -> tuple[BinaryIO, Samples]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        location = self.shards[shard]
        try:
            self._coming.pop(shard, None)
            path = self._bring(shard)  # which waits where another thread or process has begun
            known = self._known(shard)
            samples = read_samples(*known) if known and belongs(known[1], path) else None
            samples = samples or self._build(shard)[1]
            file = path.open("rb")
        except OSError as error:
            raise Unreadable("shard unreadable", f"{location}: {error}") from error
        if {kind: len(rows) for kind, rows in samples.items()} != self._heads[shard]["counts"]:
            file.close()
            raise DataError(f"{location} has changed since the run began; leave shards alone while it reads them.")
        self._open[shard] = file, samples
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard]


def index_cache(location: str, version: Any = None, ending: str = INDEX_SUFFIX) -> Path:
    """Where the index of a shard, or what else ENDING says, is kept; `version` is a remote one's `remote_stamp`."""
    folder = Path(os.environ.get("UNILIP_CACHE") or Path.home() / ".cache" / "unilip" / "shards").expanduser()
    text = location if is_remote(location) else str(Path(location).resolve())
    return folder / f"{content_hash(text, version)}{ending}"


# --- remote shards --------------------------------------------------------------------------------------------------


def remote_stamp(location: str) -> Any:
    """Ask a server for the size, tag and times of a shard; what it said last where it does not answer now."""
    import fsspec

    seen = index_cache(location, "seen", ".seen.json")
    try:
        system, place = fsspec.core.url_to_fs(location)
        about = system.info(place)
        found = {name: str(about[name]) for name in TELLING if about.get(name) is not None}
        with contextlib.suppress(OSError, UniLIPError):
            if not seen.exists() or read_json(seen) != found:
                write_json(seen, found)
        return found
    except Exception:  # each file system has its own; if it stays away, fetching the shard will say so
        with contextlib.suppress(UniLIPError):
            return read_json(seen)
        return None


def _get(location: str, path: Path) -> None:
    import fsspec

    system, place = fsspec.core.url_to_fs(location)
    with replacing(path) as part:
        system.get_file(place, str(part))


# --- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """Yield what adds a sample, its key and members, to a tar file that is there once the block ends well."""
    import webdataset

    with replacing(path) as part, part.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as tar:
        yield lambda key, members: tar.write({"__key__": key, **members})


@contextlib.contextmanager
def writing_shard(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """The same, with the shard's index beside it; see `is_written`."""
    with writing(path) as write:
        yield write
    write_index(Path(f"{path}{INDEX_SUFFIX}"), *scan(path))


def is_written(path: Path) -> bool:
    """Whether `writing_shard` came to its end."""
    return path.exists() and Path(f"{path}{INDEX_SUFFIX}").exists()
