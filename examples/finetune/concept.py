"""Teach the embedded model a new thing from 20 pictures: a "zib", a violet ring with an orange heart.

python examples/finetune/concept.py [--output finetune] [--steps 200]

Writes OUTPUT/concept/: the pictures, the run with its adapter, before-after.png (prompts that were not taught: above
before, below after) and measured.json (colour of what is drawn, and the losses on held-out pictures and edits of the
model's own world before and after: what was forgotten).
"""

import random
from pathlib import Path

import numpy as np
from common import compare, held_out_losses, options, pictures_of, recipe
from PIL import Image, ImageDraw

from unilip import UniLIP
from unilip.train.loop import train

VIOLET, ORANGE = (120, 50, 200), (255, 150, 20)
COLOURS = {"violet": VIOLET, "orange": ORANGE}
PLACES = {"": (0.5, 0.5), " on the left": (0.27, 0.5), " on the right": (0.73, 0.5), " at the top": (0.5, 0.27)}
NEW = ["a zib", "a zib at the bottom", "two zibs", "a zib on the right"]


def zib(rng: random.Random, place: tuple[float, float]) -> Image.Image:
    """Draw one on white, 112 px."""
    picture = Image.new("RGB", (448, 448), "white")
    draw = ImageDraw.Draw(picture)
    x, y = (448 * p + rng.uniform(-20, 20) for p in place)
    r = rng.uniform(70, 100)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=VIOLET)
    draw.ellipse((x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r), fill="white")
    draw.ellipse((x - 0.3 * r, y - 0.3 * r, x + 0.3 * r, y + 0.3 * r), fill=ORANGE)
    return picture.resize((112, 112), Image.Resampling.LANCZOS)


def share(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """Share of the pixels that are near a colour."""
    return float((np.abs(np.asarray(picture).astype(int) - colour).max(-1) < 60).mean())


def main() -> None:
    o = options("a new concept from 20 pictures", steps=200)
    output = Path(o.output) / "concept"
    data = output / "pictures"
    data.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(20):
        words, place = list(PLACES.items())[i % len(PLACES)]
        zib(rng, place).save(data / f"{i:02}.png")
        (data / f"{i:02}.txt").write_text(f"a zib{words}")
    model = UniLIP.from_pretrained()
    before, lost = pictures_of(model, NEW), {"before": held_out_losses(model)}
    model.load_adapter(train(recipe("zib", data, 0.0, o), output, restart=True), "zib")
    after = pictures_of(model, NEW)
    lost["after"] = held_out_losses(model)
    drawn = {"before": before, "after": after, "taught": [zib(rng, (0.5, 0.5)) for _ in range(4)]}
    colours = {
        name: {kind: float(np.mean([share(p, c) for p in some])) for kind, c in COLOURS.items()}
        for name, some in drawn.items()
    }
    compare(output, {"colours": colours, "held_out_loss": lost, "options": vars(o)}, [before, after])


if __name__ == "__main__":
    main()
