"""Two versions of this package, and the libraries' own networks, drawing in turns: seconds and memory of each.

    python benchmarks/memory.py --size 1b --work DIR --settings plain --steps 1          # writes DIR/authors
    python benchmarks/versions.py --model DIR/authors --old OTHER_CHECKOUT/src --task edit --dtype bfloat16

Every turn is a process of its own, so that one model is in memory at a time: it loads, and draws `--pictures` one after
the other. `reference` is benchmarks/reference.py around the weights of this version.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flops import peak_gib

HERE = Path(__file__).resolve()
PARTS = ("mllm", "connector", "dit", "pixel_decoder")
PROMPTS = ("three yellow stars above a blue house", "two dogs and a cat on a green meadow")


def turn(o: argparse.Namespace) -> dict[str, Any]:
    """Load and draw, by whatever version is imported; latents of the first picture go to `o.latents`."""
    import torch
    from PIL import Image

    from unilip import UniLIP

    clocks = (time.perf_counter, time.process_time)
    found: dict[str, Any] = {}

    def timed(name: str, call: Any) -> Any:
        start = [clock() for clock in clocks]
        result = call()
        found[name] = [clock() - since for clock, since in zip(clocks, start, strict=True)]
        return result

    parts = (*PARTS, *(("encoder",) if o.task == "edit" else ()))
    model = timed("load", lambda: UniLIP.from_pretrained(o.model, dtype=o.dtype, parts=parts))
    side, grid = model.config.image_size, model.config.image_size // 28
    image = Image.new("RGB", (side, side), (40, 90, 160))
    reference = None
    if o.worker == "reference":
        from reference import Reference

        reference = Reference(model)

    def draw(seed: int) -> Any:
        prompts, generator = [PROMPTS[seed % 2]], torch.Generator().manual_seed(seed)
        if reference is not None:
            noise = torch.randn(1, model.config.dit.latent_channels, grid, grid, generator=generator)
            return reference.run(prompts, [image] if o.task == "edit" else None, noise, o.steps, 4.5)
        settings = dict(num_inference_steps=o.steps, guidance_scale=4.5, generator=[generator], output_type="latent")
        drawn = model.edit(image, prompts, **settings) if o.task == "edit" else model.generate(prompts, **settings)
        with torch.no_grad():
            return drawn.images, model.from_latent(drawn.images)

    for i in range(o.pictures):
        latents, _ = timed(f"picture {i + 1}", lambda i=i: draw(i))
        if i == 0:
            torch.save(latents.float(), o.latents)
    return found | {"peak_gib": peak_gib()}


def main() -> None:
    """Read the options, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint that both versions read")
    parser.add_argument("--old", help="the folder src of another checkout; without it, the reference alone")
    parser.add_argument("--task", choices=("generate", "edit"), default="generate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--latents", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        print(json.dumps(turn(o)))
        return
    sources = {"new": str(HERE.parents[1] / "src")}
    sources |= {"old": o.old} if o.old else {}
    sources["reference"] = sources["new"]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as folder:
        import torch

        for _ in range(o.repeats):
            for name, source in sources.items():
                environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": str(o.threads)}
                words = [sys.executable, str(HERE), *sys.argv[1:], "--worker", name, "--latents", f"{folder}/{name}"]
                done = subprocess.run(words, check=True, env=environment, stdout=subprocess.PIPE, text=True)
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))
        latents = {name: torch.load(f"{folder}/{name}") for name in sources}
    print(f"{o.task}, {o.dtype}, {o.steps} steps, {o.threads} threads; load {os.getloadavg()[0]:.1f}; CPU s (wall s)")
    stages = list(turns["new"][0])[:-1]
    print(f"| | {' | '.join(stages)} | peak GiB | latents from new |\n|---|{'---|' * (len(stages) + 2)}")
    for name, runs in turns.items():
        medians = [[statistics.median(run[stage][i] for run in runs) for i in (1, 0)] for stage in stages]
        peak = max(run["peak_gib"] for run in runs)
        apart = float((latents[name] - latents["new"]).norm() / latents["new"].norm())
        cells = " | ".join(f"{cpu:.2f} ({wall:.2f})" for cpu, wall in medians)
        print(f"| {name} | {cells} | {peak:.2f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
