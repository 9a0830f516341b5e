"""Every recipe by name, SIZE/STAGE: the embedded models' stages, the paper's six, and the ablations of its claims.

`recipes.json` says what each stage is, by the names of settings that `--set` knows: of each size what its stages share,
and of each stage its difference from that, or (`like`) from another stage. "{size}" stands for the size.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Any

from unilip.errors import ConfigError
from unilip.recipes.ablations import ablations
from unilip.recipes.record import (
    Adapter,
    Data,
    FewSteps,
    Flow,
    Optim,
    Recipe,
    Reconstruct,
    Shrink,
    Understand,
)

TABLE: dict[str, Any] = json.loads((resources.files("unilip.recipes") / "recipes.json").read_text(encoding="utf-8"))
OBJECTIVES: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Understand, Reconstruct, Shrink, Flow, FewSteps)}
# size -> the group of its stages, and what their texts are filled in with
SIZES: dict[str, tuple[str, dict[str, str]]] = {
    **{size: (size, {"size": size}) for size in ("tiny", "pico", "nano")},
    **{size: ("paper", {"size": size, **names}) for size, names in TABLE["released"].items()},
}


def read_stage(size: str, stage: str) -> Recipe:
    """Return a stage of the table as a recipe."""
    group, names = SIZES[size]
    stages = TABLE[group]["stages"]
    record = dict(stages[stage])
    text = json.dumps(TABLE[group]["common"] | stages.get(record.pop("like", ""), {}) | record)
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    settings: dict[str, Any] = json.loads(text)
    kinds = {"objective": OBJECTIVES[settings.pop("objective")], "optim": Optim, "data": Data, "adapter": Adapter}
    parts: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    for name in [name for name in settings if "." in name]:
        part, _, field = name.partition(".")
        parts[part][field] = settings.pop(name)
    trains = tuple(settings.pop("trains").items())
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    nested: dict[str, Any] = {part: kind(**parts[part]) for part, kind in kinds.items()}
    return Recipe(name=f"{size}/{stage}", model=size, trains=trains, **nested, **own)


def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by name, in the order in which stages follow each other; the ablations come last."""
    stages = (read_stage(size, stage) for size, (group, _) in SIZES.items() for stage in TABLE[group]["stages"])
    return {recipe.name: recipe for recipe in (*stages, *ablations())}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name, SIZE/STAGE or ablation/SIZE/VARIANT.

    Raises:
        ConfigError: there is none of that name; the message has the nearest one.
    """
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"There is no recipe {name!r}.{hint} `unilip train --list` shows all of them.")
    return recipes[name]
