"""Load and run a full-size model with random weights: seconds and peak memory of each step, each in its own process.

    python benchmarks/full_size.py --size 1b --work DIR

1. Writes a random checkpoint in the authors' format (bfloat16) to DIR, unless it is there.
2. In a fresh process: loads it, and reports the seconds and the peak resident memory beside the weights' size.
3. In a fresh process: loads it and generates one picture.
Nothing is downloaded; the pictures are noise, the work is that of the real model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_fresh_process(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a task in a new interpreter, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def peak_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(size: str, folder: str) -> dict[str, Any]:
    """Write a random model in the authors' format, bfloat16, with a small stand-in tokenizer."""
    import torch

    from unilip import UniLIP, preset
    from unilip.checkpoints.write import convert
    from unilip.emoji.tokenizer import train_tokenizer
    from unilip.emoji.world import World
    from unilip.method.text import Processor

    ours, words = Path(folder) / "ours", Path(folder) / "tokenizer"
    train_tokenizer(World.preset("pico"), 1536, words)
    model = UniLIP.from_config(preset(size))
    model.processor = Processor.from_folder(words, model.config)
    model.save_pretrained(ours, dtype=torch.bfloat16)
    convert(ours, Path(folder) / "authors", to="authors")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def load(folder: str, dtype: str) -> dict[str, Any]:
    """Load the checkpoint and measure."""
    import torch

    from unilip import UniLIP

    baseline = peak_gib()
    start = time.perf_counter()
    model = UniLIP.from_pretrained(folder, dtype=getattr(torch, dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    return {
        "seconds": time.perf_counter() - start,
        "weights_gib": weights,
        "peak_gib": peak_gib(),
        "before_gib": baseline,
    }


def draw(folder: str, dtype: str, steps: int) -> dict[str, Any]:
    """Load, generate one picture, and measure."""
    import torch

    from unilip import UniLIP

    model = UniLIP.from_pretrained(folder, dtype=getattr(torch, dtype))
    start = time.perf_counter()
    picture = model.generate(
        "a red car and a blue whale", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
    ).images[0]
    picture.save(Path(folder).parent / "picture.png")
    return {
        "seconds": time.perf_counter() - start,
        "peak_gib": peak_gib(),
        "size": picture.size,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the three steps and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=("tiny", "nano", "1b", "3b"))
    parser.add_argument("--work", required=True, type=Path, help="folder for the checkpoint")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", default=20, type=int)
    options = parser.parse_args()
    folder = options.work / "authors"
    report: dict[str, Any] = {"size": options.size, "dtype": options.dtype, "steps": options.steps}
    if not folder.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        report["write"] = in_fresh_process(write, options.size, str(options.work))
    report["load"] = in_fresh_process(load, str(folder), options.dtype)
    report["generate"] = in_fresh_process(draw, str(folder), options.dtype, options.steps)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
