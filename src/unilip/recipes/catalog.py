"""Every recipe by name: the embedded models' stages, the paper's six, one's own adapters, the claims' ablations.

`recipes.json` says of each size what its stages share, and of each stage its difference from that, or (`like`) from
another one. "{name}" stands for a value of the size. The ablations have equal budgets and a folder for each seed, and
stand on the earlier stage of the same seed; `unilip eval claims` measures them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilip.errors import ConfigError
from unilip.files import read_table
from unilip.recipes.record import Adapter, Data, FewSteps, Flow, Optim, Recipe, Reconstruct, Shrink, Understand, meant

TABLE: dict[str, Any] = read_table("unilip.recipes", "recipes.json")
OBJECTIVES: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Understand, Reconstruct, Shrink, Flow, FewSteps)}
# size -> the group of its stages, and what their texts are filled in with
SIZES: dict[str, tuple[str, dict[str, str]]] = {size: (size, {}) for size in ("tiny", "pico", "nano")}
SIZES |= {size: ("paper", names) for size, names in TABLE["released"].items()}


def read_stage(group: str, stage: str, size: str, names: Mapping[str, Any], name: str, **common: Any) -> Recipe:
    """Return a stage of a group of the table as the recipe of that name, for a size with these values."""
    table = TABLE[group]
    own = dict(table["stages"][stage])
    like = (table.get("bases", {}) | table["stages"]).get(own.pop("like", ""), {})
    text = json.dumps(table.get("common", {}) | common | like | own).replace("{size}", size)
    for key, value in names.items():
        text = text.replace(f'"{{{key}}}"', json.dumps(value)).replace(f"{{{key}}}", str(value))
    settings: dict[str, Any] = json.loads(text)
    kinds = {"objective": OBJECTIVES[settings.pop("objective")], "optim": Optim, "data": Data, "adapter": Adapter}
    parts: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    for setting in [setting for setting in settings if "." in setting]:
        part, _, field = setting.partition(".")
        parts[part][field] = settings.pop(setting)
    for setting, value in settings.items():
        if isinstance(value, (dict, list)):
            settings[setting] = tuple(value.items() if isinstance(value, dict) else value)
    nested: dict[str, Any] = {part: kind(**parts[part]) for part, kind in kinds.items()}
    return Recipe(name=name, model=size, **nested, **settings)


def ablations() -> list[Recipe]:
    """Return every ablation of every size."""
    table = TABLE["ablation"]
    return [
        read_stage("ablation", stage, size, its["names"], f"ablation/{size}/{stage}", per_seed=True, **its["common"])
        for size, its in table["sizes"].items()
        for stage in table["stages"]
        if stage not in its["without"]
    ]


def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by name: of each size the stages in their order, one's own adapters, the ablations."""
    stages = (
        read_stage(group, stage, size, names, f"{size}/{stage}")
        for size, (group, names) in SIZES.items()
        for stage in TABLE[group]["stages"]
    )
    adapters = (read_stage("lora", stage, "pico", {}, f"lora/{stage}") for stage in TABLE["lora"]["stages"])
    return {recipe.name: recipe for recipe in (*stages, *adapters, *ablations())}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name, SIZE/STAGE, lora/KIND or ablation/SIZE/VARIANT. Raises ConfigError: none."""
    recipes = all_recipes()
    if name not in recipes:
        near = meant(name, recipes)
        raise ConfigError(f"There is no recipe {name!r}.{near} `unilip train --list` shows all of them.")
    return recipes[name]


def require_finished(source: str, runs: Path) -> None:
    """Raise ConfigError where a source is a recipe or a run that has no result yet; says what to train first."""
    name, _, seed = source.partition("/seed")
    there = (runs / source / "final").exists() or Path(source).exists()
    if not there and (name in all_recipes() or (runs / source).exists()):
        first = f"{name} --set seed={seed}" if seed else name
        raise ConfigError(f"The recipe starts from {source}, which has not finished in {runs}; train {first} first.")
