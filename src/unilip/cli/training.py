"""The verb of training: train."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from unilip.cli.options import TELLING, Options, Verb, whole
from unilip.cli.terminal import Report, say
from unilip.errors import UniLIPError
from unilip.machine import choose_device

OPTIONS: dict[str, dict[str, Any]] = {
    "--list": dict(action="store_true", dest="listing", help="list the recipes"),
    "--runs": dict(default="runs", metavar="DIR", help="folder of all runs; this one writes to DIR/RECIPE (runs)"),
    "--set": dict(
        action="append", default=[], dest="settings", metavar="NAME=VALUE", help="change a setting; repeatable"
    ),
    "--restart": dict(action="store_true", help="begin anew, even where checkpoints exist"),
    "--preflight": dict(
        metavar="HARDWARE",
        help="only estimate memory and time on h100:8 (a name and how many) or here, and refuse what cannot fit",
    ),
    "--stop-after": dict(type=whole(1, 2**31 - 1), metavar="N", help="save and stop after N more steps"),
}  # fmt: skip


def train(o: Options) -> int:
    """Run a training recipe, or go on with it."""
    from unilip.recipes.catalog import all_recipes, get_recipe
    from unilip.recipes.record import override

    if o.listing:
        return list_recipes(o, all_recipes().values())
    if not o.words:
        raise UniLIPError("There is no recipe; give its name, or --list to see them all.")
    recipe = override(get_recipe(o.words[0]), o.settings)
    if o.preflight:
        return estimate(o, recipe)
    report = Report(o, "train")
    device = choose_device(o.device)
    from unilip.train import loop

    try:
        folder = loop.train(
            recipe, o.runs, device=device, restart=o.restart, progress=o.progress, stop_after=o.stop_after
        )
    except loop.Interrupted as error:
        say(str(error))
        return 130
    finished = folder.name == "final"
    report.record |= {"recipe": recipe.name, "device": device, "finished": finished, "path": str(folder)}
    report.line(str(folder))
    report.end("finished" if finished else f"stopped; `unilip train {recipe.name}` goes on from there,")
    return 0


def estimate(o: Options, recipe: Any) -> int:
    """Say what memory and time a recipe needs, or raise where it cannot fit."""
    from unilip.train.preflight import hardware, preflight

    report = Report(o, "train")
    found = preflight(recipe, hardware(o.preflight or "here"))
    for line in found.lines():
        report.line(line)
    report.end(
        "it fits;", recipe=recipe.name, hardware=str(found.hardware), memory=found.memory, total=found.total,
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


VERBS: dict[str, Verb] = {
    "train": Verb(
        train,
        "[OPTIONS] RECIPE | --list",
        "Run a training recipe, or go on where it stopped. The result is a model folder, DIR/RECIPE/final.",
        "unilip train --list\nunilip train pico/recon --set steps=500 --set optim.lr=2e-4\n"
        "unilip train 3b/sft --preflight h100:8",
        ("--list", "--runs", "--set", "--restart", "--stop-after", "--preflight", "--device", *TELLING),
        (0, 1),
    ),
}
