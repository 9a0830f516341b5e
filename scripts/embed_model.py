"""Keep a finished run in the repository: float16 weights in shards that stay small, and where they come from.

python scripts/embed_model.py runs/pico/sft/final --guidance-scale 2.5           # the embedded model
python scripts/embed_model.py runs/pico/clip/final --to weights/chain/pico/clip/final   # a stage to go on from
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from unilip import UniLIP

WEIGHTS = Path(__file__).parent.parent / "src" / "unilip" / "weights"


def effort(run: Path, recipe: dict[str, Any]) -> dict[str, object]:
    """Return samples and minutes of a run: what its log says, pauses of more than ten minutes left out."""
    log = run / "log.jsonl"
    times = [json.loads(line)["time"] for line in log.read_text().splitlines()] if log.exists() else []
    gaps = [later - now for now, later in itertools.pairwise(times) if later - now < 600]
    count = math.prod(recipe[name] for name in ("steps", "batch_size", "accumulate")) if recipe else None
    return {"samples": count, "minutes": round(sum(gaps) / 60, 1)}


def chain_of(weights: Path, run: str) -> list[dict[str, Any]]:
    """Return the stages before RUN, in their order: those that the weights told, these themselves, and those kept."""
    found: dict[str, dict[str, Any]] = {}
    for file in (weights / "origin.json", *(weights.parents[2] / "weights" / "chain").glob("*/*/final/origin.json")):
        record = json.loads(file.read_text()) if file.exists() else {"last_recipe": {"name": run}}
        found |= {stage["stage"]: stage for stage in record.get("chain", [])}
        if (name := record["last_recipe"]["name"]) != run:
            told = {key: record[key] for key in ("date", "code", "samples", "minutes", "note")}
            found[name] = {"stage": name, **told}
    order = ("clip", "instruct", "recon", "recon_distill", "pretrain", "sft", "shapes", "few")
    return sorted(found.values(), key=lambda stage: order.index(stage["stage"].rpartition("/")[2]))


def main() -> None:
    """Load, set the default guidance, save as float16, and note the origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a model folder, as runs/pico/sft/final")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="where it goes (the package's own weights)")
    parser.add_argument("--guidance-scale", type=float, help="default guidance of the model")
    parser.add_argument("--code", help="commit that trained it (the present one)")
    parser.add_argument("--note", default="", help="a sentence for origin.json")
    options = parser.parse_args()
    model = UniLIP.from_pretrained(options.run)
    if options.guidance_scale is not None:
        sampling = dataclasses.replace(model.config.sampling, guidance_scale=options.guidance_scale)
        model.config = model.config.replace(sampling=sampling)
    options.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model", dtype=torch.float16, max_shard_size="14MB")
        for old in options.to.glob("model*"):
            old.unlink()
        shutil.copytree(Path(folder) / "model", options.to, dirs_exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    recipe_file = options.run / "recipe.json"
    recipe = json.loads(recipe_file.read_text()) if recipe_file.exists() else {}
    if recipe:
        shutil.copy(recipe_file, options.to)  # training asks it whether the stage is the one that it wants
    chain = chain_of(options.to, recipe.get("name", ""))
    origin = {
        "date": date.today().isoformat(),
        "code": options.code or commit,
        "note": options.note,
        **effort(options.run.parent, recipe),
        **({"chain": chain} if options.to == WEIGHTS else {}),
        "last_recipe": recipe or None,
    }
    (options.to / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    size = sum(file.stat().st_size for file in options.to.glob("*") if file.is_file()) / 2**20
    print(f"{options.to}: {size:.1f} MiB")


if __name__ == "__main__":
    main()
