"""What frozen parts of a recipe make of each sample, computed once into shards and read in every epoch after.

Goes in: a recipe on files. Comes out: a folder with a tar file for each shard of the data, in which each sample has its
place, and `cache.json`, which says what made them. Training with `data.cache=FOLDER` draws the same samples in the same
order and takes from the cache, where the part is frozen:

    latents        of the picture to draw (Z,h,w): encoder and latent head, or the autoencoder
    features       (N,D) of the source of an edit, of a picture talked about or reconstructed: encoder
    conditions     (T+Q,C) of the prompt, as long as the prompt: encoder, language model, queries and connector
    teacher        (N,D) the features that distillation holds to: the original encoder

One machine does one shard after the other; with Ray a cluster does many at once, each worker with its own model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unilip.data.records import Record, Source, Unreadable
from unilip.data.shards import INDEX_SUFFIX, Shards, ShardWriter
from unilip.data.sources import Weighted
from unilip.errors import ConfigError
from unilip.files import write_bytes, write_json
from unilip.machine import start_ray
from unilip.model import UniLIP
from unilip.pictures import normalise
from unilip.recipes.record import Flow, Recipe, Reconstruct, Understand, leaves
from unilip.train.objectives import FlowObjective, Objective, ReconstructObjective, UnderstandObjective, to_unit

FORMAT = 1
ABOUT = "cache.json"
DTYPES = {"float32": np.float32, "float16": np.float16}
FREE = (  # data settings that change nothing about a sample by itself
    "world", "path", "edit_share", "text_share", "workers", "max_skipped", "window", "lanes", "keep_gb", "cache",
)  # fmt: skip


# --- what can be cached -----------------------------------------------------------------------------------------------


def cacheable(recipe: Recipe, model: UniLIP, objective: Objective) -> tuple[str, ...]:
    """Return the names of what frozen parts make for a recipe's loss; `build` has marked what trains."""
    frozen = {part for part in model.parts if not any(p.requires_grad for p in getattr(model, part).parameters())}
    names = []
    if isinstance(objective, FlowObjective):
        place = objective.settings.place  # losses of its own on the conditions, and on the source's latents
        if "encoder" in frozen and (objective.autoencoder is not None or "latent_head" in frozen):
            names += ["latents"]
            if {"mllm", "connector"} <= frozen and not place:
                names += ["conditions"]
            elif not place or objective.settings.target == "unilip":
                names += ["features"]
    elif isinstance(objective, ReconstructObjective):
        names += ["features"] if "encoder" in frozen else []
        names += ["teacher"] if objective.weights.distill else []
    elif isinstance(objective, UnderstandObjective):
        names += ["features"] if "encoder" in frozen else []
    return tuple(names)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide what a sample becomes."""
    data = {f"data.{name}": value for name, value in leaves(recipe.data).items() if name not in FREE}
    kinds: dict[type, tuple[str, ...]] = {Flow: ("target",), Understand: (), Reconstruct: ()}
    chosen = {f"objective.{name}": getattr(recipe.objective, name) for name in kinds[type(recipe.objective)]}
    return {"objective": type(recipe.objective).__name__.lower(), "dtype": recipe.dtype, **data, **chosen}


def digests(names: Sequence[str], model: UniLIP, objective: Objective) -> dict[str, str]:
    """Return a fingerprint of the weights behind each part that made what a cache holds."""
    modules: dict[str, Any] = {}
    parts = {part for name in names for part in {"latents": ("encoder", "latent_head"), "features": ("encoder",),
             "conditions": ("encoder", "mllm", "connector"), "teacher": ()}[name]}  # fmt: skip
    autoencoder = getattr(objective, "autoencoder", None)
    if "latents" in names and autoencoder is not None:
        modules["autoencoder"] = autoencoder
        parts -= {"latent_head"}
    if "teacher" in names:
        modules["teacher"] = getattr(objective, "teacher", None)
    modules |= {part: getattr(model, part) for part in sorted(parts) if part in model.parts}
    found = {name: fingerprint(module) for name, module in modules.items()}
    scale = model.config.latent_mean, model.config.latent_factor
    if "conditions" in names:
        found["condition"] = json.dumps((model.config.condition, model.config.substitute_features))
    if "latents" in names and isinstance(objective, FlowObjective) and objective.target_encoder is not None:
        found["target encoder"] = fingerprint(objective.target_encoder)
    return found | ({"latent scale": json.dumps(scale)} if "latents" in names and autoencoder is None else {})


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Hash the names, shapes and values of a module's weights."""
    state = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        state.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        state.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


# --- making -----------------------------------------------------------------------------------------------------------


class Worker:
    """Makes shards of a cache; holds the recipe's model. Called with {"source": number, "shard": number} by Ray."""

    def __init__(self, recipe: Recipe, runs: str, folder: str, device: str, dtype: str) -> None:
        from unilip.train.build import build
        from unilip.train.files import FileBatches, kinds_of_recipe
        from unilip.train.loop import mixed_precision

        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache=""))
        self.model, self.objective, batches = build(recipe, Path(runs))
        if not isinstance(batches, FileBatches):
            raise ConfigError(f"data.source is {recipe.data.source}; a cache is made of data.source=files.")
        self.recipe, self.folder, self.batches = recipe, Path(folder), batches
        self.kinds = kinds_of_recipe(recipe)
        self.names = cacheable(recipe, self.model, self.objective)
        self.type = DTYPES[dtype]
        self.device = torch.device(device)
        self.model.to(self.device)
        self.objective.to(self.device)
        self.mixed = mixed_precision(recipe, self.device)

    def about(self, dtype: str) -> dict[str, Any]:
        """Return what `cache.json` says."""
        return {
            "format": FORMAT,
            "names": list(self.names),
            "dtype": dtype,
            "settings": settings_of(self.recipe),
            "weights": digests(self.names, self.model, self.objective),
            "sources": [
                {"location": place.location, "shards": len(source.counts(self.kinds[0]))}
                for place, source in self.batches.sources
            ],
        }

    def tasks(self) -> list[dict[str, int]]:
        """Return every shard that is to be made."""
        counts = [len(source.counts(self.kinds[0])) for _, source in self.batches.sources]
        return [{"source": i, "shard": j} for i, count in enumerate(counts) for j in range(count)]

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; returns the task with the number of samples made and of those that cannot be used."""
        number, shard = int(task["source"]), int(task["shard"])
        source = self.batches.sources[number][1]
        writer = ShardWriter(self.folder, f"s{number:02d}", 1 << 60, first=shard)
        writer.begin()
        made = unusable = 0
        for kind in self.kinds:
            places = range(source.counts(kind)[shard])
            for start in range(0, len(places), self.recipe.batch_size):
                for place, members in self.make(source, kind, shard, places[start : start + self.recipe.batch_size]):
                    writer.write(f"{kind}{place:08d}", members)
                    made += 1
                    unusable += not members[f"{kind}.npz"]
        writer.close()
        return {"source": number, "shard": shard, "made": made, "unusable": unusable}

    def make(
        self, source: Source, kind: str, shard: int, places: Iterable[int]
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Yield the members of each place; a sample that cannot be used keeps its place, with the reason."""
        usable: list[tuple[int, Record, tuple[Any, ...]]] = []
        found: dict[int, dict[str, bytes]] = {}
        for place in places:
            try:
                record = source.read(kind, shard, place)
                usable.append((place, record, self.batches.item(record, kind)))
            except Unreadable as error:
                why = {"reason": error.reason, "detail": error.detail, "left_out": error.left_out}
                found[place] = {f"{kind}.npz": b"", "txt": json.dumps(why).encode()}
        rows = (
            self.compute(kind, [item for _, _, item in usable]) if usable and kind != "text" else [{} for _ in usable]
        )
        for (place, record, _), arrays in zip(usable, rows, strict=True):
            found[place] = {f"{kind}.npz": packed(arrays)}
            for name, value in (("txt", record.text), ("json", record.conversation)):
                if value is not None:
                    found[place][name] = _as_bytes(value)
        yield from sorted(found.items())  # the order of a shard is that of its source

    @torch.no_grad()
    def compute(self, kind: str, items: Sequence[tuple[Any, ...]]) -> list[dict[str, np.ndarray]]:
        """Run the frozen parts on what `FileBatches.item` read: -> the arrays of each sample."""
        batch = self.batches.assemble(kind, items)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        objective, found = self.objective, dict[str, Sequence[Tensor]]()
        with self.mixed:
            if isinstance(objective, FlowObjective):
                if "latents" in self.names:
                    found["latents"] = objective.clean_latents(batch["targets"])  # type: ignore[assignment]
                if kind == "edit" and "features" in self.names:
                    found["features"] = objective.source_features(batch)  # type: ignore[assignment]
                if "conditions" in self.names:
                    found["conditions"] = self._conditions(batch)
                    if kind == "edit":
                        blank = self.batches.processor.tokenize(
                            [self.batches.processor.edit_text(None)] * len(items)
                        ).to(self.device)  # fmt: skip
                        found["unconditional"] = self._conditions(batch | {"prompts": blank})
            else:
                pixels = normalise(to_unit(batch["images"]))
                if "features" in self.names:
                    found["features"] = self.model.encoder(pixels)
                if "teacher" in self.names:
                    teacher = objective.teacher  # type: ignore[attr-defined]
                    found["teacher"] = teacher(pixels)
        return [
            {name: rows[i].float().cpu().numpy().astype(self.type) for name, rows in found.items()}
            for i in range(len(items))
        ]

    def _conditions(self, batch: dict[str, Any]) -> list[Tensor]:
        """The conditions of a batch without their padding: (L,C) each."""
        assert isinstance(self.objective, FlowObjective)
        conditions, mask = self.objective.conditions(batch, self.objective.source_features(batch))
        return [row[keep.bool()] for row, keep in zip(conditions, mask, strict=True)]

    @torch.no_grad()
    def unconditional(self) -> np.ndarray | None:
        """Return the condition (L,C) of a dropped caption, which all of them share."""
        if "conditions" not in self.names or "caption" not in self.kinds:
            return None
        processor = self.batches.processor
        with self.mixed:
            row = self._conditions({"prompts": processor.tokenize([processor.generate_text(None)]).to(self.device)})[0]
        array: np.ndarray = row.float().cpu().numpy().astype(self.type)
        return array


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
    """Compute a recipe's cache, or go on with one that was interrupted; returns what `cache.json` says, with counts.

    Args:
        folder: of the cache; with Ray it, the data and `runs` must be seen by every machine.
        dtype: of the stored arrays; float16 halves them, and the losses are no longer exactly those without a cache.
        ray: None for this process alone; else how many models work at once with Ray, on this machine or in the cluster
            that the environment variable RAY_ADDRESS names.

    Raises:
        UniLIPError: the recipe cannot be built, has nothing to cache, or the folder holds another cache.
    """
    from tqdm.auto import tqdm

    if recipe.data.source != "files":
        raise ConfigError(f"data.source is {recipe.data.source}; a cache is made of data.source=files.")
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype of a cache is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    folder = Path(folder)
    worker = Worker(recipe, str(runs), str(folder), "cpu" if ray else device, dtype)
    if not worker.names:
        trained = ", ".join(prefix for prefix, factor in recipe.trains if factor)
        raise ConfigError(
            f"{recipe.name} trains {trained}, so nothing stays the same from epoch to epoch; no cache helps."
        )
    about = worker.about(dtype)
    before = read_about(folder) if (folder / ABOUT).exists() else None
    if before is not None and before != about:
        changed = [key for key in about if before.get(key) != about[key]]
        raise ConfigError(
            f"{folder} holds a cache that differs in {', '.join(changed)}; give another folder, or empty it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ABOUT, about)
    blank = worker.unconditional()
    if blank is not None:
        write_bytes(folder / "unconditional.npz", packed({"conditions": blank}))
    tasks = [task for task in worker.tasks() if not _made(folder, task)]
    done = _on_ray(recipe, str(runs), str(folder), device, dtype, tasks, ray) if ray else map(worker, tasks)
    total = {"made": 0, "unusable": 0, "shards": 0}
    for result in tqdm(done, total=len(tasks), unit="shard", desc="cache", disable=None if progress else True):
        total = {"made": total["made"] + result["made"], "unusable": total["unusable"] + result["unusable"],
                 "shards": total["shards"] + 1}  # fmt: skip
    return about | total


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
        fn_constructor_args=(recipe, *absolute, device, dtype),
        concurrency=min(workers, len(tasks)),
        num_cpus=1,
        num_gpus=1 if device.startswith("cuda") else 0,
    )  # fmt: skip
    yield from made.iter_rows()


def _made(folder: Path, task: dict[str, int]) -> bool:
    path = folder / f"s{task['source']:02d}-{task['shard']:06d}.tar"
    return path.exists() and Path(f"{path}{INDEX_SUFFIX}").exists()


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Write arrays as the bytes of an npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


# --- reading ----------------------------------------------------------------------------------------------------------


class Cached:
    """A source whose samples come from a cache; their pictures are read from where they lie only if they are needed."""

    def __init__(self, original: Source, shards: Shards, pictures: bool, blank: bytes | None) -> None:
        self.location, self.faults = original.location, original.faults
        self.original, self.shards, self.pictures, self.blank = original, shards, pictures, blank

    def counts(self, kind: str) -> Sequence[int]:
        """Return how many samples of a kind each shard has."""
        return self.shards.counts(kind)

    def read(self, kind: str, shard: int, place: int) -> Record:
        """Read one sample; raises `Unreadable`."""
        record = self.shards.read(kind, shard, place)
        if not record.tensors:
            why = json.loads(record.text or b"{}")
            raise Unreadable(why["reason"], why["detail"], why["left_out"])
        if self.pictures and kind != "text":
            record = dataclasses.replace(record, pictures=self.original.read(kind, shard, place).pictures)
        return dataclasses.replace(record, blank=self.blank)

    def expect(self, shards: Sequence[int]) -> None:
        """Hear which shards will be wanted next."""
        self.shards.expect(shards)
        if self.pictures:
            self.original.expect(shards)


def cached_sources(recipe: Recipe, sources: Sequence[tuple[Weighted, Source]]) -> list[tuple[Weighted, Source]]:
    """Put the cache that a recipe names before its sources.

    Raises:
        ConfigError: the cache was made with other settings, of other data, or is not finished.
    """
    folder = Path(recipe.data.cache).expanduser()
    about = read_about(folder)
    wanted = settings_of(recipe)
    changed = [
        f"{name} ({about['settings'].get(name)} there, {wanted[name]} here)"
        for name in wanted
        if about["settings"].get(name) != wanted[name]
    ]
    if changed:
        raise ConfigError(f"data.cache {folder} was made with other settings: {', '.join(changed)}. Make a new one.")
    pictures = isinstance(recipe.objective, Reconstruct)  # what its pixels are compared with
    blank = folder / "unconditional.npz"
    found: list[tuple[Weighted, Source]] = []
    locations = [source["location"] for source in about["sources"]]
    for place, source in sources:
        if place.location not in locations:
            raise ConfigError(
                f"data.cache {folder} has nothing of {place.location}; it was made of {', '.join(locations)}."
            )
        number = locations.index(place.location)
        paths = [folder / f"s{number:02d}-{shard:06d}.tar" for shard in range(about["sources"][number]["shards"])]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise ConfigError(
                f"data.cache {folder} is not finished: {len(missing)} of {len(paths)} shards are missing. "
                "Give the same `unilip data cache` again, it goes on."
            )
        shards = Shards([str(path) for path in paths], str(folder))
        for kind in ("image", "caption", "edit", "talk", "text"):
            if sum(shards.counts(kind)) and list(shards.counts(kind)) != list(source.counts(kind)):
                raise ConfigError(
                    f"data.cache {folder} does not fit {place.location} any more: other samples lie there. "
                    "Make a new one."
                )
        found.append((place, Cached(source, shards, pictures, blank.read_bytes() if blank.exists() else None)))
    return found


def check_cache(recipe: Recipe, model: UniLIP, objective: Objective) -> None:
    """Refuse a cache whose makers train now, or had other weights.

    Raises:
        ConfigError: it does not fit the model that will be trained from it.
    """
    folder = Path(recipe.data.cache).expanduser()
    about = read_about(folder)
    moving = sorted(set(about["names"]) - set(cacheable(recipe, model, objective)))
    if moving:
        raise ConfigError(
            f"data.cache {folder} holds {', '.join(moving)}, which change while {recipe.name} trains. Make a new one."
        )
    now = digests(about["names"], model, objective)
    other = [name for name in now if now[name] != about["weights"].get(name)]
    if other:
        raise ConfigError(f"data.cache {folder} was made with other weights of {', '.join(other)}. Make a new one.")


def read_about(folder: Path) -> dict[str, Any]:
    """Read `cache.json`."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.cache {folder} is no cache ({error}); make one with `unilip data cache`.") from error
    if about.get("format") != FORMAT:
        raise ConfigError(
            f"data.cache {folder} has the format {about.get('format')}, known is {FORMAT}. Make a new one."
        )
    return about
