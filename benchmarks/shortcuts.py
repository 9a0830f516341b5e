"""How near fewer evaluations of the transformer come to the full sampler: PSNR against 20 guided steps, same noise.

    python benchmarks/shortcuts.py
    python benchmarks/shortcuts.py --model FOLDER --count 16 --json shortcuts.json

Held-out prompts and edits of the embedded model's world (`unilip data prepare emoji` fetches its art). The presets are
measured beside other ways that a `Preset` can say: steps, solvers, shifts, guidance in the first steps alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from unilip import UniLIP
from unilip.emoji.art import Atlas
from unilip.emoji.dataset import Edits, Scenes
from unilip.emoji.world import World
from unilip.fast.loop import PRESETS, Preset, Settings
from unilip.pictures import psnr

WAYS = {
    "DPM-Solver++, 12 steps": Preset(num_inference_steps=12),
    "UniPC, 8 steps, shift 2": Preset(num_inference_steps=8, solver="unipc", flow_shift=2.0),
    "UniPC, 6 steps, shift 2.5": Preset(num_inference_steps=6, solver="unipc", flow_shift=2.5),
    "UniPC, 5 steps, shift 2": Preset(num_inference_steps=5, solver="unipc", flow_shift=2.0),
    "UniPC, 4 steps, shift 1.5": Preset(num_inference_steps=4, solver="unipc", flow_shift=1.5),
    "guidance in the first 80 % of 20 steps": Preset(guided=0.8),
    "guidance in the first 60 % of 20 steps": Preset(guided=0.6),
}


def evaluations(settings: Settings) -> int:
    """Runs of a transformer for one picture: two in a guided step."""
    return settings.num_inference_steps + sum(settings.guided_steps())


def near(a: Tensor, b: Tensor) -> float:
    """Mean PSNR over pictures (B,3,H,W) in [0,1], in dB; equal pictures count 80."""
    return float(psnr(a, b).clamp(max=80).mean())


def main() -> None:
    """Draw everything in every way, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint instead of the embedded model")
    parser.add_argument("--world", default="pico")
    parser.add_argument("--count", type=int, default=32, help="prompts, and edits (32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    model = UniLIP.from_pretrained(o.model, device=o.device)
    world, atlas = World.preset(o.world), Atlas.load()
    scenes = Scenes(world, atlas, "val", 5, o.count, purpose="generation")
    prompts = [str(scenes[i]["caption"]) for i in range(o.count)]
    drawn = Edits(world, atlas, "val", 5, o.count)
    edits = [drawn[i] for i in range(o.count)]

    def draw(name: str) -> tuple[Tensor, Tensor]:
        def noise() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(i) for i in range(o.count)]

        made = model.generate(prompts, preset=name, output_type="pt", progress=False, generator=noise()).images
        edited = model.edit(
            [Image.fromarray(e["source"]) for e in edits], [e["instruction"] for e in edits],
            preset=name, output_type="pt", progress=False, generator=noise(),
        ).images  # fmt: skip
        return made, edited

    exact = draw("quality")
    rows = []
    print("| way | evaluations | generation, dB | edits, dB |\n|---|---|---|---|")
    for name, way in (*((f"preset {name}", way) for name, way in PRESETS.items()), *WAYS.items()):
        PRESETS["measured"] = way  # as a preset of its own, so that everything goes the way it goes for users
        made, edited = draw("measured")
        runs = evaluations(Settings.of(model.config.sampling, "measured"))
        row = {"way": name, "evaluations": runs, "generate": near(made, exact[0]), "edit": near(edited, exact[1])}
        rows.append(row)
        print(f"| {name} | {runs:g} | {row['generate']:.1f} | {row['edit']:.1f} |", flush=True)
    if o.json:
        o.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
