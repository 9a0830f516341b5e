"""The verb of training: train."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unilip.cli.options import Options
from unilip.cli.terminal import Report, say
from unilip.errors import UniLIPError
from unilip.machine import choose_device


def train(o: Options) -> int:
    """Run a training recipe, or go on with it."""
    from unilip.files import read_json
    from unilip.recipes.catalog import all_recipes, get_recipe, require_finished
    from unilip.recipes.record import changed_settings, leaves, override

    if o.listing:
        return list_recipes(o, all_recipes().values())
    if not o.words:
        raise UniLIPError("There is no recipe; give its name, or --list to see them all.")
    if o.data is not None:
        o.settings = [*o.settings, f"data.path={o.data}"]
    recipe = override(get_recipe(o.words[0]), o.settings)
    given = {text.partition("=")[0] for text in o.settings}
    before, after = leaves(get_recipe(o.words[0])), leaves(recipe)
    if follow := [f"{n}={after[n]}" for n in after if after[n] != before[n] and n not in given]:
        say(f"follows from the data: {', '.join(follow)}")
    if o.preflight:
        return estimate(o, recipe)
    report = Report(o, "train")
    final = Path(o.runs) / recipe.folder / "final"
    if not o.restart and (final / "recipe.json").is_file():
        if not changed_settings(recipe, read_json(final / "recipe.json", "recipe of the result")):
            report.record |= {"recipe": recipe.name, "finished": True, "path": str(final)}
            report.line(str(final))
            report.end(f"{recipe.name} had finished; --restart trains it again")
            return 0
    elif "torch" not in sys.modules:  # the loop sees the same, after seconds of imports
        for text in recipe.init:
            require_finished(text.replace("{seed}", str(recipe.seed)).partition("=")[2], Path(o.runs))
    device = choose_device(o.device)
    from unilip.train import loop

    try:
        folder = loop.train(
            recipe, o.runs, device=device, restart=o.restart, progress=o.progress, stop_after=o.stop_after
        )
    except loop.Interrupted as error:
        say(f"{error} That is: {again(o)}")
        return 130
    finished = folder.name == "final"
    report.record |= {"recipe": recipe.name, "device": device, "finished": finished, "path": str(folder)}
    report.line(str(folder))
    report.end("finished" if finished else f"stopped and saved; `{again(o)}` goes on from there")
    return 0


def again(o: Options) -> str:
    """Return the command that goes on with a run: the same, but for --restart and --stop-after."""
    words = ["unilip", "train", *o.words, *(word for text in o.settings for word in ("--set", text))]
    words += ["--runs", o.runs] if o.runs != "runs" else []
    words += ["--device", o.device] if o.device != "auto" else []
    return shlex.join([*words, *([] if o.progress else ["--no-progress"])])


def estimate(o: Options, recipe: Any) -> int:
    """Say what memory and time a recipe needs, or raise where it cannot fit."""
    from unilip.train.preflight import hardware, preflight

    report = Report(o, "train")
    found = preflight(recipe, hardware(o.preflight or "here"))
    for line in found.lines():
        report.line(line)
    report.end(
        "it fits", recipe=recipe.name, hardware=str(found.hardware), memory=found.memory, total=found.total,
        seconds_per_step=found.seconds, hours=found.hours,
    )  # fmt: skip
    return 0


def list_recipes(o: Options, recipes: Iterable[Any]) -> int:
    """Print the table of recipes."""
    from unilip.recipes.record import leaves

    recipes = list(recipes)
    if o.json:
        print(json.dumps({recipe.name: leaves(recipe) for recipe in recipes}))
        return 0
    rows = [("recipe", "objective", "steps", "batch", "trains", "note")]
    for r in recipes:
        trains = " ".join(part if factor == 1 else f"{part}:{factor:g}" for part, factor in r.trains)
        rows.append((r.name, type(r.objective).__name__.lower(), f"{r.steps:,}", str(r.batch_size), trains, r.note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]).rstrip())
    return 0
