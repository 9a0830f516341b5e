"""Teach the embedded model a new kind of edit from 200 pairs: "clear the picture" takes every object away.

python examples/finetune/skill.py [--output finetune] [--steps 150]

Writes OUTPUT/skill/: the pairs, the run with its adapter, before-after.png (held-out pictures: source, wanted; below
each what was made before and after) and measured.json. "Right" is read off the pictures by a judge without any trained
network: nothing is left, on the background of the source. What was forgotten shows in held-out captions and edits of
the model's own world.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import noises, options, recipe, teach, world, write_replay
from PIL import Image

from unilip import UniLIP
from unilip.emoji.dataset import Scenes, pixels
from unilip.emoji.judge import Judge
from unilip.emoji.world import Scene

PAIRS, ASKED, SHOWN = 200, 24, 8
INSTRUCTIONS = ("clear the picture", "take everything away", "make it empty")
NOT_TAUGHT = "clear it"  # the same in other words


def main() -> None:
    o = options("a new edit from 200 pairs", steps=150)
    output = Path(o.output) / "skill"
    home, atlas = world()
    common: dict[str, Any] = dict(world=home, atlas=atlas, seed=7, purpose="generation")
    taught, held_out = Scenes(**common, split="train", size=PAIRS), Scenes(**common, split="val", size=ASKED)

    def pair(scene: Scene) -> tuple[Image.Image, Image.Image]:
        source, wanted = (pixels(one, atlas, home) for one in (scene, Scene(scene.background, ())))
        return Image.fromarray(source), Image.fromarray(wanted)

    pairs = output / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    for i in range(PAIRS):
        for name, picture in zip(("input", "output"), pair(taught.draw(i)[0]), strict=True):
            picture.save(pairs / f"{i:03}.{name}.png")
        (pairs / f"{i:03}.txt").write_text(INSTRUCTIONS[i % len(INSTRUCTIONS)])
    replay = write_replay(output / "known", home, atlas)
    scenes = [held_out.draw(i)[0] for i in range(ASKED)]
    sources, wanted = zip(*map(pair, scenes), strict=True)
    judge = Judge(home, atlas)

    def show(model: UniLIP) -> tuple[dict[str, float], list[list[Any]]]:
        found: dict[str, float] = {}
        rows: list[list[Any]] = [[*sources[:SHOWN]], [*wanted[:SHOWN]]]
        for instruction in (INSTRUCTIONS[0], NOT_TAUGHT):
            generator = noises(ASKED)
            made = list(model.edit(list(sources), instruction, generator=generator, progress=False).images)
            read = [judge.read(picture) for picture in made]
            right = [not r.objects and r.background == s.background for r, s in zip(read, scenes, strict=True)]
            found[f"{instruction!r}, right"] = sum(right) / ASKED
            rows.append(made[:SHOWN])
        return found, rows

    print(f"taught: {', '.join(INSTRUCTIONS)}; {PAIRS} pairs in {pairs}")
    teach(recipe(home.name, pairs, replay, 0.75 if o.replay else 1.0, o), output, home, atlas, show)


if __name__ == "__main__":
    main()
