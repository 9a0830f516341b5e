"""Teach the embedded model a new kind of edit from 200 pairs: "make it grey".

python examples/finetune/skill.py [--output finetune] [--steps 300]

Writes OUTPUT/skill/: the pairs, the run with its adapter, before-after.png (held-out pictures: source, wanted, before,
after) and measured.json (distance to what was wanted, and the losses on held-out pictures and edits of the model's own
world before and after: what was forgotten).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import compare, held_out_losses, options, recipe, world
from PIL import Image

from unilip import UniLIP
from unilip.data.dataset import Scenes
from unilip.train.loop import train

INSTRUCTIONS = ("make it grey", "turn the picture grey", "take the colours away")
SHOWN = 8


def grey(picture: np.ndarray) -> Image.Image:
    """What the edit should make."""
    return Image.fromarray(picture).convert("L").convert("RGB")


def edited(model: UniLIP, sources: list[Image.Image]) -> list[Image.Image]:
    """Edit with the same noises each time."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(sources))]
    return list(model.edit(sources, INSTRUCTIONS[0], generator=generators).images)


def distance(made: list[Image.Image], wanted: list[Image.Image]) -> float:
    """Root mean square difference of pixels, 0 to 255."""
    pairs = zip(made, wanted, strict=True)
    return float(np.sqrt(np.mean([(np.asarray(a, float) - np.asarray(b, float)) ** 2 for a, b in pairs])))


def main() -> None:
    o = options("a new edit from 200 pairs", steps=300)
    output = Path(o.output) / "skill"
    data = output / "pairs"
    data.mkdir(parents=True, exist_ok=True)
    home, atlas = world()
    common: dict[str, Any] = dict(world=home, atlas=atlas, seed=7, purpose="generation")
    taught, held_out = Scenes(**common, split="train", size=200), Scenes(**common, split="val", size=SHOWN)
    for i in range(200):
        picture = taught[i]["image"]
        Image.fromarray(picture).save(data / f"{i:03}.input.png")
        grey(picture).save(data / f"{i:03}.output.png")
        (data / f"{i:03}.txt").write_text(INSTRUCTIONS[i % len(INSTRUCTIONS)])
    pictures = [held_out[i]["image"] for i in range(SHOWN)]
    sources, wanted = [Image.fromarray(p) for p in pictures], [grey(p) for p in pictures]
    model = UniLIP.from_pretrained()
    before, lost = edited(model, sources), {"before": held_out_losses(model)}
    model.load_adapter(train(recipe("grey", data, 1.0, o), output, restart=True), "grey")
    after = edited(model, sources)
    lost["after"] = held_out_losses(model)
    limit = [p.convert("RGB") for p in model.reconstruct(wanted).images]  # what the tokenizer itself can show
    distances = {
        "before": distance(before, wanted), "after": distance(after, wanted), "reconstructed": distance(limit, wanted),
    }  # fmt: skip
    compare(
        output, {"distance": distances, "held_out_loss": lost, "options": vars(o)}, [sources, wanted, before, after]
    )


if __name__ == "__main__":
    main()
