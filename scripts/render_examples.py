"""Draw the pictures of the demo again, from the scenes in examples.json, and keep its judge's sprites.

It needs the art (`unilip data prepare emoji`).

python scripts/render_examples.py
"""

from __future__ import annotations

import json
from pathlib import Path

from unilip.emoji.art import Atlas
from unilip.emoji.render import render
from unilip.emoji.world import Scene, World

FOLDER = Path(__file__).resolve().parents[1] / "src" / "unilip" / "weights" / "examples"


def main() -> None:
    record = json.loads((FOLDER / "examples.json").read_text(encoding="utf-8"))
    world, atlas = World.preset(record["world"]), Atlas.load()
    scenes = {picture["file"]: picture["scene"] for picture in record["pictures"]}
    for edit in record["edits"]:
        scenes |= {edit["source"]: edit["source_scene"], edit["target"]: edit["target_scene"]}
    for name, scene in scenes.items():
        render(Scene.from_dict(scene), atlas, world).save(FOLDER / name, optimize=True)
        print(FOLDER / name)
    atlas.of(world).save(FOLDER / "sprites.npz")


if __name__ == "__main__":
    main()
