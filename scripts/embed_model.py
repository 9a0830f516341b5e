"""Make a finished run the embedded model: float16 weights in shards that stay small, and where they come from.

    python scripts/embed_model.py runs/pico/sft/final --guidance-scale 2.5
    python scripts/embed_model.py runs/pico/sft_guests/final runs/pico/sft_hues/final

Of several runs, each of which went on from the one before, the weights are averaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from unilip import UniLIP

WEIGHTS = Path(__file__).parent.parent / "src" / "unilip" / "weights"


@torch.no_grad()
def average(runs: Sequence[Path]) -> UniLIP:
    """Load the first run and give it the mean of all runs' weights."""
    model = UniLIP.from_pretrained(runs[0])
    for done, run in enumerate(runs[1:], 1):
        another = UniLIP.from_pretrained(run)
        if another.config != model.config:
            raise SystemExit(f"{run} and {runs[0]} differ in their configurations, so they have no mean.")
        other = dict(another.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.lerp_(other[name], 1 / (done + 1))
    return model


def main() -> None:
    """Load, set the default guidance, save as float16, and note the origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a model folder, as runs/pico/sft/final")
    parser.add_argument("--guidance-scale", type=float, help="default guidance of the embedded model")
    parser.add_argument("--note", default="", help="a sentence for origin.json")
    options = parser.parse_args()
    model = average(options.runs)
    if options.guidance_scale is not None:
        sampling = dataclasses.replace(model.config.sampling, guidance_scale=options.guidance_scale)
        model.config = model.config.replace(sampling=sampling)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model", dtype=torch.float16, max_shard_size="14MB")
        for old in WEIGHTS.glob("model*"):
            old.unlink()
        shutil.copytree(Path(folder) / "model", WEIGHTS, dirs_exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    recipe = options.runs[-1] / "recipe.json"
    origin = {
        "date": date.today().isoformat(),
        "code": commit,
        "note": options.note,
        "averaged": ["/".join(run.parts[-3:-1]) for run in options.runs],
        "last_recipe": json.loads(recipe.read_text()) if recipe.exists() else None,
    }
    (WEIGHTS / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    print(f"{WEIGHTS}: {sum(f.stat().st_size for f in WEIGHTS.glob('*')) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
