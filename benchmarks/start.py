"""What it costs to start: CPU and wall seconds of whole processes taking turns, and how much there is to read.

python benchmarks/start.py
python benchmarks/start.py --repeats 7 --threads 2
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "unilip"
COMMANDS = {
    "import unilip; unilip.UniLIP": ["-c", "import unilip; unilip.UniLIP"],
    'unilip generate "three yellow stars"': ["-m", "unilip", "generate", "three yellow stars", "--output", "."],
}


def seconds(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command in an empty folder: CPU seconds and wall seconds."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=folder, env=environment)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def lines(folder: Path) -> int:
    """Count the lines of Python files."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": str(o.threads)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(o.repeats + 1):  # the first one writes bytecode and fills the disk's cache
        for name, words in COMMANDS.items():
            once = seconds(words, environment)
            found[name] += [once] if turn else []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{o.threads} threads, {o.repeats} repeats, load {load:.1f}; median (least)")
    print("| command | CPU s | wall s |\n|---|---|---|")
    for name, times in found.items():
        cells = " | ".join(f"{statistics.median(t):.2f} ({min(t):.2f})" for t in zip(*times, strict=True))
        print(f"| `{name}` | {cells} |")
    print(f"lines: {lines(SOURCE / 'method')} in src/unilip/method, {lines(SOURCE)} in src/unilip")


if __name__ == "__main__":
    main()
