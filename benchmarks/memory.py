"""Peak memory of one picture, and what saving it does to the result; each setting in a process of its own.

    python benchmarks/memory.py
    python benchmarks/memory.py --model FOLDER --dtype bfloat16 --settings plain low-memory int8
    python benchmarks/memory.py --model FOLDER --dtype bfloat16 --device cuda

`plain` is the whole model on the device; `low-memory` reads one part at a time from disk and decodes in strips;
`offload` rests in main memory and works on the device (for a GPU); `tiling` only decodes in strips; int8, int4 and fp8
are torchao's. Seconds include loading. The result is compared with that of `plain`: relative distance of the latents,
PSNR of the pictures, and whether a question about the picture gets the same answer (where the encoder is loaded).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

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
PARTS = ("mllm", "connector", "dit", "pixel_decoder")


def measure(
    name: str, source: str | None, device: str, dtype: str, steps: int, folder: str, parts: tuple[str, ...] | None
) -> dict[str, Any]:
    """Load, draw one picture, and keep it in FOLDER for the comparison."""
    import torch

    from unilip import UniLIP

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    where = "cpu" if name == "offload" else device
    model = UniLIP.from_pretrained(source, dtype=dtype, device=where, parts=parts, **SETTINGS[name])
    if name == "tiling":
        model.enable_tiling()
    if name == "offload":
        model.enable_tiling().enable_cpu_offload(device)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    latents = model.generate(
        "three yellow stars above a blue house",
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent", progress=False,
    ).images  # fmt: skip
    with torch.no_grad():
        pixels = model.from_latent(latents)
    seconds = time.perf_counter() - start
    answer = None
    cuda = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "encoder" in model.parts:
        from unilip.pictures import to_images

        answer = model.ask(to_images(pixels)[0], "What is in the picture?", max_new_tokens=12)
    path = Path(folder) / f"{name}.pt"
    torch.save({"latents": latents.float().cpu(), "pixels": pixels.float().cpu(), "answer": answer}, path)
    return {"peak_gib": peak / 2**30, "before_gib": before, "load_s": loaded, "draw_s": seconds}


def main() -> None:
    """Read the options, measure each setting, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the embedded model by default")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="all that the device allows by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--all-parts", action="store_true", help="load the encoder, too, and ask about the picture")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    import torch

    chosen = o.settings or [n for n in SETTINGS if n != "offload" or o.device != "cpu"]
    chosen = ["plain", *(n for n in chosen if n != "plain")]
    rows: dict[str, dict[str, Any]] = {}
    print(
        "| setting | peak GiB | load s | draw s | latents, relative | PSNR, dB | same answer |\n"
        "|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            parts = None if o.all_parts else PARTS
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (name, o.model, o.device, o.dtype, o.steps, folder, parts))
            ours, plain = (torch.load(Path(folder) / f"{n}.pt", weights_only=True) for n in (name, "plain"))
            row["relative"] = float((ours["latents"] - plain["latents"]).norm() / plain["latents"].norm())
            error = float((ours["pixels"] - plain["pixels"]).square().mean())
            row["psnr"] = -10 * math.log10(error) if error > 0 else None
            row["same_answer"] = ours["answer"] == plain["answer"] if o.all_parts else None
            rows[name] = row
            psnr = "the same" if row["psnr"] is None else f"{row['psnr']:.1f}"
            answer = "" if row["same_answer"] is None else "yes" if row["same_answer"] else "no"
            print(
                f"| {name} | {row['peak_gib']:.2f} | {row['load_s']:.1f} | {row['draw_s']:.1f} | "
                f"{row['relative']:.1e} | {psnr} | {answer} |",
                flush=True,
            )
    if o.json:
        o.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **vars(o), "json": None, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
