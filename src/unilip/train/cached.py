"""Read a training cache in place of what it was made of, once it is found to fit recipe, data and weights."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unilip.data.records import Record, Source, Unreadable
from unilip.data.shards import Shards
from unilip.data.sources import Weighted
from unilip.errors import ConfigError, differences
from unilip.model import UniLIP
from unilip.recipes.record import Flow, Recipe, Reconstruct, leaves
from unilip.train.objectives import FlowObjective, Objective, ReconstructObjective

FORMAT = 3
ABOUT = "cache.json"
FREE = (  # data settings that change nothing about a sample by itself
    "world", "path", "edit_share", "text_share", "workers", "max_skipped", "window", "lanes", "keep_gb", "cache",
)  # fmt: skip
MAKERS: dict[str, tuple[str, ...]] = {  # parts of the model
    "latents": ("encoder", "latent_head"), "features": ("encoder",), "conditions": ("encoder", "mllm", "connector"),
    "teacher": (),
}  # fmt: skip


def cacheable(recipe: Recipe, model: UniLIP, objective: Objective) -> tuple[str, ...]:
    """Return the names of what frozen parts make for a recipe's loss; `build` has marked what trains."""
    frozen = {part for part in model.parts if not any(p.requires_grad for p in getattr(model, part).parameters())}
    features = ("features",) if "encoder" in frozen else ()
    if isinstance(objective, FlowObjective):
        if not features or (objective.autoencoder is None and "latent_head" not in frozen):
            return ()
        return ("latents", *(("conditions",) if {"mllm", "connector"} <= frozen else features))
    distilled = isinstance(objective, ReconstructObjective) and objective.settings.distill
    return (*features, *(("teacher",) if distilled else ()))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide what a sample becomes."""
    data = {f"data.{name}": value for name, value in leaves(recipe.data).items() if name not in FREE}
    chosen = {"objective.target": recipe.objective.target} if isinstance(recipe.objective, Flow) else {}
    return {"objective": type(recipe.objective).__name__.lower(), "dtype": recipe.dtype, **data, **chosen}


def digests(names: Sequence[str], model: UniLIP, objective: Objective) -> dict[str, str]:
    """Return a fingerprint of the weights behind each part that made what a cache holds."""
    modules = {part: getattr(model, part) for name in names for part in MAKERS[name] if part in model.parts}
    for name, maker in (("latents", "autoencoder"), ("latents", "target_encoder"), ("teacher", "teacher")):
        if name in names and (module := getattr(objective, maker, None)) is not None:
            modules[maker.replace("_", " ")] = module
    if "autoencoder" in modules:
        modules.pop("latent_head", None)
    found = {name: fingerprint(module) for name, module in modules.items()}
    found["image size"] = str(model.config.image_size)
    if "conditions" in names:
        found["condition"] = json.dumps((model.config.condition, model.config.substitute_features))
        found["tokenizer"] = model.processor.tokenizer.fingerprint if model.processor else ""
    if "latents" in names and "autoencoder" not in modules:
        found["latent scale"] = json.dumps((model.config.latent_mean, model.config.latent_factor))
    return found


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Hash the names, shapes and values of a module's weights."""
    state = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        state.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        state.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


class Cached:
    """A source whose samples come from a cache; their pictures are read from where they lie only if they are needed."""

    def __init__(self, original: Source, shards: Shards, pictures: bool, blank: bytes | None) -> None:
        self.location, self.faults, self.notes = original.location, original.faults, original.notes
        self.original, self.shards, self.pictures, self.blank = original, shards, pictures, blank
        self.counts, self.signature = shards.counts, original.signature

    def read(self, kind: str, shard: int, place: int) -> Record:
        record = self.shards.read(kind, shard, place)
        if not record.tensors:
            why = json.loads(record.text or b"{}")
            raise Unreadable(why["reason"], why["detail"], why["left_out"])
        if self.pictures and kind != "text":
            record = dataclasses.replace(record, pictures=self.original.read(kind, shard, place).pictures)
        return dataclasses.replace(record, blank=self.blank)

    def expect(self, shards: Sequence[int]) -> None:
        self.shards.expect(shards)
        if self.pictures:
            self.original.expect(shards)


def cached_sources(recipe: Recipe, sources: Sequence[tuple[Weighted, Source]]) -> list[tuple[Weighted, Source]]:
    """Put a recipe's cache before its sources. Raises ConfigError: of other settings or data, or unfinished."""
    folder = Path(recipe.data.cache).expanduser()
    about = read_about(folder)
    if changed := differences(about["settings"], settings_of(recipe)):
        raise ConfigError(f"data.cache {folder} was made with other settings: {changed}. Make a new one.")
    pictures = isinstance(recipe.objective, Reconstruct)  # what its pixels are compared with
    blank = folder / "unconditional.npz"
    found: list[tuple[Weighted, Source]] = []
    locations = [source["location"] for source in about["sources"]]
    for place, source in sources:
        if place.location not in locations:
            raise ConfigError(f"data.cache {folder} has nothing of {place.location}; it is of {', '.join(locations)}.")
        number = locations.index(place.location)
        if about["sources"][number]["content"] != source.signature():
            raise ConfigError(
                f"data.cache {folder} does not fit {place.location} any more: other samples lie there than when it was "
                "made. Make a new one."
            )
        paths = [shard_path(folder, number, shard) for shard in range(about["sources"][number]["shards"])]
        if missing := [path for path in paths if not path.exists()]:
            raise ConfigError(
                f"data.cache {folder} is not finished: {len(missing)} of {len(paths)} shards are missing. "
                "Give the same `unilip data cache` again, it goes on."
            )
        shards = Shards([str(path) for path in paths], str(folder))
        found.append((place, Cached(source, shards, pictures, blank.read_bytes() if blank.exists() else None)))
    return found


def check_cache(recipe: Recipe, model: UniLIP, objective: Objective) -> None:
    """Refuse, by ConfigError, a cache whose makers train now, or had other weights."""
    folder = Path(recipe.data.cache).expanduser()
    about = read_about(folder)
    if moving := sorted(set(about["names"]) - set(cacheable(recipe, model, objective))):
        raise ConfigError(f"data.cache {folder} holds {', '.join(moving)}, which change while it trains. Make another.")
    now = digests(about["names"], model, objective)
    if other := sorted(name for name in now if now[name] != about["weights"].get(name)):
        raise ConfigError(f"data.cache {folder} was made with other weights of {', '.join(other)}. Make a new one.")


def shard_path(folder: Path, source: int, shard: int) -> Path:
    """Return where the cache of a shard of a source lies."""
    return folder / f"s{source:02d}-{shard:06d}.tar"


def read_about(folder: Path) -> dict[str, Any]:
    """Read `cache.json`."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about.get("format") == FORMAT:
            _ = [about[key] for key in ("names", "settings", "sources", "weights")]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"data.cache {folder} is no cache ({error}); make one with `unilip data cache`.") from error
    if about.get("format") != FORMAT:
        raise ConfigError(f"data.cache {folder} has the format {about.get('format')}, not {FORMAT}. Make a new one.")
    return about
