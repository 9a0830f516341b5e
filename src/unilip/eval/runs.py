"""The folder of a run: what it is of (run.json), results that a rerun finds again, and which process does what.

A killed run goes on in its folder, another run's identity is refused, several processes fill it together. What depends
on other inputs is known by a fingerprint of their content (`measured`).
"""

import contextlib
import io
import json
import logging
import platform
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from unilip import __version__
from unilip.checkpoints.hub import ADAPTER, Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError, differences, reason
from unilip.files import Lock, content_hash, file_hash, read_json, read_lines, write_bytes, write_json, write_lines
from unilip.machine import Place

T = TypeVar("T")
Measure = Callable[[Sequence[str]], tuple[Sequence[Mapping[str, Any]], Mapping[str, np.ndarray]]]
log = logging.getLogger(__name__)

MANIFEST = "run.json"
PICTURES = "images"
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


class RunFolder(contextlib.ExitStack):
    """The folder of one run, which processes of the same run share.

    In: path: made if it is not there. identity: what may not differ when the run goes on. place: which process this is.
    source: of the model, which gives the `name` that people call it.
    Raises UniLIPError: the folder holds another run, pictures of unknown origin, or is in use.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], place: Place, source: Source = None) -> None:
        super().__init__()
        self.path, self.place, self.name = path, place, "embedded" if source is None else str(source)
        self.identity = json.loads(json.dumps(identity))  # as it is read back
        if path.exists() and not path.is_dir():
            raise UniLIPError(f"{path} is a file, not a folder; give another --output.")
        busy = (
            f"Another process is working in {path}; wait for it, or give another --output. Several processes at once "
            "need RANK and WORLD_SIZE, as torchrun sets them."
        )
        self.enter_context(Lock(path / f".lock-{place.rank}", busy))
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def _claim(self) -> None:
        file = self.path / MANIFEST
        versions = {"unilip": __version__, "python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in ("torch", "numpy", "pillow")}
        # what may change a last digit, but does not make it another run
        now = {"versions": versions, "machine": platform.machine(), "processes": self.place.world}
        if not file.is_file():
            if next((self.path / PICTURES).glob("**/*.png"), None) is not None and not file.is_file():
                raise UniLIPError(
                    f"{self.path / PICTURES} holds pictures, but there is no {MANIFEST} that says how they were made; "
                    "give an empty folder."
                )
            write_json(file, {"model": self.name, "identity": self.identity, "environments": [now]})
        before = read_manifest(self.path)
        known = before["identity"]
        if other := differences(known, dict.fromkeys(known) | self.identity):
            raise UniLIPError(
                f"{self.path} holds another run: {other}. Nothing was changed; give another --output, or the settings "
                "of that run."
            )
        if self.place.rank == 0 and now not in before["environments"]:
            log.warning("%s was begun with other versions or processes; both are noted in %s", self.path, MANIFEST)
            write_json(file, {**before, "environments": [*before["environments"], now]})

    def measured(
        self, marks: Sequence[str], size: int, measure: Measure, unit: str, progress: bool
    ) -> list[dict[str, Any]] | None:
        """Return the row of each fingerprint, once all processes have stored theirs; None where the rank is not 0.

        In: measure: returns for at most `size` fingerprints that have no result here yet a row each, and arrays whose
        first dimension is the rows. unit: of the progress bar.
        """
        known, each = self._kept(), list(dict.fromkeys(marks))
        if known and (new := sum(mark not in known for mark in each)):
            log.info("%s: %d of %d inputs are new or have changed, and are measured", self.path, new, len(each))
        left = [[mark for mark in batch if mark not in known] for batch in batches(each, size, self.place)]
        with tqdm(total=sum(map(len, left)), desc=self.identity["task"], unit=unit, disable=not progress) as bar:
            for batch in filter(None, left):
                self._keep(batch, *measure(batch))
                bar.update(len(batch))
        if self.place.rank:
            return None
        while any(mark not in (known := self._kept()) for mark in marks):
            time.sleep(1)
        return [known[mark] for mark in marks]

    def _keep(self, marks: Sequence[str], rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
        tag = content_hash(*marks)[:16]
        if arrays:
            stream = io.BytesIO()
            np.savez(stream, allow_pickle=False, **arrays)
            write_bytes(self.path / "parts" / f"{tag}.npz", stream.getvalue())
        numbered = enumerate(zip(marks, rows, strict=True))
        stored = [{**row, "mark": mark, "part": tag, "n": n} for n, (mark, row) in numbered]
        write_lines(self.path / "parts" / f"{tag}.jsonl", stored)  # last: it says that all is there

    def array(self, rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
        """Return a stored array of rows of `measured`."""
        parts: dict[str, np.ndarray] = {}
        for part in {row["part"] for row in rows}:
            file = self.path / "parts" / f"{part}.npz"
            try:
                with np.load(file, allow_pickle=False) as stored:
                    parts[part] = stored[name]
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                raise UniLIPError(
                    f"{file} cannot be read ({reason(error, 100)}); remove {part}.jsonl beside it, and run again."
                ) from error
        return np.stack([parts[row["part"]][row["n"]] for row in rows])

    def _kept(self) -> dict[str, dict[str, Any]]:
        known: dict[str, dict[str, Any]] = {}
        for file in sorted((self.path / "parts").glob("*.jsonl")):
            known |= {row["mark"]: row for row in read_lines(file, "part of the results") if "mark" in row}
        return known


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


def batches(items: Sequence[T], size: int, place: Place) -> list[Sequence[T]]:
    """Return the batches of this process: those of a single process, dealt out in turn."""
    starts = range(0, len(items), max(1, size))
    return [items[start : start + max(1, size)] for start in starts[place.rank :: place.world]]
