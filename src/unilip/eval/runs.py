"""The folder of a run: what it is of (run.json), results that a rerun finds again, and which process does what.

A killed run goes on in its folder, another run's identity is refused, several processes fill it together. What depends
on other inputs is known by a fingerprint of their content (`left`, `keep`, `wait`). A batch of files is written aside,
then committed by one rename and moved into place, so none is ever half there.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from unilip import __version__
from unilip.checkpoints.hub import ADAPTER, Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError
from unilip.files import Lock, content_hash, file_hash, read_json, read_lines, write_json
from unilip.machine import Place

log = logging.getLogger(__name__)

MANIFEST = "run.json"
PICTURES = "images"
STAGING = ".staging"
LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow")
WORDS = ("*token*", "vocab*", "merges*", "chat_template*")  # a checkpoint's files that its tokenizer is made of


def model_hash(source: Source = None) -> str:
    """Return 16 hex digits of a model's config, weights and tokenizer. Raises CheckpointError: none can be opened."""
    opened = open_checkpoint(source)
    beside = opened.tokenizer_path
    words = [] if beside is None else [file for pattern in WORDS for file in beside.glob(pattern) if file.is_file()]
    files = sorted({*opened.weights.files, *words}, key=lambda file: file.name)
    parts = [json.dumps(opened.config.to_dict(), sort_keys=True), *map(file_hash, files)]
    for folder, scale in opened.adapters:
        parts += [f"{scale:g}", *(file_hash(Path(folder) / name) for name in (ADAPTER, "adapter_model.safetensors"))]
    return content_hash(*parts)[:16]


def name_of(source: Source) -> str:
    """Return what people call a model."""
    return "embedded" if source is None else str(source)


def environment(place: Place) -> dict[str, Any]:
    """Return versions and machine: what may change a last digit, but does not make it another run."""
    versions = {"unilip": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"versions": versions, "machine": platform.machine(), "processes": place.world}


class RunFolder:
    """The folder of one run, which processes of the same run share.

    In: path: made if it is not there. identity: what may not differ when the run goes on. place: which process this is.
    name: of the model, for people.
    Raises UniLIPError: the folder holds another run, pictures of unknown origin, or is in use.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], place: Place, name: str = "") -> None:
        self.path, self.place, self.name = path, place, name
        self.identity = json.loads(json.dumps(identity))  # as it is read back
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        if path.exists() and not path.is_dir():
            raise UniLIPError(f"{path} is a file, not a folder; give another --output.")
        path.mkdir(parents=True, exist_ok=True)
        self._claim()
        self._lock = Lock(
            path / f".lock-{place.rank}",
            f"Another process is working in {path}; wait for it, or give another --output. Several processes at once "
            "need RANK and WORLD_SIZE, as torchrun sets them.",
        )
        self.staging = path / STAGING
        self._clean()
        for done in sorted(self.staging.glob("*")):  # what was committed before a kill
            if not done.name.endswith(".part"):
                self._move(done)

    def _claim(self) -> None:
        file = self.path / MANIFEST
        if not file.is_file():
            if next((self.path / PICTURES).glob("**/*.png"), None) is not None and not file.is_file():
                raise UniLIPError(
                    f"{self.path / PICTURES} holds pictures, but there is no {MANIFEST} that says how they were made; "
                    "give an empty folder."
                )
            manifest = {"model": self.name, "identity": self.identity, "environments": [environment(self.place)]}
            temporary = self.path / f".{MANIFEST}.{os.getpid()}.part"
            write_json(temporary, manifest)
            try:
                os.link(temporary, file)  # unlike a rename this fails where another process was first
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not file.exists():
                    os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
        before = read_manifest(self.path)
        known = before["identity"]
        other = [name for name in {**known, **self.identity} if known.get(name) != self.identity.get(name)]
        if other:
            name = other[0]
            raise UniLIPError(
                f"{self.path} holds another run: {', '.join(other)} differ ({name} is {_short(known.get(name))} there, "
                f"{_short(self.identity.get(name))} here). Nothing was changed; give another --output, or the settings "
                "of that run."
            )
        now = environment(self.place)
        if self.place.rank == 0 and now not in before["environments"]:
            log.warning("%s was begun with other versions or processes; both are noted in %s", self.path, MANIFEST)
            write_json(file, {**before, "environments": [*before["environments"], now]})

    def _clean(self) -> None:
        """Remove what a killed process had not committed; another live process's work is left alone."""
        for part in self.staging.glob("*.part"):
            rank = part.name.split(".")[1].removeprefix("rank")
            if rank.isdigit() and (
                int(rank) == self.place.rank or (not self.place.rank and int(rank) >= self.place.world)
            ):
                shutil.rmtree(part, ignore_errors=True)

    def left(self, marks: Sequence[str], size: int) -> list[list[str]]:
        """Return this process's batches of the fingerprints (each once) that have no result here yet."""
        known = self._kept()
        if known and (new := sum(mark not in known for mark in marks)):
            log.info("%s: %d of %d inputs are new or have changed, and are measured", self.path, new, len(marks))
        cut = [[mark for mark in batch if mark not in known] for _, batch in batches(marks, size, self.place)]
        return [batch for batch in cut if batch]

    def keep(
        self, marks: Sequence[str], rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Store a row for each fingerprint, and arrays whose first dimension is the rows."""
        tag = content_hash(*marks)[:16]
        stored = [
            {**row, "mark": mark, "part": tag, "n": n} for n, (mark, row) in enumerate(zip(marks, rows, strict=True))
        ]
        files = {f"parts/{tag}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in stored).encode()}
        if arrays:
            stream = io.BytesIO()
            np.savez(stream, allow_pickle=False, **arrays)
            files[f"parts/{tag}.npz"] = stream.getvalue()
        self.commit(f"part-{tag}", files)

    def wait(self, marks: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the rows by fingerprint, once all processes of the run have stored theirs."""
        while any(mark not in (known := self._kept()) for mark in marks):
            time.sleep(1)
        return known

    def array(self, row: Mapping[str, Any], name: str) -> np.ndarray:
        """Return a stored array of a row of `wait`."""
        if row["part"] not in self._arrays:
            with np.load(self.path / "parts" / f"{row['part']}.npz", allow_pickle=False) as stored:
                self._arrays[row["part"]] = dict(stored)
        value: np.ndarray = self._arrays[row["part"]][name][row["n"]]
        return value

    def _kept(self) -> dict[str, dict[str, Any]]:
        known: dict[str, dict[str, Any]] = {}
        for file in sorted((self.path / "parts").glob("*.jsonl")):
            known |= {row["mark"]: row for row in read_lines(file, "part of the results") if "mark" in row}
        return known

    def commit(self, name: str, files: Mapping[str, bytes]) -> None:
        """Put files (path in the run folder -> bytes) where they belong: all of them, even through a kill."""
        part = self.staging / f"{name}.rank{self.place.rank}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        moves = {f"{n:05d}": target for n, target in enumerate(files)}
        for stored, target in moves.items():
            (part / stored).write_bytes(files[target])
        (part / "moves.json").write_text(json.dumps(moves), encoding="utf-8")
        done = self.staging / f"{name}.rank{self.place.rank}"
        shutil.rmtree(done, ignore_errors=True)
        os.replace(part, done)
        self._move(done)

    def _move(self, done: Path) -> None:
        try:
            moves = json.loads((done / "moves.json").read_text(encoding="utf-8"))
        except FileNotFoundError:  # another process of this run was faster
            return
        for stored, target in moves.items():
            place = self.path / target
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(done / stored, place)
        shutil.rmtree(done, ignore_errors=True)

    def close(self) -> None:
        self._lock.release()
        if self.place.world == 1:
            with contextlib.suppress(OSError):
                self.staging.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return run.json of a run folder. Raises UniLIPError: the folder is none of a run, or the file is damaged."""
    file = path / MANIFEST
    if not file.is_file():
        raise UniLIPError(f"{path} is no folder of a run ({MANIFEST} is missing); give one that `unilip eval` made.")
    manifest = read_json(file, "manifest")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise UniLIPError(f"{file} is no manifest of `unilip eval`; give another --output.")
    manifest.setdefault("environments", [])
    return manifest


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def batches(items: Sequence[Any], size: int, place: Place) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield (number, batch) of this process: the batches are those of a single process, dealt out in turn."""
    for number, start in enumerate(range(0, len(items), max(1, size))):
        if number % place.world == place.rank:
            yield number, items[start : start + max(1, size)]
