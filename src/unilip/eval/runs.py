"""The folder of a run: what it is of (run.json), pictures that appear whole or not at all, and which process does what.

Goes in: an identity (benchmark, protocol, model, settings). Comes out: a folder that a killed run goes on in, that
refuses another run's identity, and that several processes fill together. A batch of files is first written aside,
then committed by one rename and moved into place; so no batch is ever half there after a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from unilip import __version__
from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError
from unilip.files import Lock, file_hash, read_json, write_json
from unilip.machine import Place

log = logging.getLogger(__name__)

MANIFEST = "run.json"
PICTURES = "images"
STAGING = ".staging"
LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow")


# --- what a run is of -----------------------------------------------------------------------------------------------


def model_hash(source: Source = None) -> str:
    """Return sixteen hex digits of a checkpoint's configuration and weight files, without loading it.

    Raises:
        CheckpointError: it cannot be opened.
    """
    opened = open_checkpoint(source)
    digest = hashlib.sha256(json.dumps(opened.config.to_dict(), sort_keys=True).encode())
    for file in sorted(opened.weights.files, key=lambda file: file.name):
        digest.update(file_hash(file).encode())
    return digest.hexdigest()[:16]


def environment(place: Place) -> dict[str, Any]:
    """Return versions and machine: what may change a last digit, but does not make it another run."""
    versions = {"unilip": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"versions": versions, "machine": platform.machine(), "processes": place.world}


class RunFolder:
    """The folder of one run, which processes of the same run share.

    Args:
        path: made if it is not there.
        identity: what may not differ when the run goes on.
        place: which process this is; every process of a run gives its own.
        name: of the model, for people; the identity has its hash.

    Raises:
        UniLIPError: the folder holds another run, pictures of unknown origin, or is in use.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], place: Place, name: str = "") -> None:
        self.path, self.place, self.name = path, place, name
        self.identity = json.loads(json.dumps(identity))  # as it is read back
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
        self.finish_moves()

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

    def finish_moves(self) -> None:
        """Move into place what was committed before a kill."""
        for done in sorted(self.staging.glob("*")):
            if not done.name.endswith(".part"):
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
        """Let another process have the folder."""
        self._lock.release()
        if self.place.world == 1:
            with contextlib.suppress(OSError):
                self.staging.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return run.json of a run folder.

    Raises:
        UniLIPError: the folder is none of a run, or the file is damaged.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UniLIPError(
            f"{path} is no folder of a run ({MANIFEST} is missing); give a folder that `unilip eval` made."
        )
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
