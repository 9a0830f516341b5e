"""The verbs of data and training: data NAME, which prepare what training reads, and train."""

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unilip.cli.options import Options
from unilip.cli.terminal import FORMATS, bar, bars, plural, say
from unilip.errors import UniLIPError
from unilip.machine import Place, choose_device

logger = logging.getLogger(__name__)


def data_prepare_emoji(o: Options) -> None:
    """Fetch and rasterise the art of the emoji world."""
    from unilip.emoji.art import prepare

    if o.source is not None and not Path(o.source).is_dir():
        raise UniLIPError(f"There is no folder {o.source}; give the one with the npm packages, or leave --source away.")
    with bar(o.progress, "drawing") as progress:
        path = prepare(Path(o.output) if o.output else None, Path(o.source) if o.source else None, progress)
    o.report.line(path)
    o.report.end("the art is ready", path=str(path))


def data_convert(o: Options) -> None:
    """Write a published data set as shards."""
    from unilip.data.convert import convert

    if o.output is None:
        raise UniLIPError("There is no --output; give the folder of the shards.")
    with bar(o.progress, "sample") as progress:
        done = convert(
            o.words[0], o.words[1], Path(o.output), shard_size=o.shard_size, shorter_side=o.shorter_side,
            progress=progress,
        )  # fmt: skip
    o.report.line(*done.shards)
    for name in done.named[:20]:
        say(f"left out: {name}")
    if done.skipped:
        say(f"{done.skipped.total()} left out: {', '.join(f'{k}: {n}' for k, n in done.skipped.most_common())}")
    o.report.end(
        f"{plural(len(done.shards), 'shard')}, {plural(done.samples.total(), 'sample')} written now",
        shards=[str(path) for path in done.shards], samples=dict(done.samples), skipped=dict(done.skipped),
        named=done.named[:20],
    )  # fmt: skip


def data_check(o: Options) -> int:
    """Look at data before training on it: 1 where something of it cannot be used."""
    from unilip.data.check import check
    from unilip.data.sources import open_source, parse_mixture
    from unilip.files import replacing

    target = None if o.output is None else Path(o.output)
    if target is not None and (target.suffix not in (".png", ".jpg") or not target.absolute().parent.is_dir()):
        raise UniLIPError(f"--output {o.output} must be a .png or .jpg file in a folder that exists.")
    found, fine = [], True
    places = [place for text in o.words for place in parse_mixture(text)]
    for number, place in enumerate(places, 1):
        with bar(o.progress, "sample") as progress:
            about, sheet = check(open_source(place.location), o.samples, progress=progress)
        o.report.line(*about.lines())
        values = asdict(about)
        if sheet is not None and target is not None:
            path = target if len(places) == 1 else target.with_stem(f"{target.stem}-{number}")
            with replacing(path) as temporary:
                sheet.save(temporary, FORMATS[path.suffix])
            o.report.line(path)
            values["sheet"] = str(path)
        found.append(values)
        fine = fine and not about.bad and not about.damaged
    o.report.end("checked" if fine else "checked, with faults", places=found)
    return 0 if fine else 1


def data_cache(o: Options) -> None:
    """Compute what a recipe's frozen parts make of its data."""
    from unilip.recipes.catalog import get_recipe
    from unilip.recipes.record import override

    if o.output is None:
        raise UniLIPError("There is no --output; give the folder of the cache.")
    recipe = override(get_recipe(o.words[0]), o.settings)
    device = choose_device(o.device)
    from unilip.train.cache import make_cache

    made = make_cache(recipe, o.output, o.runs, device=device, dtype=o.dtype or "float32", ray=o.ray, progress=bars(o))
    o.report.line(o.output)
    note = f"{', '.join(made['names'])} of {plural(made['made'], 'sample')} in {plural(made['shards'], 'shard')}"
    o.report.end(note, path=o.output, **{key: made[key] for key in ("names", "dtype", "made", "unusable", "shards")})


def train(o: Options) -> None:
    """Run a training recipe, or go on with it; of torchrun's processes the first one tells what all of them do."""
    from unilip.recipes.catalog import all_recipes, get_recipe, require_finished
    from unilip.recipes.record import finished, leaves, override

    place = Place.of_environment()
    if place.rank:
        logging.getLogger("unilip").setLevel(logging.ERROR)
        o.report.silent = True
    if o.listing:
        return list_recipes(o, list(all_recipes().values()))
    if not o.words:
        raise UniLIPError("There is no recipe; give its name, or --list to see them all.")
    if o.data is not None:
        o.settings = [*o.settings, f"data.path={o.data}"]
    recipe = override(get_recipe(o.words[0]), o.settings)
    named = {text.partition("=")[0] for text in o.settings}
    before, after = leaves(get_recipe(o.words[0])), leaves(recipe)
    if follow := [f"{n}={after[n]}" for n in after if after[n] != before[n] and n not in named]:
        logger.info(f"follows from the data: {', '.join(follow)}")
    if o.preflight:
        return estimate(o, recipe)
    if place.world == 1:  # what the loop sees as well, after seconds of imports; there for all processes alike
        if not o.restart and (result := finished(recipe, Path(o.runs))):
            o.report.record |= {"recipe": recipe.name, "finished": True, "path": str(result)}
            o.report.line(result)
            return o.report.end(f"{recipe.name} had finished; --restart trains it again")
        for text in recipe.init if "torch" not in sys.modules else ():
            require_finished(text.replace("{seed}", str(recipe.seed)).partition("=")[2], Path(o.runs))
    device = choose_device(o.device)
    from unilip.train import loop

    given = {"restart": o.restart, "progress": o.progress, "stop_after": o.stop_after}
    try:
        folder = loop.train(recipe, o.runs, device=device, **given)
    except loop.Interrupted as error:
        logger.info(f"{error} That is: {again(o)}")
        raise SystemExit(130) from None
    whole = folder.name == "final"
    o.report.record |= {"recipe": recipe.name, "device": device, "finished": whole, "path": str(folder)}
    o.report.line(folder)
    o.report.end("finished" if whole else f"stopped and saved; `{again(o)}` goes on from there")


def again(o: Options) -> str:
    """Return the command that goes on with a run: the same, but for --restart and --stop-after."""
    words = ["unilip", "train", *o.words, *(word for text in o.settings for word in ("--set", text))]
    words += ["--runs", o.runs] if o.runs != "runs" else []
    words += ["--device", o.device] if o.device != "auto" else []
    words += [] if o.progress else ["--no-progress"]
    return f"{'torchrun ... -m ' if Place.of_environment().world > 1 else ''}{shlex.join(words)}"


def estimate(o: Options, recipe: Any) -> None:
    """Say what memory and time a recipe needs, or raise where it cannot fit."""
    from unilip.train.preflight import hardware, preflight

    found = preflight(recipe, hardware(o.preflight or "here"))
    o.report.line(*found.lines())
    o.report.end(
        "it fits", recipe=recipe.name, hardware=str(found.hardware), memory=found.memory, total=found.total,
        seconds_per_step=found.seconds, hours=found.hours,
    )  # fmt: skip


def list_recipes(o: Options, recipes: Sequence[Any]) -> None:
    """Print the table of recipes."""
    from unilip.recipes.record import leaves

    if o.json:
        print(json.dumps({recipe.name: leaves(recipe) for recipe in recipes}))
        return
    rows = [("recipe", "objective", "steps", "batch", "trains", "note")]
    for r in recipes:
        trains = " ".join(part if factor == 1 else f"{part}:{factor:g}" for part, factor in r.trains)
        rows.append((r.name, type(r.objective).__name__.lower(), f"{r.steps:,}", str(r.batch_size), trains, r.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
