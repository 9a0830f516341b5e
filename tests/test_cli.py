"""Every verb of the command line, from its words to its files, on the tiny model."""

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import failures
from unilip import cli, demo
from unilip.adapters import adapter_names
from unilip.cli.options import TABLE
from unilip.cli.terminal import read_prompts, slug
from unilip.emoji.render import render
from unilip.emoji.score import accepts
from unilip.emoji.world import Scene
from unilip.errors import UniLIPError
from unilip.model import UniLIP
from unilip.pictures import load_image, picture_psnr
from unilip.recipes import catalog
from unilip.recipes.record import override

QUICK = ["--steps", "2", "--no-progress", "--device", "cpu"]


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a verb on the tiny model in an empty folder: f("generate", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(verb, *words):
        model = ["--model", str(tiny_folder)] if "--model" in cli.VERBS[verb].options else []
        code = cli.main([*verb.split(), *model, *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def pictures(tmp_path, picture):
    """Two pictures on disk, one of them wide."""
    paths = [tmp_path / "cat.png", tmp_path / "wide.jpg"]
    picture().save(paths[0])
    picture(90, 40, seed=1).save(paths[1])
    return [str(path) for path in paths]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_generate_names_pictures_after_prompt_and_seed(run):
    code, out, err = run("generate", "Three yellow  stars!", "--num-images", "2", "--seed", "7", *QUICK)
    assert code == 0
    assert out.split() == ["three-yellow-stars-7.png", "three-yellow-stars-8.png"]
    assert Image.open("three-yellow-stars-7.png").size == (56, 56)
    assert "2 pictures of 2 steps" in err


def test_words_without_quotes_are_one_prompt(run):
    code, out, _ = run("generate", "three", "yellow", "stars", *QUICK)
    assert code == 0 and out.split() == ["three-yellow-stars-0.png"]


def test_a_seed_means_the_same_picture_alone_and_in_a_batch(run):
    run("generate", "a star", "--num-images", "3", "--batch-size", "3", *QUICK, "--output", "together")
    run("generate", "a star", "--num-images", "3", "--batch-size", "1", *QUICK, "--output", "alone")
    run("generate", "a star", "--seed", "2", *QUICK, "--output", "late.png")
    for name in ("a-star-0.png", "a-star-1.png", "a-star-2.png"):
        assert abs(pixels(f"together/{name}") - pixels(f"alone/{name}")).max() <= 1  # the last bit of a rounding
    assert abs(pixels("late.png") - pixels("alone/a-star-2.png")).max() <= 1
    assert abs(pixels("alone/a-star-0.png") - pixels("alone/a-star-1.png")).max() > 1


def test_free_names_are_taken_and_nothing_is_overwritten(run):
    Path("a-star-0.png").write_text("mine")
    assert run("generate", "a star", *QUICK)[1].split() == ["a-star-0-2.png"]
    assert run("generate", "a star", *QUICK)[1].split() == ["a-star-0-3.png"]
    assert Path("a-star-0.png").read_text() == "mine"
    code, _, err = run("generate", "a star", *QUICK, "--output", "a-star-0.png")
    assert code == 2 and "--force" in err and Path("a-star-0.png").read_text() == "mine"
    assert run("generate", "a star", *QUICK, "--output", "a-star-0.png", "--force")[0] == 0
    assert Image.open("a-star-0.png").size == (56, 56)
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_a_link_to_nowhere_is_a_file_that_exists(run):
    Path("link.png").symlink_to("nowhere")
    code, _, err = run("generate", "a star", *QUICK, "--output", "link.png")
    assert code == 2 and "exists already" in err


def test_force_in_a_folder_does_not_overwrite_this_run(run):
    Path("prompts.txt").write_text("a star\na star\n")
    words = ["--prompts", "prompts.txt", *QUICK, "--output", "made", "--force"]
    assert [Path(p).name for p in run("generate", *words)[1].split()] == ["a-star-0.png", "a-star-0-2.png"]
    assert run("generate", *words)[0] == 0 and len(os.listdir("made")) == 2


def test_metadata_tells_how_to_make_the_picture_again(run, tiny_folder):
    run("generate", "ein grüner Stern", "--seed", "3", "--guidance-scale", "2", *QUICK, "--output", "a.png")
    found = Image.open("a.png").text
    expected = {"prompt": "ein grüner Stern", "seed": "3", "num_inference_steps": "2", "guidance_scale": "2.0"}
    assert expected.items() <= found.items() and found["model"] == str(tiny_folder)
    run("generate", "a star", *QUICK, "--output", "b.png", "--no-metadata")
    assert not Image.open("b.png").text


def test_json_has_paths_seeds_settings_and_seconds(run):
    code, out, err = run("generate", "a star", "--seed", "5", *QUICK, "--json")
    report = json.loads(out)
    assert code == 0 and err == ""
    assert report["images"] == [{"path": "a-star-5.png", "prompt": "a star", "seed": 5}]
    assert report["settings"]["num_inference_steps"] == 2 and report["settings"]["guidance_scale"] == 4.5
    assert report["device"] == "cpu" and report["dtype"] == "float32" and report["seconds"] > 0


def test_prompts_come_from_lines_or_json_lines_or_stdin(run, monkeypatch):
    Path("lines.txt").write_text("a star\n\n  a cat  \n")
    assert run("generate", "--prompts", "lines.txt", *QUICK)[1].split() == ["a-star-0.png", "a-cat-0.png"]
    Path("lines.jsonl").write_text('{"prompt": "a dog", "seed": 9}\n{"prompt": "a car"}\n')
    assert run("generate", "--prompts", "lines.jsonl", *QUICK)[1].split() == ["a-dog-9.png", "a-car-0.png"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff bus\n"), "utf-8"))
    with pytest.raises(UniLIPError, match="is no utf-8 text"):
        read_prompts("-")
    monkeypatch.setattr("sys.stdin", io.StringIO("a bus\n"))
    assert run("generate", "--prompts", "-", *QUICK)[1].split() == ["a-bus-0.png"]


def test_solver_negative_prompt_and_size_are_used(run):
    run("generate", "a star", *QUICK, "--output", "plain.png")
    for i, words in enumerate((["--solver", "euler"], ["--negative-prompt", "a cat"], ["--guidance-scale", "1"])):
        assert run("generate", "a star", *QUICK, *words, "--output", f"{i}.png")[0] == 0
        assert abs(pixels(f"{i}.png") - pixels("plain.png")).max() > 1, words
    run("generate", "a star", *QUICK, "--size", "84", "--output", "large.webp")
    assert Image.open("large.webp").size == (84, 84)


def test_edit_follows_one_instruction_on_every_image(run, pictures):
    code, out, _ = run("edit", *pictures, "make it blue", *QUICK, "--output", "made/", "--fit", "pad", "--keep-aspect")
    made = out.split()
    assert code == 0
    assert [Path(path).name for path in made] == ["cat-make-it-blue-0.png", "wide-make-it-blue-0.png"]
    assert Image.open(made[0]).size == (56, 56) and Image.open(made[1]).size == (56, 25)


def test_options_may_stand_anywhere(run, pictures):
    code, out, _ = run("edit", pictures[0], "--seed", "3", pictures[1], *QUICK, "make it blue")
    assert code == 0 and out.split() == ["cat-make-it-blue-3.png", "wide-make-it-blue-3.png"]


def test_words_behind_two_dashes_are_no_options(run, picture):
    picture().save("-cat.png")
    words = [*QUICK, "--", "-cat.png", "make it blue"]
    assert run("edit", *words)[:2] == (0, "-cat-make-it-blue-0.png\n")
    assert run("generate", *QUICK, "three", "--", "--json")[:2] == (0, "three-json-0.png\n")


def test_reconstruct_reports_psnr(run, pictures):
    code, out, _ = run("reconstruct", *pictures, "--json", "--device", "cpu", "--keep-aspect")
    images = json.loads(out)["images"]
    assert code == 0
    assert [image["path"] for image in images] == ["cat-reconstructed.png", "wide-reconstructed.png"]
    assert Image.open("wide-reconstructed.png").size == (63, 28)
    assert images[0]["psnr"] == pytest.approx(
        picture_psnr(Image.open(pictures[0]), Image.open(images[0]["path"])), abs=1e-3
    )


def test_dtype_is_used(run):
    report = json.loads(run("generate", "a star", *QUICK, "--dtype", "bfloat16", "--json")[1])
    assert report["dtype"] == "bfloat16"


def test_prompts_of_every_editor_are_read(tmp_path):
    cases = {
        b'\xef\xbb\xbf{"prompt": "a star", "seed": 5}\r\n{"prompt": "a cat"}\r\n': [("a star", 5), ("a cat", None)],
        b"\xef\xbb\xbfa star\r\n\r\n": [("a star", None)],
        b'a star\n{"prompt": "a frog", "seed": 9}\n': [("a star", None), ("a frog", 9)],
        '{"prompt": "three\u2028stars"}\na\u2028b\n'.encode(): [("three\u2028stars", None), ("a\u2028b", None)],
        b'\xef\xbb\xbfa cat\n\xef\xbb\xbf{"prompt": "a dog"}': [("a cat", None), ("a dog", None)],
    }
    for data, expected in cases.items():
        (tmp_path / "p").write_bytes(data)
        found = read_prompts(str(tmp_path / "p"))
        assert [(entry["prompt"], entry.get("seed")) for entry in found] == expected, data


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes that are no text")
def test_no_name_of_a_source_loses_a_picture(run, picture):
    names = [("a-long-name-" * 30)[:250] + ".png", "猫" * 83 + ".png", os.fsdecode(b"caf\xe9\n.png"), "z.png"]
    for name in names:
        picture().save(name)
    words = ["edit", *names, "make it " + "猫" * 48, *QUICK, "--batch-size", "1", "--json", "--output", "out"]
    code, out, _ = run(*words)
    made = json.loads(out)["images"]
    assert code == 0 and [entry["image"] for entry in made] == names and len(os.listdir("out")) == 4
    assert run("reconstruct", *names, "--output", "again", "--device", "cpu")[0] == 0 and len(os.listdir("again")) == 4
    code, _, err = run("generate", "a star", *QUICK, "--output", "x" * 300 + ".png")
    assert code == 2 and "too long" in err
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR):  # of a run's folder, say
        line, code = cli.explain(OSError(number, os.strerror(number), "ro/runs"))
        assert code == 2 and line == f"{os.strerror(number)}: ro/runs; give another place."
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cli.explain(full) == ("No space left on device; make room, and give the same command again.", 1)
    assert cli.explain(UniLIPError(f"runs cannot be written ({full})."))[1] == 1  # a full disk is no bad input


def test_an_equal_picture_is_counted_and_not_averaged(run, pictures, monkeypatch):
    from unilip.model import ImageOutput, UniLIP

    def again(self, images, **_):
        return ImageOutput([image.copy() if n == 0 else Image.new("RGB", image.size) for n, image in enumerate(images)])

    alone = json.loads(run("reconstruct", pictures[0], "--json", "--device", "cpu")[1])["images"][0]
    assert alone["equal"] is False and 0 < alone["psnr"] < 100
    monkeypatch.setattr(UniLIP, "reconstruct", again)
    code, _, err = run("reconstruct", *pictures, "--device", "cpu")
    assert code == 0 and "and 1 equal to the source, not in the mean" in err
    found = json.loads(run("reconstruct", *pictures, "--json", "--device", "cpu")[1])["images"]
    assert [image["equal"] for image in found] == [True, False] and found[0]["psnr"] is None
    assert f"PSNR {found[1]['psnr']:.2f} dB" in err
    assert "PSNR inf dB" in run("reconstruct", pictures[0], "--device", "cpu")[2]


def test_loading_and_drawing_are_told_apart(run):
    report = json.loads(run("generate", "a star", *QUICK, "--json")[1])
    assert report["load_seconds"] > 0 and report["seconds"] > 0
    assert re.search(
        r"1 picture of 2 steps \(loaded in [\d.]+ s, then [\d.]+ s\)", run("generate", "a star", *QUICK)[2]
    )


def test_adapters_act_as_strongly_as_told(run, fresh_model, tmp_path):
    pytest.importorskip("peft")
    import torch

    from unilip.recipes.catalog import get_recipe
    from unilip.recipes.record import override
    from unilip.train.adapters import add_adapter, save_adapter

    model = fresh_model()
    settings = ["adapter.rank=2", "trains=connector,dit", "adapter.targets=to_q,to_v,q_proj"]
    add_adapter(override(get_recipe("tiny/sft"), settings), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "mine")
    shown = {}
    for name, words in {"plain": [], "none": ["mine:0"], "half": ["mine:0.5"], "whole": ["mine"]}.items():
        given = [part for word in words for part in ("--adapter", word)]
        assert run("generate", "a star", *QUICK, *given, "--output", f"{name}.png")[0] == 0
        shown[name] = pixels(f"{name}.png")
    assert (shown["plain"] == shown["none"]).all()
    assert all((shown[a] != shown[b]).any() for a, b in (("plain", "half"), ("half", "whole")))
    code, _, err = run("ask", "Why?", "--adapter", "mine", "--max-new-tokens", "2")
    assert code == 0 and "mine changes connector, dit, which this verb does not use" in err
    for word, message in {"nowhere": "holds no adapter_config.json", "mine:nan": "finite"}.items():
        code, _, err = run("generate", "a star", *QUICK, "--adapter", word)
        assert code == 2 and message in err
    assert run("generate", "a star", *QUICK, "--low-memory", "--adapter", "mine", "--output", "low.png")[0] == 0
    assert abs(pixels("low.png").astype(int) - shown["whole"]).max() <= 1


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(run, fresh_model, tmp_path, monkeypatch):
    """A shell leaves `--output=~/x` as it is, and so does Python's own `from_pretrained("~/x")`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    home.mkdir()
    assert run("generate", "a star", *QUICK, "--output=~/star.png")[0] == 0 and (home / "star.png").is_file()
    assert run("train", "tiny/clip", "--runs=~/runs", "--stop-after=1", "--device=cpu", "--no-progress")[0] == 0
    assert (home / "runs" / "tiny" / "clip").is_dir() and not list(tmp_path.glob("~*"))
    pytest.importorskip("peft")
    from unilip.info import describe
    from unilip.recipes.catalog import get_recipe
    from unilip.recipes.record import override
    from unilip.train.adapters import add_adapter, save_adapter

    model = fresh_model()
    model.save_pretrained(home / "model")
    add_adapter(override(get_recipe("tiny/sft"), ["adapter.rank=2", "trains=dit", "adapter.targets=to_q"]), model)
    save_adapter(model, home / "mine", "../model")
    assert adapter_names(UniLIP.from_pretrained("~/mine")) == ["mine"] and describe("~/mine")["kind"] == "adapter"
    plain = UniLIP.from_pretrained("~/model")
    plain.load_adapter("~/mine")
    assert run("generate", "a star", *QUICK, "--adapter=~/mine:0.5", "--output", "half.png")[0] == 0


# --- answers --------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone(run, pictures, tiny_model):
    code, out, err = run("ask", pictures[0], "What is this?", "--max-new-tokens", "4")
    assert code == 0 and err == ""
    assert out.strip() == tiny_model.ask(pictures[0], "What is this?", max_new_tokens=4)


def test_ask_about_several_images(run, pictures, tiny_model):
    code, out, _ = run("ask", *pictures, "What is this?", "--max-new-tokens", "4")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and [line[:2] for line in lines] == [[path, "What is this?"] for path in pictures]
    report = json.loads(run("ask", *pictures, "What is this?", "--together", "--max-new-tokens", "4", "--json")[1])
    assert [answer["images"] for answer in report["answers"]] == [pictures]
    assert report["answers"][0]["answer"] == tiny_model.ask(pictures, "What is this?", max_new_tokens=4)


def test_each_line_asked_together_is_a_question_of_its_own(run, pictures):
    lines = [{"prompt": "Who?", "image": pictures, "seed": 4}, {"prompt": "Who?", "image": pictures[0]}]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--prompts", "q.jsonl", "--together", "--max-new-tokens", "4", "--json"]
    report = json.loads(run("ask", *words)[1])
    assert [answer["images"] for answer in report["answers"]] == [pictures, pictures[:1]]
    Path("q.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps({**lines[0], "seed": 5}))
    first, second = json.loads(run("ask", *words, "--temperature", "9")[1])["answers"]
    assert first["answer"] != second["answer"]  # each has its seed


def test_ask_without_an_image(run, tiny_model):
    code, out, _ = run("ask", "Which animal says moo?", "--max-new-tokens", "4")
    assert code == 0 and out.strip() == tiny_model.ask(None, "Which animal says moo?", max_new_tokens=4)


def test_sampled_answers_depend_on_the_seed_alone(run):
    Path("q.txt").write_text("Who?\nWhat?\n")
    words = ["--prompts", "q.txt", "--temperature", "2", "--max-new-tokens", "6"]
    first = run("ask", *words, "--seed", "1")[1]
    assert run("ask", *words, "--seed", "1")[1] == first != run("ask", *words, "--seed", "2")[1]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_convert_and_info(run, tiny_folder):
    code, out, _ = run("convert", str(tiny_folder), "theirs", "--to", "authors", "--dtype", "float16")
    assert code == 0 and out.strip().endswith("theirs")
    report = json.loads(run("info", "theirs", "--json")[1])
    assert report["kind"] == "authors" and report["dtype"] == "float16"
    code, out, _ = run("info", str(tiny_folder))
    assert code == 0 and "position embedding   on, scale 1" in out and '"image_size": 56' in out
    code, _, err = run("convert", str(tiny_folder), "theirs")
    assert code == 2 and "--force" in err
    assert run("convert", "theirs", "ours")[0] == 0


def test_verify_tells_by_its_exit_code(run, tiny_folder, tiny_model):
    import torch
    from safetensors.torch import save_file

    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tiny_model.encoder(pixels)
    save_file({"recon.pixel_values": pixels, "recon.features": features}, "good.safetensors")
    save_file({"recon.pixel_values": pixels, "recon.features": features + 1}, "bad.safetensors")
    code, out, _ = run("verify", str(tiny_folder), "good.safetensors", "--device", "cpu")
    assert code == 0 and "all within tolerance" in out
    code, out, _ = run("verify", str(tiny_folder), "bad.safetensors", "--json", "--device", "cpu")
    assert code == 1 and json.loads(out)["ok"] is False
    assert run("verify", str(tiny_folder), "bad.safetensors", "--tolerance", "2")[0] == 0


# --- training -------------------------------------------------------------------------------------------------------


def test_train_lists_its_recipes(run):
    from unilip.recipes.catalog import all_recipes

    code, out, _ = run("train", "--list")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["recipe", "objective", "steps", "batch", "trains", "note"]
    assert [line.split()[0] for line in lines[1:]] == list(all_recipes())
    assert json.loads(run("train", "--list", "--json")[1])["pico/sft"]["batch_size"] > 0


def test_train_hands_its_options_on(run, monkeypatch):
    from unilip.train import loop

    seen = {}

    def fake(recipe, runs, **options):
        seen.update(options, steps=recipe.steps, lr=recipe.optim.lr, runs=runs)
        return Path(runs) / recipe.name / "final"

    monkeypatch.setattr(loop, "train", fake)
    words = ["--set", "steps=7", "--set", "optim.lr=2e-3", "--runs", "r", "--restart", "--stop-after", "3"]
    code, out, _ = run("train", "tiny/recon", *words, "--device", "cpu", "--no-progress")
    assert code == 0 and out.strip() == str(Path("r/tiny/recon/final"))
    expected = {
        "steps": 7,
        "lr": 2e-3,
        "runs": "r",
        "restart": True,
        "stop_after": 3,
        "device": "cpu",
        "progress": False,
    }
    assert seen == expected


def test_an_interrupted_training_says_how_to_go_on(run, monkeypatch):
    from unilip.train import loop

    def stopped(*words, **options):
        raise loop.Interrupted("SIGINT at step 3 of 9; saved, the same command goes on from there.")

    monkeypatch.setattr(loop, "train", stopped)
    code, _, err = run("train", "tiny/recon")
    assert code == 130 and "goes on from there" in err and "error" not in err


def test_a_stopped_training_names_the_command_that_goes_on(run, monkeypatch):
    from unilip.train import loop

    monkeypatch.setattr(loop, "train", lambda recipe, runs, **_: Path(runs) / recipe.name)
    given = ["--set", "name=tiny/mine", "--set", "note=two words", "--runs", "my runs", "--device", "cpu"]
    code, _, err = run("train", "tiny/recon", *given, "--restart", "--stop-after", "2")
    command = re.search("`unilip (.*)`", err)[1]
    assert code == 0 and shlex.split(command) == ["train", "tiny/recon", *given]


def test_of_several_processes_the_first_tells_what_all_do(run, monkeypatch):
    from unilip.train import loop

    monkeypatch.setattr(loop, "train", lambda recipe, runs, **_: Path(runs) / recipe.name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for more in ((), ("--json",)):
            code, out, err = run("train", "tiny/recon", "--runs", "r", "--device", "cpu", *more)
            assert code == 0 and len(out.splitlines()) == lines
            assert ("`torchrun ... -m unilip train tiny/recon --runs r --device cpu`" in err) == (lines and not more)
    assert run("train", "tiny/nothing")[2].startswith("unilip: error in process 1: There is no recipe")


# --- art and evaluation ---------------------------------------------------------------------------------------------


def test_data_prepare_hands_its_folders_on(run, monkeypatch):
    from unilip.emoji import art

    monkeypatch.setattr(art, "prepare", lambda output, source, progress: progress(1, 1) or output / "atlas.npz")
    Path("packed").mkdir()
    code, out, _ = run("data prepare emoji", "--source", "packed", "--output", "art")
    assert code == 0 and out.strip() == str(Path("art/atlas.npz"))


def test_eval_hands_its_options_on(run, monkeypatch, tiny_folder):
    from unilip.emoji import score as emoji

    seen = []
    monkeypatch.setattr(emoji, "evaluate", lambda *words, **options: seen.append((words, options)) or {"model": "tiny"})
    words = ["--parts", "gen,edit", "--count", "3", "--seeds", "2", "--steps", "4", "--world", "tiny", "--output", "r"]
    code, out, _ = run("eval emoji", *words, "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["results"] == {"model": "tiny"}
    (model, folder, world), options = seen[0]
    assert (model.config.name, model.device.type, folder, world.name) == ("tiny", "cpu", Path("r"), "tiny")
    assert options["parts"] == ["gen", "edit"] and options["count"] == 3 and options["seeds"] == 2
    assert options["steps"] == 4 and "guidance_scale" not in options


# --- the demo -------------------------------------------------------------------------------------------------------


def test_the_demo_makes_one_page_and_its_pictures(run):
    code, out, err = run("demo", "--device", "cpu")
    assert code == 0 and out.strip() == str(Path("demo/index.html"))
    page = Path("demo/index.html").read_text(encoding="utf-8")
    shown = {part.split('"')[0] for part in page.split('src="')[1:]}
    assert shown == {path.name for path in Path("demo").glob("*.png")} and len(shown) > 20
    assert "Outside its world" in page and "as it should be" in page and "three yellow stars" in page
    assert not re.search(r'src="[a-z]+:|<link|<script|url\(', page)  # it needs no network
    assert "unilip edit demo/edit-blue-car-source.png" in page and "unilip generate" in page
    for part in ("reconstruct:", "generate:", "edit:", "ask:"):
        assert part in err
    Path("demo/notes.txt").write_text("mine")
    assert run("demo", "--device", "cpu")[0] == 0, "a demo may replace a demo"
    assert Path("demo/notes.txt").read_text() == "mine"
    assert sorted(os.listdir()) == ["demo"]


def test_the_demo_leaves_other_folders_alone(run):
    Path("mine").mkdir()
    Path("mine/index.html").write_text("mine")
    code, _, err = run("demo", "--output", "mine")
    assert code == 2 and "no demo made" in err and os.listdir("mine") == ["index.html"]


def test_a_failing_demo_changes_nothing(fresh_model, tmp_path):
    model = fresh_model(parts=("encoder", "latent_head", "pixel_decoder"))
    with pytest.raises(UniLIPError):
        demo.run(model, tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_examples_are_whole():
    found = demo.examples()
    pictures, edits = found["pictures"], found["edits"]
    assert len(pictures) >= 4 and len(edits) >= 2 and "three yellow stars" in found["prompts"]
    assert "Microsoft" in found["credits"]
    for name in [p["file"] for p in pictures] + [e[key] for e in edits for key in ("source", "target")]:
        assert Image.open(demo.FOLDER / name).size == (112, 112)
    answers = pictures[0]["questions"][0]["answers"]
    assert accepts("A panda.", answers) and not accepts("a cat", answers)


def section(line="", cards=(), again=""):
    return {"line": line, "cards": cards, "again": again}


def test_a_page_of_the_demo_holds_hostile_words_as_words(tmp_path):
    bad, quoted = "<script>alert('1')</script>", '"><img src=x onerror=a>'
    show = demo._Show(UniLIP.from_pretrained(), tmp_path, 0, bad, ("--model", bad))
    told = {"question": bad, "answer": bad, "truth": bad, "right": False}
    cards = [demo.Card({f"{quoted}.png": bad}, bad, (False, bad), [told, told | {"answer": ""}])]
    parts = dict.fromkeys(("generate", "edit", "ask", "reconstruct", "outside"), section(bad, cards, show.command(bad)))
    page = show.page(parts, bad)
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") > 5 * 8
    assert "<i>nothing</i>" in page


def test_the_demo_teaches_a_new_thing(tmp_path, monkeypatch, capsys):
    """Three steps teach nothing, and that is what it then says; only the embedded model is taught."""
    short = override(catalog.get_recipe("lora/concept"), ["steps=3"])
    monkeypatch.setattr(catalog, "get_recipe", lambda name: short)
    show = demo._Show(UniLIP.from_pretrained(), tmp_path, 0, "", ())
    result, cards, again = show.learn()
    assert show.result["learned"] == [0, 0] and "0 of 16 right before, 0 after" in result and "lora/concept" in again
    assert len(list(tmp_path.glob("learn-*.png"))) == 9 and len(cards) == 5
    show.result["seconds"] = {"learn": show.seconds}
    parts = dict.fromkeys(("generate", "edit", "ask", "reconstruct", "outside", "learn"), section(result, cards, again))
    assert "stands in no training picture" in show.page(parts, "") and "(it is not)" in show.page(parts, "")
    assert cli.main(["demo", "--learn", "--model", "nowhere", "--output", str(tmp_path / "demo")]) == 2
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["demo", "--learn", "--output", str(tmp_path / "demo")]) == 2, "before anything is drawn"
    assert "need the package peft" in (said := capsys.readouterr().err)
    assert "right of" not in said and not (tmp_path / "demo").exists()


def test_the_demo_judges_what_it_should_have_drawn():
    found, show = demo.examples(), demo._Show(UniLIP.from_pretrained(), Path(), 0, "", None)
    for edit in found["edits"]:
        source, target = (load_image(demo.FOLDER / edit[key]) for key in ("source", "target"))
        assert show.edited(target, edit)[0] and not show.edited(source, edit)[0]
    for asked in found["asked"]:
        picture = render(Scene.from_dict(asked["scene"]), demo.judge().atlas, demo.judge().world)
        assert show.drawn(picture, **asked)[0]
        assert not show.drawn(load_image(demo.FOLDER / found["pictures"][1]["file"]), **asked)[0]


# --- the words themselves -------------------------------------------------------------------------------------------


def test_help_has_an_example_that_parses(capsys):
    assert failures(partial(check_help, capsys=capsys), cli.VERBS) == []


def check_help(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    examples = cli.VERBS[name].example
    assert all(line in text for line in examples)
    for line in examples:
        words = shlex.split(line)
        assert words[0] == "unilip" and cli.parse(words[1:])[0] == name


def test_every_option_that_a_verb_reads_is_there():
    actions = [action for name in cli.VERBS for action in cli.make_parser(name, cli.VERBS[name])._actions]
    sources = Path(cli.__file__).parent.glob("*.py")
    read = {found for file in sources for found in re.findall(r"\bo\.(\w+)", file.read_text(encoding="utf-8"))}
    assert len(read) > 50 and read <= {"report"} | {action.dest for action in actions}


def test_every_option_is_used_by_some_verb():
    assert set(TABLE["options"]) == {option for verb in cli.VERBS.values() for option in verb.options}


def test_the_nearest_verb_is_named_in_groups_too():
    for words, near in {"data chek x": "data check", "dta": "data", "eval recn x": "eval recon"}.items():
        with pytest.raises(UniLIPError, match=f"Did you mean {near}\\?"):
            cli.parse(words.split())


def test_a_missing_package_is_told_with_an_install_that_works():
    missing = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
    assert "pip install '.[serve]' in a checkout" in cli.explain(missing)[0]
    assert "pip install '.[ray]'" in cli.explain(ModuleNotFoundError(name="ray.serve"))[0]


def test_top_level_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.VERBS)
    assert cli.main([]) == 0 and cli.main(["data", "--help"]) == 0
    assert "data prepare emoji" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("unilip ")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Three  yellow STARS!", "three-yellow-stars"),
        ("../../etc", "etc"),
        ("?!", "picture"),
        ("猫", "猫"),
        ("x" * 99, "x" * 48),
    ],
)
def test_slug(text, name):
    assert slug(text) == name


# --- as a program ---------------------------------------------------------------------------------------------------


def program(*words, cwd):
    source = str(Path(cli.__file__).parents[2])
    command = [sys.executable, "-m", "unilip", *words]
    environment = os.environ | {"PYTHONPATH": source}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


def test_generate_as_a_program(tiny_folder, tmp_path):
    done = program("generate", "a star", "--model", str(tiny_folder), "--steps", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["path"] == "a-star-0.png" and done.stderr == ""
    assert os.listdir(tmp_path) == ["a-star-0.png"]


def test_closed_streams_are_empty_ones(tiny_folder, tmp_path):
    words = shlex.join(["-m", "unilip", "generate", "--model", str(tiny_folder), *QUICK])
    for more, code, out in (
        ("a star 2>&-", 0, "a-star-0.png\n"),
        ("--prompts - <&-", 2, ""),
        ("a star >&- 2>&-", 0, ""),
    ):
        command = f"{sys.executable} {words} {more}"
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, out), done.stderr


def test_a_locale_that_lacks_letters_ends_no_work(tiny_folder, tmp_path):
    words = [sys.executable, "-m", "unilip", "generate", "--model", str(tiny_folder), *QUICK, "--prompts", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for more, count in ((["--json"], 1), ([], 2)):
        done = subprocess.run(
            words + more, cwd=tmp_path, env=environment, capture_output=True, input="über 猫".encode()
        )
        assert done.returncode == 0 and len(os.listdir(tmp_path)) == count, done.stderr
        if more:
            assert json.loads(done.stdout)["images"][0]["prompt"] == "über 猫"


def test_a_wrong_verb_as_a_program(tmp_path):
    done = program("generat", "a star", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"unilip: error: There is no verb 'generat'. Did you mean generate? All of them: {', '.join(cli.VERBS)}."
    ]
