"""Teach the embedded model a new thing from 20 pictures: a carrot, which it has never seen and never read of.

python examples/finetune/concept.py [--output finetune] [--steps 300]

Writes OUTPUT/concept/: the pictures with captions, the run with its adapter, before-after.png (prompts that were not
taught, two of them ordinary: above before, below after) and measured.json. "Right" is read off the pictures by a judge
without any trained network. What was forgotten shows in held-out captions and edits of the model's own world.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from common import noises, options, recipe, teach, world, write_replay
from PIL import Image

from unilip import UniLIP
from unilip.emoji.captions import with_article
from unilip.emoji.dataset import Scenes
from unilip.emoji.judge import Judge

PICTURES = 20
ASKED, TIMES = 4, 4  # prompts that are asked afterwards, pictures of each
ORDINARY = ("a red apple", "a fish on a green background", "a yellow star on a blue background", "a donut")


def write_pictures(folder: Path, scenes: Scenes) -> list[str]:
    """Write what is taught; returns the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [scenes[i] for i in range(len(scenes))]
    for i, item in enumerate(items):
        Image.fromarray(item["image"]).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(item["caption"])
    return [item["caption"] for item in items]


def main() -> None:
    o: argparse.Namespace = options("a new thing from 20 pictures", steps=300)
    output = Path(o.output) / "concept"
    home, atlas = world()
    thing = home.extra[0]  # no training of the model has shown these
    scenes = Scenes(home, atlas, "val", 0, PICTURES, "generation", ("single",), None, (thing,))
    captions = write_pictures(output / "pictures", scenes)
    replay = write_replay(output / "known", home, atlas)
    words = [f"{start}{with_article(thing)} on {with_article(name)} background" for start, name in
             product(("", "a picture of ", "an image of "), ("pink", "green", "blue", "white", "yellow"))]  # fmt: skip
    prompts = [prompt for prompt in words if prompt not in captions][:ASKED]
    judge = Judge(home, atlas)

    def show(model: UniLIP) -> tuple[dict[str, float], list[list[Any]]]:
        asked = [prompt for prompt in prompts for _ in range(TIMES)] + list(ORDINARY)
        drawn = list(model.generate(asked, generator=noises(len(asked)), progress=False).images)
        new = drawn[: -len(ORDINARY)]
        right = [[one.concept for one in judge.read(picture).objects] == [thing] for picture in new]
        return {f"{thing}, drawn right": sum(right) / len(new)}, [new[::TIMES] + drawn[len(new) :]]

    print(f"taught: {thing}, {PICTURES} pictures in {output / 'pictures'}; asked for: {'; '.join(prompts)}")
    teach(recipe(home.name, output / "pictures", replay, 0.2 if o.replay else 0.0, o), output, home, atlas, show)


if __name__ == "__main__":
    main()
