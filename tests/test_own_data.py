"""The commands of docs/training.md on one's own pictures, as they are written, on a tiny model and for a step."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from test_readme import blocks
from unilip import UniLIP, cli
from unilip.adapters import adapter_names
from unilip.errors import DataError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
SMALL = ("steps=1", "batch_size=2", "accumulate=1", "model=tiny", "data.workers=0", "data.image_size=0", "ema=0")


@pytest.fixture
def home(tmp_path, picture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my-captions", "my-pairs", "both"):
        Path(name).mkdir()
    for i in range(3):
        for folder in ("my-captions", "both"):
            picture(60, 50, i).save(f"{folder}/c{i}.png")
            Path(f"{folder}/c{i}.txt").write_text("a red star")
        for folder in ("my-pairs", "both"):
            for part in ("input", "output"):
                picture(60, 50, 7 * i).save(f"{folder}/e{i}.{part}.png")
            Path(f"{folder}/e{i}.txt").write_text("make it red")
    return tmp_path


def test_the_documented_commands_work(home, tiny_folder, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr("unilip.checkpoints.hub.embedded", lambda: tiny_folder)
    lines = [line for block in blocks(PAGE, "bash") for line in block.replace("\\\n", " ").splitlines()]
    told = [shlex.split(line)[1:] for line in lines if " --data " in line and "--preflight" not in line]
    assert len(told) >= 7 and {words[1] for words in told} >= {"lora/style", "lora/concept", "lora/edit", "pico/sft"}
    for number, words in enumerate(told):
        remote = [f"init=all={tiny_folder}"] if "init=all=kanashi6" in str(words) else []
        mine = [part for one in (*SMALL, f"name=own/{number}", *remote) for part in ("--set", one)]
        code = cli.main([*words, *mine, "--device", "cpu", "--no-progress"])
        said = capsys.readouterr()
        assert code == 0, (words, said.err)
        share = "1.0" if "my-pairs" in words else "0.0"
        assert words[1].startswith("lora/") or f"data.edit_share={share}" in said.err, (words, said.err)
        assert ("data.source=files" in said.err) == (words[1] == "pico/sft")
    model = UniLIP.from_pretrained("runs/own/0/final")
    assert adapter_names(model) == ["0"]


def test_what_follows_from_the_data(home):
    def settled(name, *settings):
        data = override(get_recipe(name), settings).data
        return data.source, data.edit_share

    assert settled("pico/sft", "data.path=my-pairs") == ("files", 1.0)
    assert settled("pico/sft", "data.path=my-captions") == ("files", 0.0)
    assert (
        settled("pico/sft", "data.path=my-captions:2,my-pairs:1")
        == ("files", 0.6)
        == settled("pico/sft", "data.path=both")
    )
    assert settled("pico/sft", "data.path=my-pairs", "data.edit_share=0.3") == ("files", 0.3), "what is set stays"
    assert settled("pico/sft", "data.path=synthetic") == settled("pico/sft", "data.path=nowhere") == ("emoji", 0.6)
    assert settled("pico/pretrain", "data.path=my-pairs", "data.source=emoji") == ("emoji", 0.3)
    assert settled("lora/edit", "data.path=my-captions") == ("files", 1.0), "an edit is not learned from captions"
    assert settled("pico/sft", "data.path=both:0,my-captions") == ("files", 0.0), "what has no weight does not count"
    Path("art").mkdir()
    Path("art/atlas-flat.npz").touch()
    assert settled("pico/sft", "data.path=art") == ("emoji", 0.6)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        settled("pico/sft", "data.path=empty")


def test_the_module_is_the_command(home, monkeypatch, capsys):
    """`torchrun -m unilip.train` runs what `unilip train` does, with all its options."""
    monkeypatch.setenv("HOME", str(home))

    def train(*words):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("unilip.train", run_name="__main__")
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    for words, message in (
        (["--data", "nowhere"], "nowhere is not a folder"), (["--device", "foo"], "there is no device 'foo'"),
        (["--data", "my-captions:0"], "every place the weight 0"), (["--data", "both:0,my-pairs"], "It holds 3 edits"),
    ):  # fmt: skip
        code, _, said = train("lora/style", *words)
        assert code == 2 and message in said
    some = ("tiny/clip", "--runs=~/mine", "--stop-after", "1", "--device", "cpu", "--no-progress", "--json")
    code, out, _ = train(*some)
    assert code == 0 and json.loads(out)["path"] == str(home / "mine/tiny/clip")
    assert (home / "mine/tiny/clip/step_00000001").is_dir() and not Path("~").exists()


def test_the_wrong_kind_of_data_is_told(home, tiny_folder, capsys):
    for name, folder, message in (
        ("lora/edit", "my-captions", "holds no edits"), ("lora/style", "my-pairs", "holds no pictures with captions"),
        ("lora/style", "nowhere", "nowhere"),
    ):  # fmt: skip
        settings = [f"init=all={tiny_folder}", *SMALL, "name=own/wrong"]
        words = ["train", name, "--data", folder, *(part for one in settings for part in ("--set", one))]
        assert cli.main([*words, "--device", "cpu", "--no-progress"]) == 2
        assert message in capsys.readouterr().err
    assert not list(Path("runs").rglob("final"))
