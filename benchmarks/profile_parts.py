"""Where the time of a picture goes, part by part.

    python benchmarks/profile_parts.py --size nano
    python benchmarks/profile_parts.py --model FOLDER --task edit --steps 4 --operators

For each part: calls, seconds, share, counted GFLOP and the rate they amount to. `--operators` adds the torch profiler's
table. A size has random weights; a model is loaded as it is, and nothing loads the embedded one. (Not called `profile`:
scripts beside it would find it in place of Python's module of that name.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flops import counter
from speed import PROMPTS, random_model, work
from torch.profiler import ProfilerActivity

from unilip import UniLIP, sampling
from unilip.fast import decoder, loop
from unilip.fast.products import Products


class Watch:
    """Counts calls, seconds and FLOPs of functions, by wrapping them where they are looked up."""

    def __init__(self, model: UniLIP) -> None:
        parts = {name: model.get_submodule(name) for name in model.parts}
        places: dict[str, tuple[Any, str]] = {
            "encoder": (parts.get("encoder"), "forward"),
            "language model": (parts["mllm"], "read_with_queries"),
            "connector": (parts["connector"], "forward"),
            "keys and values": (sampling, "prepare"),
            "modulations": (parts["dit"].transformer, "modulate"),
            "packing": (Products, "multiply"),
            "steps": (loop, "step"),
            "decoder": (decoder, "decode"),
        }
        self.device, self.counting = model.device, False
        self.rows = {name: [0, 0.0, 0.0] for name in places}
        for name, (owner, function) in places.items():
            if owner is not None:
                setattr(owner, function, self.wrap(name, getattr(owner, function)))

    def now(self) -> float:
        """Return the clock when the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is counted."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if self.counting:
                with counter() as counted:
                    result = call(*arguments, **options)
                self.rows[name][2] += counted.get_total_flops()
                return result
            start = self.now()
            result = call(*arguments, **options)
            self.rows[name][0] += 1
            self.rows[name][1] += self.now() - start
            return result

        return timed


def main() -> None:
    """Read the options, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "pico", "nano", "1b", "3b"), help="random weights of this size")
    parser.add_argument("--model", help="a checkpoint instead")
    parser.add_argument("--task", choices=("generate", "edit"), default="generate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--operators", action="store_true", help="the table of the torch profiler, too")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.size:
        model = random_model(o.size, o.device, getattr(torch, o.dtype))
    else:
        model = UniLIP.from_pretrained(o.model, device=o.device, dtype=o.dtype)
    prompts, images = work(model, o.task, o.batch)

    def draw() -> None:
        settings: dict[str, Any] = dict(num_inference_steps=o.steps, guidance_scale=4.5, progress=False)
        settings["generator"] = [torch.Generator().manual_seed(i) for i in range(o.batch)]
        if images is None:
            model.generate(prompts, **settings)
        else:
            model.edit(images, prompts, **settings)

    watch = Watch(model)
    watch.counting = True
    draw()  # also warms up
    watch.counting = False
    start = watch.now()
    draw()
    whole = watch.now() - start
    rows = {name: row for name, row in watch.rows.items() if row[0]}
    rows["the rest"] = [1, whole - sum(row[1] for row in rows.values()), 0.0]
    print("| part | calls | seconds | share | GFLOP | GFLOP/s |\n|---|---|---|---|---|---|")
    for name, (calls, seconds, flops) in rows.items():
        rate = f"{flops / seconds / 1e9:.0f}" if flops and seconds else ""
        print(f"| {name} | {calls} | {seconds:.3f} | {seconds / whole:.1%} | {flops / 1e9:.1f} | {rate} |")
    print(f"| all | | {whole:.3f} | | {sum(row[2] for row in rows.values()) / 1e9:.1f} | |")
    if o.json:
        o.json.write_text(json.dumps({"seconds": whole, "parts": rows, "prompts": PROMPTS[: o.batch]}, indent=1) + "\n")
    if o.operators:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if o.device.startswith("cuda") else [])]
        with torch.profiler.profile(activities=kinds) as profiler:
            draw()
        key = "self_cuda_time_total" if o.device.startswith("cuda") else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=48))


if __name__ == "__main__":
    main()
