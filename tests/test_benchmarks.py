"""Every script of benchmarks/ runs at the smallest size, and what it measures is what it says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unilip.fast import products
from unilip.fast.loop import PRESETS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `main` of a script with options: f(module, *options) -> what it printed."""

    def call(script: Any, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *options])
        script.main()
        return capsys.readouterr().out

    return call


def test_packed_products_are_counted() -> None:
    from flops import counter

    counted = {}
    for way in products.measure((32, 48, 80), products.WAYS[:5]):
        if "packing" not in way:
            call, _ = products.prepared(way, (32, 48, 80))
            with torch.no_grad(), counter() as operations:
                call()
            counted[way] = operations.get_total_flops()
    assert counted and set(counted.values()) == {2 * 32 * 48 * 80}


@pytest.mark.slow
def test_speed(tmp_path: Path, run: Run) -> None:
    import speed

    printed = run(speed, "--sizes", "tiny", "--repeats", "1", "--json", str(tmp_path / "a"))
    found = json.loads((tmp_path / "a").read_text())["results"]
    assert {row["task"] for row in found} == {"generate", "edit"}
    assert all(0 < row["paths"]["exact"]["largest_difference"] < 1e-4 for row in found)
    assert "| tiny | edit | 1 | fast |" in printed


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_a_step_of_training(task: str, run: Run) -> None:
    import train

    common = ("--size", "tiny", "--fraction", "1", "--task", task, "--repeats", "1", "--json")
    kept = json.loads(run(train, *common))
    selective = json.loads(
        run(train, *common, "--ours", "selective", "--straightforward", "recomputed", "--prompt", "64")
    )
    for found in (kept, selective):
        assert found["gradient_difference"] < 1e-4 and found["loss_difference"] < 1e-5
    assert kept["ours"]["kept_bytes"] < kept["straightforward"]["kept_bytes"]
    assert selective["ours"]["kept_bytes"] < kept["ours"]["kept_bytes"]
    assert selective["straightforward"]["kept_bytes"] < kept["straightforward"]["kept_bytes"]
    assert (kept["prompt"], selective["prompt"]) == (48, 64)


def test_parts_of_a_picture(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import profile_parts

    from unilip import sampling
    from unilip.fast import decoder, loop

    for module, name in (
        (sampling, "prepare"),
        (products.Products, "multiply"),
        (loop, "step"),
        (decoder, "decode"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that nothing stays wrapped
    run(profile_parts, "--size", "tiny", "--task", "edit", "--steps", "3", "--json", str(tmp_path / "a"))
    parts = json.loads((tmp_path / "a").read_text())["parts"]
    assert {name: row[0] for name, row in parts.items()} == {
        "encoder": 1, "language model": 1, "connector": 1, "keys and values": 1, "modulations": 1, "packing": 1,
        "steps": 3, "decoder": 1, "the rest": 1,
    }  # fmt: skip
    assert all(row[2] > 0 for name, row in parts.items() if name not in ("packing", "the rest"))


def test_the_script_for_a_gpu_runs_dry(tmp_path: Path, run: Run) -> None:
    import gpu

    printed = run(gpu, "--dry", "--output", str(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (tmp_path / "gpu.md").read_text() in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    assert len(found["steps"]) == len(gpu.steps(dry=False)) == 7
    assert {name: step["printed"] for name, step in found["steps"].items() if step["code"]} == {}
    assert found["steps"]["tests"]["printed"][-1].startswith("tests/test_speed.py: ")  # and how many there are
    assert all(entry["ok"] for entry in found["steps"]["verify"]["results"]["entries"])
    ways = found["steps"]["ways tiny"]["results"]["results"][0]["paths"]
    assert list(ways) == ["reference", "exact", "int8"] and 0 < ways["int8"]["relative_distance"] < 0.05
    assert found["steps"]["train tiny"]["results"]["flops"] > 0 and "| tiny | edit | 1 | exact |" in printed
    assert sum(step.seconds for step in gpu.steps(dry=False)[:5]) < gpu.SECONDS < 540
    late = gpu.run(gpu.Step("late", 0, ("-m", "http.server", "0")), tmp_path / "none", 0.5, here=False)
    assert late["code"] == 124


@pytest.mark.slow
def test_memory_and_versions(tmp_path: Path, run: Run) -> None:
    import memory

    options = ("--size", "tiny", "--work", str(tmp_path), "--steps", "1", "--all-parts")
    printed = run(memory, *options, "--settings", "low-memory", "--json", str(tmp_path / "a"))
    rows = json.loads((tmp_path / "a").read_text())["rows"]
    assert list(rows) == ["plain", "low-memory"] and rows["low-memory"]["relative"] < 1e-4
    assert all(row["before_gib"] < row["load_gib"] <= row["peak_gib"] for row in rows.values())
    assert "| low-memory | " in printed
    source = str(BENCHMARKS.parent / "src")
    words = ["--model", str(tmp_path / "authors"), "--old", source, "--steps", "2", "--pictures", "1", "--repeats", "1"]
    words = [sys.executable, "-W", "ignore", str(BENCHMARKS / "versions.py"), *words, "--task", "edit"]
    environment = os.environ | {"PYTHONPATH": source}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    apart = {line.split(" | ")[0]: float(line.split(" | ")[-1].rstrip("| ")) for line in done.stdout.splitlines()[3:]}
    assert list(apart) == ["| new", "| old", "| reference"]
    assert apart["| new"] == apart["| old"] == 0 < apart["| reference"] < 1e-4


def test_shortcuts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import shortcuts

    from unilip.emoji.art import Atlas
    from unilip.emoji.world import World

    art, name = Atlas.synthetic(World.preset("pico")), "guidance in the first 80 % of 20 steps"
    monkeypatch.setattr(shortcuts.Atlas, "load", lambda: art)
    monkeypatch.setattr(shortcuts, "WAYS", {name: shortcuts.WAYS[name]})
    monkeypatch.setitem(PRESETS, "measured", PRESETS["fast"])  # so that it is gone afterwards
    rows = {}
    for line in run(shortcuts, "--count", "2").splitlines()[2:]:
        way, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        rows[way] = [float(number) for number in numbers]
    assert {way: row[0] for way, row in rows.items()} == {
        "preset quality": 40, "preset balanced": 20, "preset fast": 10, "preset measured": 10, name: 36,
    }  # fmt: skip
    assert all((row[1] == row[2] == 100) if "quality" in way else max(row[1:]) < 79 for way, row in rows.items())
    assert all(min(row[1:]) > 10 for row in rows.values())


def test_starting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import start

    monkeypatch.setattr(start, "COMMANDS", {"nothing": ["-c", "sum(range(300_000))"]})
    printed = run(start, "--repeats", "1")
    assert "| `nothing` | " in printed
    method = sum(len(path.read_text().splitlines()) for path in (start.SOURCE / "method").glob("*.py"))
    assert f"lines: {method} in src/unilip/method, " in printed
