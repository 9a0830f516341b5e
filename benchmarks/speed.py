"""Time generation and editing against the reference path, in one process, taking turns.

    python benchmarks/speed.py --preset ci
    python benchmarks/speed.py --sizes 1b --tasks generate edit --batches 1 --json speed.json
    python benchmarks/speed.py --preset gpu --json speed.json

Every size has random weights and a stand-in tokenizer, so nothing is downloaded; the work is that of the real model.
For each size, task and number of pictures at once it prints the median time of the reference (benchmarks/reference.py)
and of ours: exact (the default), compiled where asked for, and the presets. The floor is the time
that the counted FLOPs of the exact path take at the rate of a large matrix product, measured here.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flops import counter, peak_gib
from PIL import Image
from reference import Reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from unilip import UniLIP, preset
from unilip.checkpoints.tokenizer import Tokenizer as OurTokenizer
from unilip.fewstep import add_embedder
from unilip.method.config import QUANTIZATIONS
from unilip.method.text import NEEDED_TOKENS, TEXT_END, Processor
from unilip.sampling import draw_noise

PROMPTS = ("three yellow stars above a blue house", "a red car", "two dogs and a cat on a green meadow", "a whale")
INSTRUCTION = "change the background to pink"
PRESETS: dict[str, dict[str, Any]] = {
    "ci": dict(sizes=["tiny", "nano"], tasks=["generate", "edit"], batches=[1], repeats=3),
    "cpu": dict(sizes=["nano", "1b"], tasks=["generate", "edit"], batches=[1], repeats=3),
    "gpu": dict(
        sizes=["nano", "1b", "3b"], tasks=["generate", "edit"], batches=[1, 4, 16], repeats=10, device="cuda",
        dtype="bfloat16", compile=True,
    ),
}  # fmt: skip


def random_model(size: str, device: str, dtype: torch.dtype, few_steps: bool = False) -> UniLIP:
    """Build a model of random weights, with a byte-level tokenizer that fits every size; and few steps for `turbo`."""
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), [TEXT_END, *NEEDED_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bytewise.train_from_iterator(["Generate an image: ", "Edit the image: ", *PROMPTS, INSTRUCTION], trainer)
    names = json.dumps({"pad_token": TEXT_END, "tokenizer_class": "PreTrainedTokenizerFast"})
    files = {"tokenizer.json": bytewise.to_str().encode(), "tokenizer_config.json": names.encode()}
    model = UniLIP.from_config(preset(size))
    if few_steps:
        add_embedder(model.dit)
        model.config = model.config.replace(dit=dataclasses.replace(model.config.dit, few_steps=(4, 2, 1)))
    model.processor = Processor(OurTokenizer(files), model.config)
    return model.to(device=device, dtype=dtype)


class Clock:
    """Measures calls: seconds, and the memory of this process or device at its peak."""

    def __init__(self, device: str, cpu_time: bool) -> None:
        self.device, self.now = device, time.process_time if cpu_time else time.perf_counter

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float | None, Any]:
        """Return seconds, GiB at the peak (None where it cannot be told) and the result of a call."""
        cuda = self.device.startswith("cuda")
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        start = self.now()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        seconds = self.now() - start
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_gib(), result


def forget_peak() -> None:
    """Let Linux count this process's peak memory anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Return FLOP/s of a large matrix product, the best of several."""
    side = 8192 if clock.device.startswith("cuda") else 1536
    a = torch.randn(side, side, device=clock.device, dtype=dtype)
    return max(2 * side**3 / clock(lambda: a @ a)[0] for _ in range(8))


def work(model: UniLIP, task: str, count: int) -> tuple[list[str], list[Image.Image] | None]:
    """Return the prompts or instructions of a batch, and its source pictures."""
    if task == "generate":
        return [PROMPTS[i % len(PROMPTS)] for i in range(count)], None
    side = model.config.image_size
    return [INSTRUCTION] * count, [Image.new("RGB", (side, side), (40 * i % 256, 90, 160)) for i in range(count)]


def compare(
    model: UniLIP,
    reference: Reference,
    task: str,
    count: int,
    steps: int,
    repeats: int,
    compiled: bool,
    presets: list[str],
    clock: Clock,
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """Time one size, task and number of pictures; the paths take turns."""
    everything = work(model, task, count)
    grid, guidance = model.config.grid, max(model.config.sampling.guidance_scale, 1.5)

    def generators(count: int = count) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    noise = draw_noise(count, (model.config.dit.latent_channels, grid, grid), generators())

    def first(count: int) -> tuple[list[str], list[Image.Image] | None]:
        prompts, images = everything
        return prompts[:count], images and images[:count]

    latents: dict[str, Tensor] = {}

    def ours(name: str, model: UniLIP = model, **settings: Any) -> Callable[..., None]:
        def run(steps: int | None = None if "preset" in settings else steps, count: int = count) -> None:
            prompts, images = first(count)
            common: dict[str, Any] = dict(
                generator=generators(count), output_type="latent", progress=False, num_inference_steps=steps,
                guidance_scale=None if settings.get("preset") == "turbo" else guidance, **settings,
            )  # fmt: skip
            drawn = model.generate(prompts, **common) if images is None else model.edit(images, prompts, **common)
            latents[name] = drawn.images.float().cpu()
            with torch.no_grad():
                model.from_latent(drawn.images)

        return run

    def plain(steps: int = steps, count: int = count) -> None:
        latents["reference"] = reference.run(*first(count), noise[:count], steps, guidance)[0].float().cpu()

    def compiled_run(steps: int = steps, count: int = count, name: str = "compiled", **settings: Any) -> None:
        model.runtime.compiled = accelerated
        try:
            ours(name, **settings)(steps, count)
        finally:
            model.runtime.compiled = None

    accelerated = model.compile().runtime.compiled if compiled else None
    model.runtime.compiled = None
    paths: dict[str, Callable[..., None]] = {"reference": plain, "exact": ours("exact")}
    if compiled:  # on CUDA the whole loop as one graph; a callback keeps the steps apart
        paths["compiled"] = compiled_run
        paths["compiled steps"] = partial(compiled_run, name="compiled steps", callback_on_step_end=lambda *_: None)
    paths |= {kind: ours(kind, copy.deepcopy(model).quantize(kind)) for kind in kinds}
    paths |= {name: ours(name, preset=name) for name in presets}
    # The first run of each path is not timed; on a CPU, where it only has to touch everything once, it is short and of
    # one picture. So is what is counted, which would otherwise take as long as what is timed.
    short = {} if clock.device.startswith("cuda") else {"steps": 1, "count": 1}
    for path in paths.values():
        path(**short)
    flops = []
    for few in (1, 2):
        with counter() as counted:
            paths["exact"](few, 1)
        flops.append(counted.get_total_flops())
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    peaks: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            taken, peak, _ = clock(path)
            seconds[name].append(taken)
            peaks[name] += [] if peak is None else [peak]
    exact = latents["exact"]
    differences = {name: float((latents[name] - latents["reference"]).abs().max()) for name in paths}
    away = {name: float((latents[name] - exact).norm() / exact.norm()) for name in paths}
    return {
        "task": task,
        "batch": count,
        "steps": steps,
        "flops": count * (flops[0] + (steps - 1) * (flops[1] - flops[0])),
        "paths": {
            name: {
                "median_s": statistics.median(seconds[name]),
                "least_s": min(seconds[name]),
                "ratio": statistics.median(seconds["reference"]) / statistics.median(seconds[name]),
                "peak_gib": max(peaks[name], default=None),
                "largest_difference": differences[name],
                "relative_distance": away[name],
            }
            for name in paths
        },
    }


def commit() -> str:
    """Return the commit that is checked out, or "unknown"."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as a Markdown table."""
    lines = [
        "| size | task | pictures | path | median s | reference / it | floor s | of the floor | peak GiB | "
        "largest difference of latents |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for name, p in r["paths"].items():
            peak = "" if p["peak_gib"] is None else f"{p['peak_gib']:.2f}"
            exact = name in ("reference", "exact") or name.startswith("compiled")
            floor = (f"{r['floor_s']:.3g}", f"{p['median_s'] / r['floor_s']:.2f}") if exact else ("", "")
            apart = f"{p['largest_difference']:.1e}" if exact else f"{p['relative_distance']:.3f} relative to exact"
            lines.append(
                f"| {r['size']} | {r['task']} | {r['batch']} | {name} | {p['median_s']:.3g} | {p['ratio']:.2f} | "
                f"{floor[0]} | {floor[1]} | {peak} | {apart} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="a choice of the options below; others may be given besides")
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "pico", "nano", "1b", "3b"), default=["nano"])
    parser.add_argument("--tasks", nargs="+", choices=("generate", "edit"), default=["generate", "edit"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="numbers of pictures at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="measure the compiled path, too")
    parser.add_argument(
        "--presets", nargs="*", default=["balanced", "fast", "turbo"], choices=("balanced", "fast", "turbo")
    )
    parser.add_argument("--quantize", nargs="*", default=[], choices=QUANTIZATIONS, help="measure these kinds, too")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that others use")
    parser.add_argument("--json", type=Path)
    known, _ = parser.parse_known_args()
    parser.set_defaults(**PRESETS.get(known.preset or "", {}))
    o = parser.parse_args()
    dtype, clock = getattr(torch, o.dtype), Clock(o.device, o.cpu_time)
    torch.manual_seed(0)
    rate = matmul_rate(clock, dtype)
    name = torch.cuda.get_device_name() if o.device.startswith("cuda") else platform.processor() or platform.machine()
    about = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "hardware": name, "threads": torch.get_num_threads(),
        "device": o.device, "dtype": o.dtype, "torch": torch.__version__, "matmul_flops": rate,
        "clock": "processor time" if o.cpu_time else "wall time",
    }  # fmt: skip
    print(
        ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in about.items()
        )
    )
    results = []
    for size in o.sizes:
        model = random_model(size, o.device, dtype, few_steps=True)
        reference = Reference(model)
        for task in o.tasks:
            for count in o.batches:
                found = compare(
                    model, reference, task, count, o.steps, o.repeats, o.compile, o.presets, clock, o.quantize
                )
                results.append({"size": size, **found, "floor_s": found["flops"] / rate})
                print(f"{size} {task} x{count}: exact {found['paths']['exact']['ratio']:.2f} times as fast", flush=True)
        del model, reference
    print(table(results))
    if o.json:
        o.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
