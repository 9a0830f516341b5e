"""Tests, verified numbers, speed, memory and a step of training on a GPU: one JSON file and one table.

    python benchmarks/gpu.py --output FOLDER
    python benchmarks/gpu.py --dry --output FOLDER

Each step is a process of its own with a limit; what fails or runs out of time is told and the rest goes on. The most
useful ones come first, none begins that has no time, and `gpu.json` and `gpu.md` are written anew after each.
`--dry` does the same steps at the smallest sizes on the processor, in this process, to see that all of them work.
Utilisation is counted operations over those of a large product of matrices, measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SECONDS, LEAST = 525.0, 20.0  # of all steps together, and what has to be left for another one


@dataclass(frozen=True)
class Step:
    """A script of this folder or, after "-m", a module, with its words; {out} stands for a file of results."""

    name: str
    seconds: float
    words: tuple[str, ...]


def steps(dry: bool) -> list[Step]:
    """Return what is run, the most useful first."""
    device = "cpu" if dry else "cuda"
    one, three = ("tiny", "tiny") if dry else ("1b", "3b")
    speed = ("speed.py", "--device", device, "--dtype", "float32" if dry else "bfloat16", "--json", "{out}")
    few = ("--repeats", "1", "--steps", "2", "--presets") if dry else ("--repeats", "3")
    files = ("tests/test_speed.py", "--collect-only") if dry else ()
    plain = "float32" if dry else "bfloat16"
    train = ("train.py", "--device", device, "--dtype", plain, "--fraction", "1", "--size", one, "--json")
    memory = ("memory.py", "--device", device, "--dtype", plain, "--json", "{out}", "--settings")
    settings = ("plain",) if dry else ("low-memory", "offload", "tiling", "int8", "fp8", "--size", "1b")
    kinds = ("int8",) if dry else ("int8", "fp8", "--compile", "--presets")
    batches = ("1",) if dry else ("1", "4", "16")
    check = ("tests/parity", "tests/parity/expected.safetensors", "--device", device, "--tolerance", "1e-3", "--json")
    return [
        Step("tests", 120, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)),
        Step("verify", 60, ("-m", "unilip", "verify", *check)),
        Step(f"speed {one}", 130, (*speed, *few, "--sizes", one, "--batches", *batches)),
        Step(f"ways {one}", 120, (*speed, *few, "--sizes", one, "--tasks", "generate", "--quantize", *kinds)),
        Step(f"train {one}", 60, (*train, "--batch-size", "1" if dry else "8", "--repeats", few[1])),
        Step(f"memory {one}", 110, (*memory, *settings)),
        Step(f"speed {three}", 110, (*speed, *few, "--sizes", three, "--batches", *batches, "--presets")),
    ]  # fmt: skip


def run(step: Step, out: Path, seconds: float, here: bool) -> dict[str, Any]:
    """Run a step; returns exit code, seconds, what it printed at last, and its results."""
    words = [str(out) if word == "{out}" else word for word in step.words]
    start = time.perf_counter()
    if here and words[1] != "pytest":
        code, printed = call(words)
    else:
        script = words if words[0] == "-m" else [str(HERE / words[0]), *words[1:]]
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=HERE.parent, start_new_session=True,
        )  # fmt: skip
        try:
            printed, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, code = process.communicate()[0], 124
    results: Any = json.loads(out.read_text()) if out.is_file() else None
    lines = [line for line in printed.splitlines() if line.strip()]
    if results is None and "--json" in words:
        results = next((json.loads(line) for line in reversed(lines) if line.startswith("{")), None)
    return {"code": code, "seconds": time.perf_counter() - start, "printed": lines[-30:], "results": results}


def call(words: list[str]) -> tuple[int, str]:
    """Run a script, or the command line, in this process."""
    printed, given = io.StringIO(), sys.argv
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    sys.argv = [name, *rest]
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module("unilip.cli" if name == "unilip" else name)
            code = module.main(rest) if name == "unilip" else module.main() or 0
    finally:
        sys.argv = given
    return code, printed.getvalue()


def table(found: dict[str, Any]) -> str:
    """Lay everything out as Markdown: the steps, then what they measured."""
    lines = [f"{found['date']}, commit {found['commit']}, {found['device']}, torch {found['torch']}", ""]
    lines += ["| step | exit code | seconds | |", "|---|---|---|---|"]
    blocks: list[str] = []
    for name, step in found["steps"].items():
        results, said = step.get("results"), (step.get("printed") or [step.get("left_out", "")])[-1]
        if name.startswith("train") and results:
            pair = [statistics.median(results[way]["seconds"]) for way in ("straightforward", "ours")]
            rates = [results["flops"] / seconds for seconds in pair]  # of the straightforward way, also for ours
            said = f"{pair[0]:.3g} s straightforward, {pair[1]:.3g} s ours"
            if peak := found.get("matmul_flops"):
                said += f"; {rates[0] / peak:.0%} and {rates[1] / peak:.0%} of a large product's rate"
        elif name == "verify" and results:
            rows = results["entries"]
            said = f"{sum(row['ok'] for row in rows)} of {len(rows)} entries agree"
        elif results and name.startswith(("speed", "ways", "memory")):
            blocks.append(f"{name}\n\n" + "\n".join(line for line in step["printed"] if line.startswith("|")))
            said = "below"
        lines.append(f"| {name} | {step.get('code', '')} | {step.get('seconds', 0):.0f} | {said[:200]} |")
    return "\n\n".join(["\n".join(lines), *blocks]) + "\n"


def main() -> None:
    """Read the options, run the steps, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder of gpu.json and gpu.md (gpu)")
    parser.add_argument("--dry", action="store_true", help="the smallest sizes, on the processor")
    o = parser.parse_args()
    if not (o.dry or torch.cuda.is_available()):
        parser.error("PyTorch offers no CUDA device here; --dry tries everything on the processor")
    sys.path.insert(0, str(HERE))
    from speed import commit

    o.output.mkdir(parents=True, exist_ok=True)
    start, device = time.perf_counter(), "processor" if o.dry else torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "device": device, "torch": str(torch.__version__),
        "dry": o.dry, "steps": {},
    }  # fmt: skip
    for n, step in enumerate(steps(o.dry)):
        name = step.name if step.name not in found["steps"] else f"{step.name} again"
        left = SECONDS - (time.perf_counter() - start)
        out = (o.output / f"step{n}.json").absolute()
        out.unlink(missing_ok=True)
        if left < LEAST and not o.dry:
            found["steps"][name] = {"left_out": f"no time: {left:.0f} s were left"}
        else:
            found["steps"][name] = done = run(step, out, min(step.seconds, left), o.dry)
            if isinstance(done["results"], dict) and "matmul_flops" in done["results"]:
                found.setdefault("matmul_flops", done["results"]["matmul_flops"])
        out.unlink(missing_ok=True)
        found["seconds"] = time.perf_counter() - start
        (o.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (o.output / "gpu.md").write_text(table(found))
    print(table(found))
    failed = [name for name, step in found["steps"].items() if step.get("code") != 0]
    if failed:
        raise SystemExit(f"failed, or out of time: {', '.join(failed)}")


if __name__ == "__main__":
    main()
