"""Pictures for a benchmark, under the names that its official scorer reads.

Out: a run folder with run.json (model, prompts, settings, versions), items.jsonl and images/. Every picture's noise
depends on the seed and its own key alone; batches are the same for one process or many. What is there is never made
again: a file is written whole or not at all, and a picture after all that belongs to it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from unilip import __version__
from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import UniLIPError
from unilip.eval.benchmarks import Benchmark, Item
from unilip.eval.runs import PICTURES, RunFolder, batches, model_hash
from unilip.files import png_bytes, stable_hash, write_bytes, write_json, write_lines
from unilip.machine import Place
from unilip.model import DRAWING, UniLIP
from unilip.pictures import Fit, contact_sheet, open_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What pictures depend on beside model and prompt, the sampler's first; all of it is in run.json."""

    steps: int
    guidance_scale: float
    solver: str
    image_size: int
    seed: int = 0  # of the run; each picture's own follows from it and the item's key
    dtype: str = "float32"  # of the weights
    fit: Fit = "resize"  # how the source of an edit becomes a square

    @classmethod
    def resolve(cls, source: Source = None, **given: Any) -> Settings:
        """Fill in the model's own values where none (or None) is given; reads its configuration, not its weights."""
        config = open_checkpoint(source).config
        own: dict[str, Any] = {
            "steps": config.sampling.num_inference_steps, "guidance_scale": float(config.sampling.guidance_scale),
            "solver": config.sampling.solver, "image_size": config.image_size,
        }  # fmt: skip
        return cls(**(own | {name: value for name, value in given.items() if value is not None}))


def picture_seeds(seed: int, item: Item) -> list[int]:
    """Return the seeds of an item's pictures: by the run's seed, the item's key, and which of its pictures it is."""
    numbers: list[tuple[int, ...]] = [()] if item.pictures == 1 else [(n,) for n in range(item.pictures)]
    return [stable_hash("noise", seed, item.key, *number) % 2**63 for number in numbers]


def generate(
    benchmark: Benchmark,
    output: Path,
    source: Source = None,
    settings: Settings | None = None,
    *,
    batch_size: int = 4,
    device: str = "cpu",
    place: Place | None = None,
    progress: bool = False,
    load: Callable[[], UniLIP] | None = None,
) -> dict[str, Any]:
    """Make the pictures of a benchmark that are not there yet.

    In: output: the run folder, the same for all processes. source: of the model. settings: the model's own by default.
    batch_size: pictures at once: speed and memory; a last bit may depend on it. place: which process this is; from RANK
    and WORLD_SIZE by default. load: returns the model, in place of loading `source`.
    Out: "made" by this process, "there" before, "missing" elsewhere, and the "identity" of the run.
    Raises UniLIPError: the folder holds another run, or pictures of another size.
    """
    settings = settings or Settings.resolve(source)
    place = place or Place.of_environment()
    identity = {**benchmark.identity, "model": model_hash(source), "settings": asdict(settings)}
    with RunFolder(output, identity, place, source):
        items = benchmark.items
        if place.rank == 0:
            about = [{"key": i.key, "prompt": i.prompt, "picture": i.path, "group": i.group} for i in items]
            seeds = ({"seeds": picture_seeds(settings.seed, item)} for item in items)
            write_lines(output / "items.jsonl", map(operator.or_, about, seeds))
            if benchmark.name == "geneval2":  # its scorer finds pictures by their prompt
                write_json(output / f"{PICTURES}.json", {item.prompt: item.path for item in items})
        there = {item.path for item in items if (output / item.path).is_file()}
        check_pictures(output, [item for item in items if item.path in there], identity)
        per_batch = max(1, batch_size // max(item.pictures for item in items))
        cut = [[item for item in batch if item.path not in there] for batch in batches(items, per_batch, place)]
        made = sum(map(len, cut))
        if made:
            parts = "drawing" if benchmark.source is None else ("encoder", *DRAWING)
            model = load() if load else UniLIP.from_pretrained(source, device=device, dtype=settings.dtype, parts=parts)
            name = benchmark.name if place.world == 1 else f"{benchmark.name} {place.rank + 1}/{place.world}"
            with tqdm(total=len(there) + made, initial=len(there), desc=name, unit="file", disable=not progress) as bar:
                for left in filter(None, cut):
                    for path, data in _draw(model, benchmark, left, settings, batch_size, identity).items():
                        write_bytes(output / path, data)
                    bar.update(len(left))
            log.info("%s: %d of %d files made, %d were there", name, made, len(items), len(there))
    return {"made": made, "there": len(there), "missing": len(missing(benchmark, output)), "identity": identity}


def _draw(
    model: UniLIP, benchmark: Benchmark, items: Sequence[Item], settings: Settings, batch_size: int,
    identity: Mapping[str, Any],
) -> dict[str, bytes]:  # fmt: skip
    """Draw the pictures of items; returns path -> bytes of everything that belongs to them."""
    jobs = [(item, seed) for item in items for seed in picture_seeds(settings.seed, item)]
    drawn: list[Image.Image] = []
    how: dict[str, Any] = {name: getattr(settings, name) for name in ("guidance_scale", "solver", "image_size")}
    how |= {"num_inference_steps": settings.steps, "progress": False}
    for start in range(0, len(jobs), batch_size):
        chunk = jobs[start : start + batch_size]
        prompts = [item.prompt for item, _ in chunk]
        how["generator"] = [seed for _, seed in chunk]
        if benchmark.source is None:
            drawn += model.generate(prompts, **how).images
        else:
            sources = [benchmark.source(item) for item, _ in chunk]
            drawn += model.edit(sources, prompts, fit=settings.fit, **how).images
    files: dict[str, bytes] = {}
    for item in items:
        own, drawn = drawn[: item.pictures], drawn[item.pictures :]
        about = {
            **_notes(item, identity), "Software": f"unilip {__version__}", "num_inference_steps": str(settings.steps),
            "guidance_scale": f"{settings.guidance_scale:g}",
        }  # fmt: skip
        for path, value in benchmark.beside(item).items():
            files[path] = value if isinstance(value, bytes) else png_bytes(value)
        whole = own[0] if len(own) == 1 else contact_sheet(own, 2, gap=0)
        files[item.path] = png_bytes(whole, about)  # last: it says that all is there
    return files


def _notes(item: Item, identity: Mapping[str, Any]) -> dict[str, str]:
    """Return what a picture's file says of its origin."""
    seeds = ", ".join(map(str, picture_seeds(identity["settings"]["seed"], item)))
    return {"model": identity["model"], "prompt": item.prompt, "seed": seeds}


def check_pictures(output: Path, items: Sequence[Item], identity: Mapping[str, Any]) -> None:
    """Refuse pictures that this run cannot have made. Raises UniLIPError: another size or origin, or no picture."""
    for item in items:
        file, side = output / item.path, identity["settings"]["image_size"] * (2 if item.pictures > 1 else 1)
        try:
            with open_picture(file) as picture:
                size, notes = picture.size, dict(picture.info)
                picture.verify()
        except Exception as error:
            raise UniLIPError(f"{file} is no whole picture ({error}); remove it and run again.") from error
        fault = f"{size[0]}x{size[1]} px, but this run makes {side}x{side}" if size != (side, side) else ""
        for name, value in _notes(item, identity).items():
            if notes.get(name, value) != value:
                fault = fault or f"of another {name} ({str(notes[name])[:80]!r}, here {value[:80]!r})"
        if fault:
            raise UniLIPError(f"{file} is {fault}; remove it or give another --output. Nothing was changed.")


def missing(benchmark: Benchmark, output: Path) -> list[Item]:
    """Return the items whose file is not there."""
    return [item for item in benchmark.items if not (output / item.path).is_file()]
