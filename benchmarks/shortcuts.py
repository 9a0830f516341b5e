"""How near fewer evaluations of the transformer come to the full sampler: PSNR against 20 guided steps, same noise.

    python benchmarks/shortcuts.py
    python benchmarks/shortcuts.py --model FOLDER --count 16

Held-out prompts and edits of the embedded model's world (`unilip data prepare emoji` fetches its art).
"""

from __future__ import annotations

import argparse

from PIL import Image
from torch import Tensor

from unilip import UniLIP
from unilip.emoji.art import Atlas
from unilip.emoji.dataset import Edits, Scenes
from unilip.emoji.world import World
from unilip.fast.loop import PRESETS, Settings
from unilip.pictures import psnr

WAYS = {
    "DPM-Solver++, 12 steps": {"num_inference_steps": 12},
    "UniPC, 8 steps, shift 2": {"num_inference_steps": 8, "solver": "unipc", "flow_shift": 2.0},
    "UniPC, 6 steps, shift 2.5": {"num_inference_steps": 6, "solver": "unipc", "flow_shift": 2.5},
    "UniPC, 5 steps, shift 2": {"num_inference_steps": 5, "solver": "unipc", "flow_shift": 2.0},
    "UniPC, 4 steps, shift 1.5": {"num_inference_steps": 4, "solver": "unipc", "flow_shift": 1.5},
    "guidance in the first 80 % of 20 steps": {"guided": 0.8},
    "guidance in the first 60 % of 20 steps": {"guided": 0.6},
}


def main() -> None:
    """Draw everything in every way, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint instead of the embedded model")
    parser.add_argument("--world", default="pico")
    parser.add_argument("--count", type=int, default=32, help="prompts, and edits (32)")
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    model, world, atlas = UniLIP.from_pretrained(o.model, device=o.device), World.preset(o.world), Atlas.load()
    scenes = Scenes(world, atlas, "val", 5, o.count, purpose="generation")
    drawn = Edits(world, atlas, "val", 5, o.count)
    prompts, edits = [str(scenes[i]["caption"]) for i in range(o.count)], [drawn[i] for i in range(o.count)]
    sources, instructions = [Image.fromarray(e["source"]) for e in edits], [str(e["instruction"]) for e in edits]

    def draw(name: str) -> tuple[Tensor, Tensor]:
        common = {"preset": name, "output_type": "pt", "progress": False, "generator": list(range(o.count))}
        return model.generate(prompts, **common).images, model.edit(sources, instructions, **common).images

    exact = draw("quality")
    print("| way | evaluations | generation, dB | edits, dB |\n|---|---|---|---|")
    for name, way in (*((f"preset {name}", way) for name, way in PRESETS.items()), *WAYS.items()):
        if way.get("jumps"):
            continue  # other weights
        PRESETS["measured"] = way  # as a preset of its own, so that everything goes the way it goes for users
        guided = Settings.of(model.config, "measured").guided_steps()
        near = " | ".join(f"{float(psnr(a, b).mean()):.1f}" for a, b in zip(draw("measured"), exact, strict=True))
        print(f"| {name} | {len(guided) + sum(guided)} | {near} |", flush=True)


if __name__ == "__main__":
    main()
