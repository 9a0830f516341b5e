"""The scripts in examples/ run as they stand, on the tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder, and return what it prints."""

    def call(name, argument=str(tiny_folder)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, argument])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train_tiny.py"])
def test_example(name, run, tmp_path):
    out = run(name)
    assert out.strip()
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).size == (56, 56), path.name


def test_what_examples_leave(run, tmp_path):
    run("generate.py")
    assert len(list(tmp_path.glob("stars-*.png"))) == 4
    assert "alone: 0" in run("batch.py") or "e-0" in run("batch.py")
    assert run("callback.py").count("step-") == 6


def test_training_from_end_to_end(run, tmp_path):
    out = run("train_tiny.py", "runs")
    assert out.count("->") == 6
    assert (tmp_path / "runs/tiny/sft/final/model.safetensors").is_file()


def test_examples_are_short_and_say_how_they_are_run():
    for name in SCRIPTS:
        _, head, body = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')
        assert f"python examples/{name}" in head and len([line for line in body.splitlines() if line.strip()]) <= 25, (
            name
        )
