"""The two fine-tuning examples from beginning to end, on the tiny model, with few pictures and steps."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from unilip import UniLIP
from unilip.emoji.art import Atlas
from unilip.emoji.world import World

FEW = {
    "common": {"REPLAYED": 4, "HELD_OUT": 8, "DRAWN": 2},
    "concept": {"PICTURES": 3, "ASKED": 2, "TIMES": 1},
    "skill": {"PAIRS": 3, "ASKED": 4, "SHOWN": 4},
}


@pytest.mark.parametrize(("name", "rows", "columns"), [("concept", 2, 6), ("skill", 8, 4)])
def test_an_example_teaches_and_measures(name, rows, columns, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "finetune")
    monkeypatch.setattr("unilip.checkpoints.hub.embedded", lambda: tiny_folder)
    try:
        modules = {module: importlib.import_module(module) for module in ("common", name)}
        for module, values in FEW.items():
            for key, value in values.items() if module in modules else ():
                monkeypatch.setattr(modules[module], key, value)
        home = World.preset("tiny")
        for module in modules.values():
            monkeypatch.setattr(module, "world", lambda: (home, Atlas.synthetic(home)))
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), "--steps", "2", "--rank", "2"])
        modules[name].main()
    finally:
        for module in ("common", name):
            sys.modules.pop(module, None)
    said, folder = capsys.readouterr().out, tmp_path / name
    measured = json.loads((folder / "measured.json").read_text())["before, after"]
    assert len(measured) >= 4 and all(len(pair) == 2 and f"| {what}" in said for what, pair in measured.items())
    before, after = measured["held-out pictures, loss"]
    assert before != after, "the adapter acts"
    sheet = Image.open(folder / "before-after.png")
    assert str(folder / "before-after.png") in said
    assert (sheet.width, sheet.height) == (columns * home.image_size, rows * home.image_size)
    model = UniLIP.from_pretrained(tiny_folder)
    assert model.load_adapter(folder / "adapter" / "final") == "adapter"
