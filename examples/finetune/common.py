"""What both fine-tuning examples share: a small adapter recipe, held-out losses, and sheets of before and after."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unilip import UniLIP
from unilip.data.art import Atlas
from unilip.data.dataset import Edits, Scenes
from unilip.data.world import World
from unilip.train.batches import stack
from unilip.train.objectives import make_objective
from unilip.train.recipe import Adapter, Data, Flow, Optim, Recipe

ANSWERS = 64  # held-out pictures and edits for each loss


def options(about: str, steps: int, seed: int = 0) -> argparse.Namespace:
    """Read the command line of an example."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--output", default="finetune", help="folder of data, runs and sheets")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--seed", type=int, default=seed)
    return parser.parse_args()


def world() -> tuple[World, Atlas]:
    """Open the embedded model's world; its drawings come from `unilip data prepare emoji`."""
    return World.preset("pico"), Atlas.load(None)


def recipe(name: str, data: Path, edit_share: float, o: argparse.Namespace) -> Recipe:
    """An adapter on the connector and the diffusion transformer; everything else of the model rests."""
    return Recipe(
        name=name, model="pico", objective=Flow(noises=4, drop_prompt=0.05), init=("all=embedded",),
        trains=(("connector", 1.0), ("dit", 1.0)), adapter=Adapter(rank=o.rank, dora=o.dora),
        data=Data(source="files", path=str(data), edit_share=edit_share), steps=o.steps, batch_size=8, seed=o.seed,
        optim=Optim(lr=2e-3, weight_decay=0.0, warmup=0.05, final=0.1), log_every=10, sample_every=10**6,
        save_every=100,
    )  # fmt: skip


@torch.no_grad()
def held_out_losses(model: UniLIP) -> dict[str, float]:
    """Return the model's loss on held-out pictures and edits of its own world, always with the same noises."""
    home, atlas = world()
    plain = Recipe(
        name="held/out", model="pico", objective=Flow(noises=4), trains=(("dit", 1.0),), steps=1, batch_size=8
    )
    objective, processor = make_objective(plain, model, {}), model.processor
    assert processor is not None
    common: dict[str, Any] = dict(world=home, atlas=atlas, split="val", seed=0, size=ANSWERS)
    scenes, edits = Scenes(**common, purpose="generation"), Edits(**common)
    losses: dict[str, list[float]] = {"generation": [], "edits": []}
    for start in range(0, ANSWERS, 8):
        numbers = list(range(start, start + 8))
        pictures = [scenes[i] for i in numbers]
        pairs = [edits[i] for i in numbers]
        batches: dict[str, dict[str, Any]] = {
            "generation": {
                "targets": stack([p["image"] for p in pictures]),
                "prompts": processor.tokenize([processor.generate_text(p["caption"]) for p in pictures]),
            },
            "edits": {
                "sources": stack([p["source"] for p in pairs]),
                "targets": stack([p["target"] for p in pairs]),
                "prompts": processor.tokenize([processor.edit_text(p["instruction"]) for p in pairs]),
            },
        }
        for name, batch in batches.items():
            losses[name].append(float(objective.loss(batch | {"seeds": numbers}, 0)[0]))
    return {name: float(np.mean(values)) for name, values in losses.items()}


def compare(output: Path, found: dict[str, Any], rows: list[list[Any]]) -> None:
    """Write what was measured, and a sheet of pictures: a row for each entry of `rows`."""
    found = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in found.items()}
    (output / "measured.json").write_text(json.dumps(found, indent=1))
    pictures = [[np.asarray(p) for p in row] for row in rows]
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in pictures])).save(output / "before-after.png")


def pictures_of(model: UniLIP, prompts: list[str]) -> list[Image.Image]:
    """Draw prompts with the same noises each time."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return list(model.generate(prompts, generator=generators).images)
