"""Validate the judge on pictures whose contents are known: whole, broken on purpose, and degraded.

    python scripts/validate_judge.py --world pico --count 200 --seed 7 --decibels 24 22 --model embedded

Out, as JSON: how often the judge reads what is there (`right`), refuses what was broken on purpose (`refused`), also
when pictures lose as much as a decoder's do, by blur and noise or through a model's own reconstruction, and each miss.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unilip.emoji.art import Atlas
from unilip.emoji.concepts import SHAPES
from unilip.emoji.dataset import Edits, Scenes, pixels
from unilip.emoji.judge import VERSION, Judge, judge_edit, judge_prompt, smooth
from unilip.emoji.world import Obj, Scene, World, relation, sample_background
from unilip.files import generator
from unilip.model import UniLIP

BLOB = 0.16  # blur, in sizes of the smallest object, after which nobody would tell what it was
Break = Callable[[Scene, str, World, random.Random], Scene | None]


def break_colour(scene: Scene, task: str, world: World, rng: random.Random) -> Scene | None:
    """Paint one painted object in another colour."""
    painted = [obj for obj in scene.objects if obj.colour]
    if not painted:
        return None
    obj = rng.choice(painted)
    others = [
        c
        for c in world.colours_of(obj.concept, obj.style)
        if c != obj.colour and not world.clashes(replace(obj, colour=c), scene.background)
    ]
    return _change(scene, obj, replace(obj, colour=rng.choice(others))) if others else None


def break_side(scene: Scene, task: str, world: World, rng: random.Random) -> Scene | None:
    """Exchange the places of the two objects of a position scene."""
    if task != "position":
        return None
    a, b = scene.objects
    dx, dy = b.x + (b.size - a.size) // 2 - a.x, b.y + (b.size - a.size) // 2 - a.y
    one, two = _place(a, a.x + dx, a.y + dy, world), _place(b, b.x - dx, b.y - dy, world)
    return replace(scene, objects=(one, two)) if relation(one, two) != relation(a, b) else None


def _place(obj: Obj, x: int, y: int, world: World) -> Obj:
    limit = world.image_size - obj.size
    return replace(obj, x=max(0, min(x, limit)), y=max(0, min(y, limit)))


def break_count(scene: Scene, task: str, world: World, rng: random.Random) -> Scene | None:
    """Leave one of several objects out."""
    if len(scene.objects) < 2:
        return None
    gone = rng.randrange(len(scene.objects))
    return replace(scene, objects=tuple(obj for i, obj in enumerate(scene.objects) if i != gone))


def break_object(scene: Scene, task: str, world: World, rng: random.Random) -> Scene | None:
    """Draw another thing in the place of one."""
    obj = rng.choice(scene.objects)
    others = [name for name in world.concepts if name not in SHAPES and all(name != o.concept for o in scene.objects)]
    for name in rng.sample(others, len(others)):
        other = replace(obj, concept=name, colour=None, tone=None)
        if not world.clashes(other, scene.background):
            return _change(scene, obj, other)
    return None


def break_background(scene: Scene, task: str, world: World, rng: random.Random) -> Scene | None:
    """Put everything on another background."""
    other = sample_background(world, rng, scene.objects, horizon=False, other_than=scene.background)
    return replace(scene, background=other) if other else None


def _change(scene: Scene, old: Obj, new: Obj) -> Scene:
    index = scene.objects.index(old)
    return replace(scene, objects=(*scene.objects[:index], new, *scene.objects[index + 1 :]))


BREAKS: dict[str, Break] = {
    "wrong colour": break_colour,
    "wrong side": break_side,
    "one missing": break_count,
    "wrong object": break_object,
    "wrong background": break_background,
}


def degrade(picture: np.ndarray, decibel: float, rng: np.random.Generator) -> np.ndarray:
    """Blur PICTURE until half its squared error of DECIBEL PSNR is spent, spend the rest on noise two pixels wide."""
    picture32 = picture.astype(np.float32)
    budget = 255.0**2 / 10 ** (decibel / 10)
    low, high = 0.2, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        error = float(((smooth(picture32, middle) - picture32) ** 2).mean())
        low, high = (middle, high) if error < budget / 2 else (low, middle)
    soft = smooth(picture32, low)
    noise = smooth(rng.normal(size=picture.shape).astype(np.float32), 1.0)
    spent = float(((soft - picture32) ** 2).mean())
    noise *= np.sqrt(max(0.0, budget - spent)) / float(noise.std())
    return np.clip(soft + noise + 0.5, 0, 255).astype(np.uint8)


def validate_judge(
    world: World,
    atlas: Atlas,
    count: int = 200,
    seed: int = 0,
    decibels: Sequence[float] = (24.0,),
    model: UniLIP | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Judge COUNT held-out scenes and edits whole, broken and degraded; returns shares, counts and the misses.

    DECIBELS are the PSNRs to degrade pictures to; MODEL, where given, is a tokenizer to put them through as well.
    """
    judge = judge or Judge(world, atlas)
    data = Scenes(world, atlas, "val", seed, count, "tokenizer")
    right: dict[str, list[bool]] = defaultdict(list)
    refused: dict[str, list[bool]] = defaultdict(list)
    misses: list[str] = []
    started = time.monotonic()
    reads = 0

    def read(name: str, picture: np.ndarray, scene: Scene, task: str, index: int, keep: bool) -> bool:
        nonlocal reads
        reads += 1
        verdict = judge_prompt(judge.read(picture), scene, task, world)
        if verdict.ok != keep:
            misses.append(f"{name}, item {index}, {task}: {verdict.reason or 'accepted'}")
        return verdict.ok

    for index in range(count):
        item = data[index]
        scene, task, picture = item["scene"], item["task"], item["image"]
        ok = read("whole", picture, scene, task, index, True)
        right["all"].append(ok)
        right[task].append(ok)
        for decibel in decibels:
            poor = degrade(picture, decibel, np.random.default_rng(index))
            right[f"at {decibel:g} dB"].append(read(f"at {decibel:g} dB", poor, scene, task, index, True))
        if model is not None:
            again = np.asarray(model.reconstruct(picture).images[0])
            right["reconstructed"].append(read("reconstructed", again, scene, task, index, True))
        rng = generator("broken", seed, index)
        broken = {name: breaker(scene, task, world, rng) for name, breaker in BREAKS.items()}
        wrong = {name: pixels(other, atlas, world) for name, other in broken.items() if other is not None}
        for name, picture in wrong.items():
            refused[name].append(not read(name, picture, scene, task, index, False))
        if not any(obj.concept in SHAPES for obj in scene.objects):
            blob = smooth(item["image"].astype(np.float32), BLOB * min(obj.size for obj in scene.objects))
            blob = np.clip(blob + 0.5, 0, 255).astype(np.uint8)
            refused["blurred to blobs"].append(not read("blurred to blobs", blob, scene, task, index, False))
        chosen = rng.choice(sorted(wrong))
        for decibel in decibels:
            name = f"broken, at {decibel:g} dB"
            poor = degrade(wrong[chosen], decibel, np.random.default_rng(index))
            refused[name].append(not read(f"{chosen}, {name}", poor, scene, task, index, False))
    edits = Edits(world, atlas, "val", seed, count)
    done: dict[str, list[bool]] = defaultdict(list)
    ignored: dict[str, list[bool]] = defaultdict(list)
    for index in range(count):
        item = edits[index]
        reads += 2
        verdict = judge_edit(judge, item["target"], item["edit"])
        done[item["kind"]].append(verdict.ok)
        if not verdict.ok:
            misses.append(f"edit, item {index}, {item['instruction']}: {verdict.reason}")
        undone = judge_edit(judge, item["source"], item["edit"])
        ignored[item["kind"]].append(not undone.parts["done"])
        if undone.parts["done"]:
            misses.append(f"edit left undone, item {index}, {item['instruction']}: accepted")
    return {
        "judge": VERSION,
        "world": world.name,
        "atlas": atlas.fingerprint,
        "count": count,
        "seed": seed,
        "right": _shares(right),
        "refused": _shares(refused),
        "edits_accepted": _shares(done),
        "unchanged_sources_refused": _shares(ignored),
        "seconds_per_picture": round((time.monotonic() - started) / max(1, reads), 3),
        "misses": misses,
    }


def _shares(values: dict[str, list[bool]]) -> dict[str, dict[str, float | int]]:
    return {name: {"share": round(float(np.mean(v)), 4), "of": len(v)} for name, v in values.items()}


def main() -> None:
    """Print the record of a world as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="pico")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--decibels", type=float, nargs="+", default=[24.0, 22.0])
    parser.add_argument("--model", help="a tokenizer to put pictures through as well: embedded, a folder or a hub id")
    o = parser.parse_args()
    source = None if o.model == "embedded" else o.model
    parts = ("encoder", "latent_head", "pixel_decoder")
    model = UniLIP.from_pretrained(source, parts=parts) if o.model else None
    world = World.preset(o.world)
    print(json.dumps(validate_judge(world, Atlas.load(), o.count, o.seed, o.decibels, model), indent=1))


if __name__ == "__main__":
    main()
