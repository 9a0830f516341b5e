"""What people get wrong: exit code 2, one line that names the remedy, no traceback, no file made or changed."""

import contextlib
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from unilip import cli

GENERATE = ["generate", "a star", "--model", "{model}"]


@pytest.fixture(scope="session")
def broken(tiny_folder, fresh_tokenizer, tmp_path_factory):
    """Folders and files that are each wrong in one way, by name."""
    root = tmp_path_factory.mktemp("broken")

    def copy(name, drop=()):
        shutil.copytree(tiny_folder, root / name, ignore=shutil.ignore_patterns(*drop))
        return root / name

    def change(folder, **fields):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    copy("no-weights", drop=["*.safetensors"])
    change(copy("mismatched"), num_queries=9)
    change(copy("unknown-field"), colour="blue")
    change(copy("ill-typed"), num_queries="eight")
    (copy("no-json") / "config.json").write_text("{")
    copy("no-tokenizer", drop=["tokenizer*", "special_tokens*", "chat_template*"])
    plain = copy("plain-tokenizer", drop=["tokenizer*", "special_tokens*", "chat_template*", "added_tokens*"])
    fresh_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")).save_pretrained(str(plain))
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text('{"model_type": "bert"}')
    (root / "weights.txt").write_text("no weights")

    Image.new("RGB", (64, 48), "teal").save(root / "good.png")
    (root / "text.png").write_text("not a picture")
    whole = (root / "good.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "nothing.png").write_bytes(b"")
    Image.new("1", (50_000, 2)).save(root / "long.png")
    (root / "huge.png").write_bytes(hollow_png(50_000, 50_000))

    (root / "blank.txt").write_text("\n\n")
    (root / "latin.txt").write_bytes("grün".encode("latin-1"))
    (root / "bad.jsonl").write_text('{"prompt": "a star"}\n{"prompt": \n')
    (root / "key.jsonl").write_text('{"prompt": "a star", "sed": 3}\n')
    (root / "nested.jsonl").write_text('{"text": "a star"}\n')
    return root


def hollow_png(width, height):
    """A PNG that says how large it is and holds no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


CASES = {
    # checkpoints
    "a missing checkpoint": (["generate", "a star", "--model", "nowhere"], "There is no checkpoint at"),
    "a truncated checkpoint": (["generate", "a star", "--model", "{broken}/truncated"], "truncated or damaged"),
    "a folder without weights": (["generate", "a star", "--model", "{broken}/no-weights"], "no weights"),
    "an empty folder": (["generate", "a star", "--model", "{broken}/empty"], "no config.json"),
    "a model of another kind": (["generate", "a star", "--model", "{broken}/other"], "'bert'"),
    "a file of another kind": (["info", "{broken}/weights.txt"], "no weights file"),
    "shapes that do not fit": (["ask", "{broken}/good.png", "Why?", "--model", "{broken}/mismatched"], "queries"),
    "an unknown field": (["info", "{broken}/unknown-field"], "colour"),
    "an ill-typed field": (["info", "{broken}/ill-typed"], "num_queries"),
    "a broken config": (["info", "{broken}/no-json"], "cannot be read as JSON"),
    "no tokenizer": (["generate", "a star", "--model", "{broken}/no-tokenizer"], "no tokenizer"),
    "a tokenizer without image tokens": (["generate", "x", "--model", "{broken}/plain-tokenizer"], "<IMG_CONTEXT>"),
    "a conversion of nothing": (["convert", "nowhere", "new"], "There is no checkpoint at"),
    "a conversion to nowhere": (["convert", "{model}", "{broken}/good.png"], "give a folder"),
    "an unknown shard size": (["convert", "{model}", "new", "--max-shard-size", "big"], "max_shard_size"),
    "an unknown format": (["convert", "{model}", "new", "--to", "onnx"], "--to"),
    "no recorded numbers": (["verify", "{model}", "nowhere.safetensors"], "There is no file nowhere.safetensors"),
    "recorded numbers that are none": (["verify", "{model}", "{broken}/weights.txt"], "no safetensors file"),
    # pictures
    "a missing image": (["edit", "nowhere.png", "make it red", "--model", "{model}"], "There is no image file"),
    "a folder of images": (["edit", ".", "make it red", "--model", "{model}"], "(Is a directory); give one"),
    "an unreadable image": (["reconstruct", "{broken}/text.png", "--model", "{model}"], "not an image"),
    "a truncated image": (["reconstruct", "{broken}/cut.png", "--model", "{model}"], "truncated"),
    "an empty image": (["ask", "{broken}/nothing.png", "What?", "--model", "{model}"], "not an image"),
    "a 50,000 px image": (["edit", "{broken}/long.png", "make it red", "--model", "{model}"], "50000x2"),
    "a huge image": (["reconstruct", "{broken}/huge.png", "--model", "{model}"], "too large"),
    "one bad image of two": (["reconstruct", "{broken}/good.png", "{broken}/cut.png"], "truncated"),
    "no image": (["edit", "make it red", "--model", "{model}"], "There is no image"),
    "no image to reconstruct": (["reconstruct", "--model", "{model}"], "IMAGE [IMAGE ...]` is how it works"),
    "a home of nobody": (["info", "~nobody-is-so/model"], "There is no checkpoint at ~nobody-is-so/model"),
    "images and no instruction": (["edit", "{broken}/good.png", "{broken}/good.png"], "There is no instruction"),
    "an image and no question": (["ask", "{broken}/good.png", "--model", "{model}"], "There is no question"),
    "a question about a missing image": (["ask", "nope.png", "--model", "{model}"], "There is no file nope.png"),
    "a second image that is missing": (["ask", "{broken}/good.png", "No.JPG"], "There is no file No.JPG"),
    "an edit without words": (["edit", "{broken}/good.png", "a/b.webp"], "There is no file a/b.webp"),
    # words
    "an empty prompt": (["generate", "  ", "--model", "{model}"], "The prompt is empty"),
    "no prompt": (["generate", "--model", "{model}"], "There is no prompt"),
    "a prompt of 10,000 words": (["generate", "word " * 10_000, "--model", "{model}"], "49999 characters"),
    "a prompt of too many tokens": (["generate", "q" * 2000, "--model", "{model}"], "tokens"),
    "a reserved negative prompt": ([*GENERATE, "--negative-prompt", "<IMG_CONTEXT>"], "negative prompt contains"),
    "an empty question": (["ask", "{broken}/good.png", "", "--model", "{model}"], "The question is empty"),
    "a question of 10,000 words": (["ask", "{broken}/good.png", "word " * 10_000], "49999 characters"),
    "a prompt and a file of them": ([*GENERATE, "--prompts", "{broken}/blank.txt"], "not both"),
    "a missing file of prompts": (["generate", "--prompts", "nowhere.txt"], "nowhere.txt"),
    "a file without prompts": (["generate", "--prompts", "{broken}/blank.txt"], "holds no prompt"),
    "a file in another encoding": (["generate", "--prompts", "{broken}/latin.txt"], "UTF-8"),
    "broken JSON lines": (["generate", "--prompts", "{broken}/bad.jsonl"], "line 2"),
    "a misspelt key": (["generate", "--prompts", "{broken}/key.jsonl"], "sed"),
    "JSON without a prompt": (["generate", "--prompts", "{broken}/nested.jsonl"], 'no "prompt"'),
    # where to write
    "a missing output folder": ([*GENERATE, "--output", "no/such/star.png"], "There is no folder"),
    "a missing parent of an output folder": ([*GENERATE, "--output", "no/such/"], "There is no folder"),
    "an unknown ending": ([*GENERATE, "--output", "star.tiff"], ".png"),
    "one file for two pictures": ([*GENERATE, "--num-images", "2", "--output", "star.png"], "give a folder"),
    "a file as output folder": ([*GENERATE, "--output", "{broken}/weights.txt/"], "is a file"),
    "an output that is there": (["reconstruct", "{broken}/good.png", "--output", "{broken}/good.png"], "--force"),
    "a demo in a missing folder": (["demo", "--output", "no/such/demo"], "There is no folder"),
    "a demo over a file": (["demo", "--output", "{broken}/good.png"], "is a file"),
    # numbers and choices
    "negative steps": ([*GENERATE, "--steps", "-3"], "between 1 and 1000"),
    "no steps": ([*GENERATE, "--steps", "0"], "between 1 and 1000"),
    "half a step": ([*GENERATE, "--steps", "2.5"], "not a whole number"),
    "NaN guidance": ([*GENERATE, "--guidance-scale", "nan"], "--guidance-scale"),
    "infinite guidance": ([*GENERATE, "--guidance-scale", "inf"], "--guidance-scale"),
    "negative guidance": ([*GENERATE, "--guidance-scale", "-1"], "at least 0"),
    "a negative seed": ([*GENERATE, "--seed", "-1"], "at least 0"),
    "no images": ([*GENERATE, "--num-images", "0"], "--num-images"),
    "a size that is none": ([*GENERATE, "--size", "56by56"], "write 448x336"),
    "no size": ([*GENERATE, "--size", "0"], "between 28 and 8960"),
    "a small side": ([*GENERATE, "--size", "56x27"], "height is 27"),
    "a huge size": ([*GENERATE, "--size", "8960x8960"], "at most 20070400 are drawn"),
    "an unknown solver": ([*GENERATE, "--solver", "heun"], "dpm++"),
    "an unknown fit": (["reconstruct", "{broken}/good.png", "--fit", "squeeze"], "crop"),
    "an unknown dtype": ([*GENERATE, "--dtype", "int4"], "bfloat16"),
    "an unknown device": ([*GENERATE, "--device", "tpu"], "allowed: auto, cpu"),
    "a device that is not there": ([*GENERATE, "--device", "cuda:99"], "device cuda:99"),
    "a top-p of zero": (["ask", "Why?", "--top-p", "0"], "above 0"),
    "a negative temperature": (["ask", "Why?", "--temperature", "-1"], "at least 0"),
    # verbs, options, recipes
    "an unknown verb": (["draw", "a star"], "All of them: generate"),
    "half a verb": (["data"], "data prepare emoji"),
    "an unknown option": ([*GENERATE, "--step", "3"], "Did you mean --steps?"),
    "half an option": ([*GENERATE, "--out=x.png"], "Did you mean --output?"),
    "an option like no other": ([*GENERATE, "--zzz"], "--zzz. See `unilip generate --help`"),
    "an option of another verb": (["info", "--steps", "3"], "--steps"),
    "too many words": (["convert", "a", "b", "c"], "3 were given: a b c"),
    "two settings after one --set": (["train", "r", "--set", "a=1", "b=2"], "of its own: --set b=2"),
    "an unknown recipe": (["train", "pico/refine"], "There is no recipe"),
    "no recipe": (["train"], "--list"),
    "an unknown setting": (["train", "tiny/recon", "--set", "optim.rate=1"], "optim"),
    "a setting without a value": (["train", "tiny/recon", "--set", "steps"], "NAME=VALUE"),
    "an ill-typed setting": (["train", "tiny/recon", "--set", "steps=many"], "steps"),
    "a setting out of range": (["train", "tiny/recon", "--set", "steps=0"], "at least 1"),
    "a stage without its predecessor": (["train", "tiny/recon", "--no-progress"], "tiny/instruct"),
    "art from nowhere": (["data", "prepare", "emoji", "--source", "nowhere"], "There is no folder nowhere"),
    "art from an empty folder": (["data", "prepare", "emoji", "--source", "{broken}/empty"], "expected"),
    "an unknown part of the evaluation": (["eval", "emoji", "--parts", "gen,song"], "'song'"),
    "an unknown world": (["eval", "emoji", "--world", "mega"], "no world 'mega'"),
    "results in a missing folder": (["eval", "emoji", "--output", "no/such"], "There is no folder"),
}  # fmt: skip


def tree(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tiny_folder, broken, tmp_path, monkeypatch, capsys):
    words, expected = CASES[case]
    words = [word.replace("{model}", str(tiny_folder)).replace("{broken}", str(broken)) for word in words]
    monkeypatch.chdir(tmp_path)
    before = tree(broken), tree(tiny_folder)
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("unilip: error: "), err
    assert expected in err, err
    assert "Traceback" not in err and len(err) < 1200
    assert not list(tmp_path.iterdir()), "something was left behind"
    assert (tree(broken), tree(tiny_folder)) == before


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is no checkpoint"):
        cli.main(["info", "nowhere", "--debug"])


def test_bad_arguments_are_seen_before_the_model_is_loaded(broken, tmp_path, monkeypatch, capsys):
    from unilip.model import UniLIP

    def never(*words, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(UniLIP, "from_pretrained", never)
    monkeypatch.chdir(tmp_path)
    late = ("checkpoint", "tokens", "tokenizer", "weights", "shapes", "folder", "kind")
    for case, (words, _) in CASES.items():
        if words[0] in ("generate", "edit", "ask", "reconstruct") and not any(word in case for word in late):
            assert cli.main([word.replace("{broken}", str(broken)) for word in words]) == 2, case
    assert "the model was loaded" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--batch-size"),
        (MemoryError(), "--batch-size"),
        (KeyError("x"), "--debug"),
        (OSError(28, "No space left on device", "star.png"), "No space left on device: star.png"),
        (ModuleNotFoundError("No module named 'resvg_py'", name="resvg_py"), "pip install resvg_py"),
    ],
)
def test_other_failures_are_one_line_and_exit_1(error, expected, tiny_folder, tmp_path, monkeypatch, capsys):
    from unilip.model import UniLIP

    def fail(*words, **options):
        raise error

    monkeypatch.setattr(UniLIP, "generate", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a star", "--model", str(tiny_folder), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_ctrl_c_is_quiet(tiny_folder, tmp_path, monkeypatch, capsys):
    from unilip.model import UniLIP

    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(UniLIP, "generate", interrupted)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a star", "--model", str(tiny_folder), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "unilip: interrupted\n" and not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_nothing(tiny_folder, tmp_path, monkeypatch, capsys):
    def fail(self, file, *words, **options):
        with contextlib.suppress(OSError):
            Path(file).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a star", "--model", str(tiny_folder), "--steps", "1", "--device", "cpu"]) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_closed_pipe_is_quiet(tmp_path):
    source = str(Path(cli.__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); from unilip.cli import main; sys.exit(main(['train', '--list']))"
    )
    command = f"{sys.executable} -c {json.dumps(code)} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stderr == ""
