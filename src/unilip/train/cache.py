"""Precompute the outputs of a recipe's frozen parts into shards, from which training reads them in every epoch.

Out: a folder with a tar file for each shard of the data, in which each sample has its place, and `cache.json`, which
says what made them. Training with `data.cache=FOLDER` draws the same samples in the same order and takes from the
cache:

    latents        of the picture to draw (Z,h,w): encoder and latent head, or the autoencoder
    features       (N,D) of the source of an edit, of a picture talked about or reconstructed: encoder
    conditions     (T+Q,C) of the prompt, as long as the prompt: encoder, language model, queries and connector
    teacher        (N,D) the features that distillation holds to: the original encoder
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from unilip.data.records import Record, Source, Unreadable, one_text
from unilip.data.shards import is_written, writing_shard
from unilip.errors import ConfigError
from unilip.files import Lock, write_bytes, write_json
from unilip.machine import start_ray
from unilip.pictures import normalise
from unilip.recipes.record import Recipe
from unilip.train.build import build
from unilip.train.cached import ABOUT, FORMAT, cacheable, digests, read_about, settings_of, shard_path
from unilip.train.files import FileBatches
from unilip.train.loop import mixed_precision
from unilip.train.objectives import FlowObjective, to_unit

DTYPES = {"float32": np.float32, "float16": np.float16}


class Worker:
    """Makes shards of a cache; holds the recipe's model. Called with {"source": number, "shard": number} by Ray."""

    def __init__(self, recipe: Recipe, runs: str, folder: str, device: str, dtype: str) -> None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache=""))
        self.objective: Any
        self.model, self.objective, batches = build(recipe, Path(runs))
        assert isinstance(batches, FileBatches)  # `make_cache` saw to it
        self.recipe, self.folder, self.batches = recipe, Path(folder), batches
        self.names = cacheable(recipe, self.model, self.objective)
        self.type, self.device = DTYPES[dtype], torch.device(device)
        self.model.to(self.device)
        self.objective.to(self.device)
        self.mixed = mixed_precision(recipe, self.device)

    def about(self, dtype: str) -> dict[str, Any]:
        sources = [
            {"location": place.location, "shards": len(source.counts("image")), "content": source.signature()}
            for place, source in self.batches.sources
        ]
        return {
            "format": FORMAT, "names": list(self.names), "dtype": dtype, "settings": settings_of(self.recipe),
            "weights": digests(self.names, self.model, self.objective), "sources": sources,
        }  # fmt: skip

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; returns the task with the number of samples made and of those that cannot be used."""
        number, shard = int(task["source"]), int(task["shard"])
        source = self.batches.sources[number][1]
        made = unusable = 0
        with writing_shard(shard_path(self.folder, number, shard)) as write:
            for kind in self.batches.kinds:
                places, size = range(source.counts(kind)[shard]), self.recipe.batch_size
                for start in range(0, len(places), size):
                    found = self.make(source, kind, shard, places[start : start + size])
                    for place, members in sorted(found.items()):  # the order of a shard is that of its source
                        write(f"{kind}{place:08d}", members)
                        made += 1
                        unusable += not members[f"{kind}.npz"]
        return task | {"made": made, "unusable": unusable}

    def make(self, source: Source, kind: str, shard: int, places: Iterable[int]) -> dict[int, dict[str, bytes]]:
        """Return the members of each place; a sample that cannot be used keeps its place, with the reason."""
        usable: list[tuple[int, Record, tuple[Any, ...]]] = []
        found: dict[int, dict[str, bytes]] = {}
        for place in places:
            try:
                record = one_text(source.read(kind, shard, place), place)
                usable.append((place, record, self.batches.item(record, kind)))
            except Unreadable as error:
                why = {"reason": error.reason, "detail": error.detail, "left_out": error.left_out}
                found[place] = {f"{kind}.npz": b"", "txt": json.dumps(why).encode()}
        items = [item for _, _, item in usable]
        rows = self.compute(kind, items) if items and kind != "text" else [{} for _ in items]
        for (place, record, _), arrays in zip(usable, rows, strict=True):
            found[place] = {f"{kind}.npz": packed(arrays)}
            for name, value in (("txt", record.text), ("json", record.conversation)):
                if value is not None:
                    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
                    found[place][name] = text.encode() if isinstance(text, str) else text
        return found

    @torch.no_grad()
    def compute(self, kind: str, items: Sequence[tuple[Any, ...]]) -> list[dict[str, np.ndarray]]:
        """Run the frozen parts on what `FileBatches.item` read: -> the arrays of each sample."""
        batch = {name: value.to(self.device) for name, value in self.batches.assemble(kind, items).items()}
        objective, found = self.objective, dict[str, Any]()
        with self.mixed:
            if isinstance(objective, FlowObjective):
                if "latents" in self.names:
                    found["latents"] = objective.clean_latents(batch["targets"])
                if kind == "edit" and "features" in self.names:
                    found["features"] = objective.source_features(batch)
                if "conditions" in self.names:
                    found["conditions"] = self._conditions(batch)
                    if kind == "edit":
                        processor = self.batches.processor
                        blank = processor.tokenize([processor.edit_text(None)] * len(items)).to(self.device)
                        found["unconditional"] = self._conditions(batch | {"prompts": blank})
            else:
                pixels = normalise(to_unit(batch["images"]))
                if "features" in self.names:
                    found["features"] = self.model.encoder(pixels)
                if "teacher" in self.names:
                    found["teacher"] = objective.teacher(pixels)
        return [{name: self._stored(rows[i]) for name, rows in found.items()} for i in range(len(items))]

    def _stored(self, row: Tensor) -> np.ndarray:
        return row.float().cpu().numpy().astype(self.type)

    def _conditions(self, batch: dict[str, Any]) -> list[Tensor]:
        """The conditions of a batch without their padding: (L,C) each."""
        conditions, mask = self.objective.conditions(batch, self.objective.source_features(batch))
        return [row[keep.bool()] for row, keep in zip(conditions, mask, strict=True)]

    @torch.no_grad()
    def unconditional(self) -> np.ndarray | None:
        """Return the condition (L,C) of a dropped caption, which all of them share."""
        if "conditions" not in self.names or "caption" not in self.batches.kinds:
            return None
        processor = self.batches.processor
        with self.mixed:
            row = self._conditions({"prompts": processor.tokenize([processor.generate_text(None)]).to(self.device)})[0]
        return self._stored(row)


def make_cache(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    runs: str | os.PathLike[str] = "runs",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    ray: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute a recipe's cache, or go on with an interrupted one; returns what `cache.json` says, with counts.

    In: folder: of the cache; with Ray it, the data and `runs` must be seen by every machine. dtype: of the stored
    arrays; float16 halves them, and losses are no longer exactly those without. ray: None for this process alone; else
    how many models work at once, on this machine or in the cluster of RAY_ADDRESS.
    Raises UniLIPError: the recipe cannot be built, has nothing to cache, or the folder holds another cache.
    """
    if recipe.data.source != "files":
        raise ConfigError(f"data.source is {recipe.data.source}; a cache is made of data.source=files.")
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype of a cache is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    folder, runs = Path(folder).expanduser(), Path(runs).expanduser()
    worker = Worker(recipe, str(runs), str(folder), "cpu" if ray else device, dtype)
    if not worker.names:
        trained = ", ".join(prefix for prefix, factor in recipe.trains if factor)
        raise ConfigError(f"{recipe.name} trains {trained}, so nothing stays the same in every epoch; no cache helps.")
    about = worker.about(dtype)
    before = read_about(folder) if (folder / ABOUT).exists() else about
    if changed := [key for key in about if before.get(key) != about[key]]:
        raise ConfigError(f"{folder} holds a cache that differs in {', '.join(changed)}; give another, or empty it.")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / ".lock", f"Another process is making the cache {folder}; wait for it, or give another folder."):
        write_json(folder / ABOUT, about)
        if (blank := worker.unconditional()) is not None:
            write_bytes(folder / "unconditional.npz", packed({"conditions": blank}))
        counts = [source["shards"] for source in about["sources"]]
        tasks = [{"source": i, "shard": j} for i, count in enumerate(counts) for j in range(count)]
        tasks = [task for task in tasks if not is_written(shard_path(folder, **task))]
        done = _on_ray(recipe, str(runs), str(folder), device, dtype, tasks, ray) if ray else map(worker, tasks)
        total = {"made": 0, "unusable": 0}
        for result in tqdm(done, total=len(tasks), unit="shard", desc="cache", disable=None if progress else True):
            total = {name: count + result[name] for name, count in total.items()}
        return about | total | {"shards": len(tasks)}


def _on_ray(
    recipe: Recipe, runs: str, folder: str, device: str, dtype: str, tasks: Sequence[dict[str, int]], workers: int
) -> Iterator[dict[str, Any]]:
    """Make shards with Ray Data: an actor pool, each actor with its own model."""
    if not tasks:
        return
    start_ray()
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    absolute = tuple(str(Path(path).absolute()) for path in (runs, folder))
    made = ray.data.from_items(list(tasks)).repartition(len(tasks)).map(
        Worker,  # type: ignore[arg-type]
        fn_constructor_args=(recipe, *absolute, device, dtype), concurrency=min(workers, len(tasks)),
        num_cpus=1, num_gpus=1 if device.startswith("cuda") else 0,
    )  # fmt: skip
    yield from made.iter_rows()


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Write arrays as the bytes of an npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
