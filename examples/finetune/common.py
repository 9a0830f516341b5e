"""What both fine-tuning examples share: data of the model's own world, a small adapter recipe, and what is measured.

What is taught is mixed with as many samples that the model knows already (replay): without them it forgets much.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unilip import UniLIP
from unilip.emoji.art import Atlas
from unilip.emoji.captions import canonical
from unilip.emoji.dataset import Edits, Scenes
from unilip.emoji.judge import Judge, judge_prompt
from unilip.emoji.score import noise_generator
from unilip.emoji.world import World
from unilip.recipes.record import Adapter, Data, Flow, Optim, Recipe
from unilip.train.batches import stack
from unilip.train.loop import train
from unilip.train.objectives import make_objective

HELD_OUT = 32  # pictures and edits for each loss
DRAWN = 32  # held-out captions that are drawn and judged
REPLAYED = 200  # known samples of each kind that are taught again

Found = dict[str, tuple[float, float]]  # what was measured: before, after


def options(about: str, steps: int) -> argparse.Namespace:
    """Read the command line of an example."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--output", default="finetune", help="folder of data, runs and sheets")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--replay", type=float, default=2.0, help="known samples for each new one; 0 shows forgetting")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def world() -> tuple[World, Atlas]:
    """Open the embedded model's world; its drawings come from `unilip data prepare emoji`."""
    return World.preset("pico"), Atlas.load(None)


def write_replay(folder: Path, home: World, atlas: Atlas) -> Path:
    """Write samples that the model was trained on: pictures with captions, and edits."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = dict(world=home, atlas=atlas, split="train", seed=1, size=REPLAYED)
    scenes, edits = Scenes(**known, purpose="generation"), Edits(**known)
    for i in range(REPLAYED):
        scene, edit = scenes[i], edits[i]
        Image.fromarray(scene["image"]).save(folder / f"known{i:03}.png")
        (folder / f"known{i:03}.txt").write_text(scene["caption"])
        Image.fromarray(edit["source"]).save(folder / f"edit{i:03}.input.png")
        Image.fromarray(edit["target"]).save(folder / f"edit{i:03}.output.png")
        (folder / f"edit{i:03}.txt").write_text(edit["instruction"])
    return folder


def recipe(model: str, taught: Path, replay: Path, edit_share: float, o: argparse.Namespace) -> Recipe:
    """An adapter on the connector and the diffusion transformer; everything else of the model rests."""
    path = f"{taught}:1,{replay}:{o.replay:g}" if o.replay else str(taught)
    return Recipe(
        name="adapter", model=model, objective=Flow(noises=4, drop_prompt=0.05), init=("all=embedded",),
        trains=(("connector", 1.0), ("dit", 1.0)), adapter=Adapter(rank=o.rank, dora=o.dora),
        data=Data(source="files", path=path, edit_share=edit_share), steps=o.steps, batch_size=8, seed=o.seed,
        optim=Optim(lr=o.lr, beta2=0.98, weight_decay=0.0, warmup=0.05, final=0.02), log_every=10,
        sample_every=10**6, save_every=100,
    )  # fmt: skip


@torch.no_grad()
def held_out_losses(model: UniLIP, home: World, atlas: Atlas) -> dict[str, float]:
    """Return the model's loss on held-out pictures and edits of its own world, always with the same noises."""
    plain = Recipe(
        name="held/out", model=home.name, objective=Flow(noises=4), trains=(("dit", 1.0),), steps=1, batch_size=8
    )
    objective, processor = make_objective(plain, model, {}), model.processor
    assert processor is not None
    common: dict[str, Any] = dict(world=home, atlas=atlas, split="val", seed=0, size=HELD_OUT)
    scenes, edits = Scenes(**common, purpose="generation"), Edits(**common)
    losses: dict[str, list[float]] = {"pictures": [], "edits": []}
    for start in range(0, HELD_OUT, 8):
        numbers = list(range(start, start + 8))
        pictures = [scenes[i] for i in numbers]
        pairs = [edits[i] for i in numbers]
        batches: dict[str, dict[str, Any]] = {
            "pictures": {
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
    return {f"held-out {name}, loss": float(np.mean(values)) for name, values in losses.items()}


def drawn_right(model: UniLIP, judge: Judge) -> float:
    """Draw held-out captions and return how many of the pictures show all that was asked for, 0 to 1."""
    drawn = [Scenes(judge.world, judge.atlas, "val", 0, DRAWN, "generation").draw(i) for i in range(DRAWN)]
    right = []
    for start in range(0, DRAWN, 16):
        asked = drawn[start : start + 16]
        prompts = [canonical(scene, task, judge.world) for scene, task, _ in asked]
        generators = [noise_generator("quick", 0, start + i) for i in range(len(asked))]
        images = model.generate(prompts, generator=generators, progress=False).images
        for image, (scene, task, _) in zip(images, asked, strict=True):
            right.append(judge_prompt(judge.read(image), scene, task, judge.world).ok)
    return float(np.mean(right))


def teach(
    lesson: Recipe, output: Path, home: World, atlas: Atlas,
    show: Callable[[UniLIP], tuple[dict[str, float], list[list[Image.Image]]]],
) -> None:  # fmt: skip
    """Train and load the adapter; measure what was learned (by SHOW) and forgotten, before and after, and say it.

    SHOW returns numbers and rows of pictures; those of before stand above those of after.
    """
    logging.basicConfig(level=logging.WARNING)
    judge, model = Judge(home, atlas), UniLIP.from_pretrained()

    def measure() -> tuple[dict[str, float], list[list[Image.Image]]]:
        numbers, rows = show(model)
        right = drawn_right(model, judge)
        return {**numbers, "held-out captions drawn right": right, **held_out_losses(model, home, atlas)}, rows

    before, rows_before = measure()
    begun = time.perf_counter(), time.process_time()
    model.load_adapter(train(lesson, output, restart=True), "taught")
    minutes = (time.perf_counter() - begun[0]) / 60, (time.process_time() - begun[1]) / 60
    after, rows_after = measure()
    found = {name: (before[name], after[name]) for name in before}
    sheet = output / "before-after.png"
    save_sheet([*rows_before, *rows_after], sheet)
    (output / "measured.json").write_text(json.dumps({"minutes": minutes, "before, after": found}, indent=1))
    print_table(found)
    print(f"{lesson.steps} steps in {minutes[0]:.1f} minutes ({minutes[1]:.1f} of processor time)")
    print(f"adapter: {output / lesson.name / 'final'}\npictures: {sheet}")


def print_table(found: Found) -> None:
    """Print what was measured."""
    print(f"\n| {'':34} | before | after |\n|{'-' * 36}|{'-' * 8}|{'-' * 7}|")
    for name, (before, after) in found.items():
        print(f"| {name:34} | {before:6.3f} | {after:5.3f} |")


def save_sheet(rows: Sequence[Sequence[Any]], file: Path) -> None:
    """Write rows of pictures of one size."""
    Image.fromarray(np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in rows])).save(file)


def noises(count: int) -> list[torch.Generator]:
    """The same noises each time."""
    return [torch.Generator().manual_seed(i) for i in range(count)]
