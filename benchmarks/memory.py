"""Peak memory of loading and of one picture, and what saving it does to the result; each setting in its own process.

    python benchmarks/memory.py
    python benchmarks/memory.py --size 1b --work DIR --dtype bfloat16 --settings plain low-memory int8
    python benchmarks/memory.py --model FOLDER --dtype bfloat16 --device cuda

`--size` writes a checkpoint of random weights in the authors' format (bfloat16) to DIR, unless it is there.
`plain` is the whole model on the device; `low-memory` reads one part at a time from disk and decodes in strips;
`offload` rests in main memory and works on the device (for a GPU); `tiling` only decodes in strips; int8, int4 and fp8
are torchao's. Memory is resident (on a GPU, allocated), and without mapped files; beside it what the imports took.
The result is compared with that of `plain`: relative distance of the latents, PSNR of the pictures, and whether a
question about the picture gets the same answer (where the encoder is loaded).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flops import peak_gib

from unilip import UniLIP
from unilip.checkpoints.write import convert
from unilip.pictures import psnr, to_images

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiling": {},
    "low-memory": {"low_memory": True},
    "offload": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "int8 low-memory": {"quantization": "int8", "low_memory": True},
}


class Watch(threading.Thread):
    """Samples the resident memory that is no file's (Linux): `most` of it, in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        status = Path("/proc/self/status")
        while status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            self.most = max(self.most, int(lines["RssAnon"].split()[0]) / 2**20)
            if self._done.wait(0.02):
                return

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.most


def in_fresh_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a new interpreter, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def write(size: str, folder: Path) -> None:
    """Write a random model in the authors' format."""
    from speed import random_model

    random_model(size, "cpu", torch.bfloat16).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "authors", to="authors")


def measure(
    name: str, source: str | None, device: str, dtype: str, steps: int, folder: str, parts: str | None
) -> dict[str, Any]:
    """Load, draw one picture, and keep it in FOLDER for the comparison."""
    cuda = device.startswith("cuda")

    def peak() -> float:
        if cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_gib() or 0.0

    before = 0.0 if cuda else peak()
    start = time.perf_counter()
    where = "cpu" if name == "offload" else device
    own = Watch()
    model = UniLIP.from_pretrained(source, dtype=dtype, device=where, parts=parts, **SETTINGS[name])
    if name == "tiling":
        model.enable_tiling()
    if name == "offload":
        model.enable_tiling().enable_cpu_offload(device)
    found = {"before_gib": before, "load_s": time.perf_counter() - start, "load_gib": peak()}
    found["load_own_gib"] = own.most
    if not SETTINGS[name]:
        found["weights_gib"] = sum(p.nbytes for p in model.parameters()) / 2**30
    start = time.perf_counter()
    prompt, generator = "three yellow stars above a blue house", torch.Generator().manual_seed(0)
    settings: dict[str, Any] = dict(num_inference_steps=steps, generator=generator, progress=False)
    latents = model.generate(prompt, output_type="latent", **settings).images
    pixels = model.decode(latents, output_type="pt").images
    found |= {"draw_s": time.perf_counter() - start, "peak_gib": peak(), "own_gib": own.stop()}
    answer = None
    if "encoder" in model.parts:
        answer = model.ask(to_images(pixels)[0], "What is in the picture?", max_new_tokens=12)
    path = Path(folder) / f"{name}.pt"
    torch.save({"latents": latents.float().cpu(), "pixels": pixels.float().cpu(), "answer": answer}, path)
    return found


def main() -> None:
    """Read the options, measure each setting, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the embedded model by default")
    parser.add_argument("--size", choices=("tiny", "nano", "1b", "3b"), help="random weights of this size instead")
    parser.add_argument("--work", type=Path, help="folder for these weights, kept for another run")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="all that the device allows by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--all-parts", action="store_true", help="load the encoder, too, and ask about the picture")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    chosen = o.settings or [n for n in SETTINGS if n != "offload" or o.device != "cpu"]
    chosen = ["plain", *(n for n in chosen if n != "plain")]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = o.model
        if o.size:
            work = o.work or Path(folder)
            source = str(work / "authors")
            if not Path(source).exists():
                in_fresh_process(write, o.size, work)
        print(
            "| setting | before GiB | weights GiB | peak of loading GiB | peak GiB | peak without files GiB "
            "| load s | draw s | latents, relative | PSNR, dB | same answer |\n" + "|---" * 11 + "|"
        )
        for name in chosen:
            parts = None if o.all_parts else "drawing"
            row = in_fresh_process(measure, name, source, o.device, o.dtype, o.steps, folder, parts)
            ours, plain = (torch.load(Path(folder) / f"{n}.pt", weights_only=True) for n in (name, "plain"))
            row["relative"] = float((ours["latents"] - plain["latents"]).norm() / plain["latents"].norm())
            row["psnr"] = float(psnr(ours["pixels"], plain["pixels"]).mean())
            row["same_answer"] = ours["answer"] == plain["answer"] if o.all_parts else None
            rows[name] = row
            columns = ("before_gib", "weights_gib", "load_gib", "peak_gib", "own_gib")
            sizes = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in columns)
            answer = "" if row["same_answer"] is None else "yes" if row["same_answer"] else "no"
            print(
                f"| {name} | {sizes} | {row['load_s']:.1f} | {row['draw_s']:.1f} | {row['relative']:.1e} | "
                f"{row['psnr']:.1f} | {answer} |",
                flush=True,
            )
    if o.json:
        about = {"date": time.strftime("%Y-%m-%d"), "size": o.size, "dtype": o.dtype, "steps": o.steps, "rows": rows}
        o.json.write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
