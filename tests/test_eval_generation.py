"""Prompt files and pictures of benchmarks: formats, what the official scorers read, going on after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from eval_support import GENEVAL, GENEVAL2, paint, wise_rows, write_prompts
from unilip.errors import UniLIPError
from unilip.eval import benchmarks, generation, runs
from unilip.eval.benchmarks import open_benchmark
from unilip.eval.generation import Settings, generate, picture_seeds
from unilip.eval.runs import RunFolder
from unilip.eval.scores import column
from unilip.machine import Place

NAMES = ("geneval", "geneval2", "dpg", "wise", "imgedit", "gedit")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "files")


@pytest.fixture
def draw(tiny_folder, tiny_model):
    """Draw a benchmark with the tiny model, which is loaded once for all tests."""

    def call(benchmark, output, **changes):
        settings = Settings.resolve(tiny_folder, steps=1, **changes.pop("settings", {}))
        given = {"batch_size": 4, "load": lambda: tiny_model, "place": Place(), **changes}
        return generate(benchmark, output, tiny_folder, settings, **given)

    return call


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a run that scorers or people read, as bytes."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files if file.name != "run.json"}


# --- what the official scorers read, written from their sources -----------------------------------------------------


def read_geneval(images: Path) -> list[tuple[str, str, dict]]:
    found = []
    for name in os.listdir(images):
        if not (images / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((images / name / "metadata.jsonl").read_text())
        for sample in os.listdir(images / name / "samples"):
            if re.match(r"\d+\.png", sample):
                found.append((name, sample, metadata))
    return sorted(found, key=lambda entry: entry[:2])


def test_geneval_is_laid_out_as_its_scorer_reads(prompts, draw, tmp_path):
    draw(open_benchmark("geneval", **prompts["geneval"]), tmp_path / "run")
    found = read_geneval(tmp_path / "run/images")
    assert [entry[:2] for entry in found] == [
        (f"{n:05d}", f"{sample:04d}.png") for n in range(3) for sample in range(4)
    ]
    assert [entry[2] for entry in found[::4]] == GENEVAL
    assert len({(tmp_path / "run/images" / a / "samples" / b).read_bytes() for a, b, _ in found}) == 12


def test_geneval2_names_a_picture_for_each_prompt(prompts, draw, tmp_path):
    draw(open_benchmark("geneval2", **prompts["geneval2"]), tmp_path / "run")
    places = json.loads((tmp_path / "run/images.json").read_text())
    assert list(places) == [row["prompt"] for row in GENEVAL2]
    for place in places.values():
        assert Image.open(tmp_path / "run" / place).size == (56, 56)


def test_dpg_tiles_four_pictures_named_after_the_prompt(prompts, draw, tiny_model, tmp_path):
    benchmark = open_benchmark("dpg", **prompts["dpg"])
    draw(benchmark, tmp_path / "run")
    images = tmp_path / "run/images"
    assert sorted(file.split(".")[0] for file in os.listdir(images)) == ["0", "whoops7"]
    page = Image.open(images / "whoops7.png")
    assert page.size == (112, 112)
    crops = [page.crop((x, y, x + 56, y + 56)).tobytes() for y in (0, 56) for x in (0, 56)]
    assert len(set(crops)) == 4
    import torch

    item = next(item for item in benchmark.items if item.key == "whoops7")
    seeds = [torch.Generator().manual_seed(seed) for seed in picture_seeds(0, item)]
    drawn = tiny_model.generate([item.prompt] * 4, generator=seeds, num_inference_steps=1, progress=False).images
    assert [picture.tobytes() for picture in drawn] == crops


def test_wise_pictures_are_named_by_number(prompts, draw, tmp_path):
    draw(open_benchmark("wise", **prompts["wise"]), tmp_path / "run")
    numbers = [row["prompt_id"] for row in wise_rows("verified")]
    assert all((tmp_path / "run/images" / f"{number}.png").is_file() for number in numbers)
    assert len(os.listdir(tmp_path / "run/images")) == len(numbers)


def test_edits_depend_on_their_source_and_are_named_by_key(prompts, draw, tmp_path):
    draw(open_benchmark("imgedit", **prompts["imgedit"]), tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run/images")) == ["1082.png", "97.png"]


def test_gedit_lies_by_task_and_language_with_its_source(prompts, draw, tmp_path):
    draw(open_benchmark("gedit", **prompts["gedit"]), tmp_path / "run")
    root = tmp_path / "run/images/fullset"
    for task, language, key in (
        ("subject-add", "en", "key0"),
        ("subject-add", "cn", "key1"),
        ("text_change", "en", "key2"),
    ):
        assert Image.open(root / task / language / f"{key}_SRCIMG.png").size == (48, 36)
        assert Image.open(root / task / language / f"{key}.png").size == (56, 56)


# --- seeds, batches, processes --------------------------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_place_in_the_file(prompts, draw, tmp_path):
    rows = json.loads((prompts["wise"]["prompts"] / "all.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(rows[4:5]))
    draw(open_benchmark("wise", **prompts["wise"]), tmp_path / "all", batch_size=1)
    draw(open_benchmark("wise", tmp_path / "few.json", own_prompts=True), tmp_path / "few", batch_size=1)
    name = f"images/{rows[4]['prompt_id']}.png"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "few" / name).read_bytes()


def test_two_processes_make_the_files_of_one(prompts, draw, tmp_path):
    benchmark = open_benchmark("geneval", **prompts["geneval"])
    draw(benchmark, tmp_path / "one")
    first = draw(benchmark, tmp_path / "two", place=Place(0, 2))
    second = draw(benchmark, tmp_path / "two", place=Place(1, 2))
    assert 0 < first["made"] < 12 and first["made"] + second["made"] == 12 and second["missing"] == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_another_seed_makes_other_pictures(prompts, draw, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark, tmp_path / "a")
    draw(benchmark, tmp_path / "b", settings={"seed": 1})
    assert (tmp_path / "a/images/0000.png").read_bytes() != (tmp_path / "b/images/0000.png").read_bytes()


def test_a_rerun_makes_only_what_is_missing(prompts, draw, tmp_path):
    benchmark = open_benchmark("wise", **prompts["wise"])
    whole = draw(benchmark, tmp_path / "run")
    before = tree(tmp_path / "run")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "run/images").iterdir()}
    gone = tmp_path / "run/images/401.png"
    gone.unlink()
    again = draw(benchmark, tmp_path / "run")
    assert (whole["made"], again["made"], again["there"]) == (12, 1, 11)
    assert {name: data[:0] for name, data in tree(tmp_path / "run").items()} == {name: b"" for name in before}
    assert all(file.stat().st_mtime_ns == told for file, told in times.items() if file != gone)


def test_nothing_is_loaded_where_nothing_is_missing(prompts, draw, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark, tmp_path / "run")

    def never():
        raise AssertionError("the model was loaded")

    assert draw(benchmark, tmp_path / "run", load=never)["made"] == 0


def test_count_can_grow(prompts, draw, tmp_path):
    benchmark = open_benchmark("wise", **prompts["wise"])
    assert draw(benchmark.first(3), tmp_path / "run")["made"] == 3
    assert draw(benchmark, tmp_path / "run")["made"] == 9


def test_a_kill_between_two_files_leaves_no_picture_without_what_belongs_to_it(prompts, draw, tmp_path, monkeypatch):
    benchmark, write = open_benchmark("gedit", **prompts["gedit"]), generation.write_bytes
    draw(benchmark, tmp_path / "whole", batch_size=1)
    written = []

    def killed(path, data):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(generation, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(benchmark, tmp_path / "run", batch_size=3)
    names = {path.name for path in (tmp_path / "run/images").rglob("*.png")}
    assert names == {"key0.png", "key0_SRCIMG.png", "key1_SRCIMG.png"}
    monkeypatch.setattr(generation, "write_bytes", write)
    assert draw(benchmark, tmp_path / "run", batch_size=1)["made"] == 2
    assert tree(tmp_path / "run").keys() == tree(tmp_path / "whole").keys()


SLOW_RUN = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from unilip.eval import generation
from unilip.eval.benchmarks import open_benchmark
from unilip.machine import Place
folder, prompts, output = map(Path, sys.argv[1:])
draw = generation._draw
def slowly(*arguments):
    files = draw(*arguments)
    time.sleep(0.3)
    return files
generation._draw = slowly
benchmark = open_benchmark("wise", prompts, own_prompts=True)
settings = generation.Settings.resolve(folder, steps=1)
generation.generate(benchmark, output, folder, settings, batch_size=2, place=Place())
"""


@pytest.mark.slow
def test_kill_in_the_middle_loses_nothing_and_repeats_nothing(prompts, draw, tiny_folder, tmp_path):
    words = [str(tiny_folder), str(prompts["wise"]["prompts"]), str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, *words])
    images = tmp_path / "killed/images"
    deadline = time.monotonic() + 300
    while len(list(images.glob("*.png"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "it was over before the kill"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in images.glob("*.png")}
    assert 4 <= len(kept) < 12
    benchmark = open_benchmark("wise", **prompts["wise"])
    again = draw(benchmark, tmp_path / "killed", batch_size=2)
    assert again["missing"] == 0 and again["made"] <= 12 - len(kept)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    draw(benchmark, tmp_path / "whole", batch_size=2)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_missing_prompts_are_named_with_where_to_get_them(name, tmp_path):
    with pytest.raises(UniLIPError, match=r"github\.com|dataset stepfun"):
        open_benchmark(name, tmp_path / "nothing")
    with pytest.raises(UniLIPError, match="--prompts"):
        open_benchmark(name, None)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_prompts_of_another_hash_are_refused_unless_asked_for(name, prompts):
    given = dict(prompts[name])
    assert open_benchmark(name, **given).prompts["published"] is False
    del given["own_prompts"]
    with pytest.raises(UniLIPError, match="--own-prompts"):
        open_benchmark(name, **given)


def test_the_published_hash_is_accepted(prompts, monkeypatch):
    given = {"prompts": prompts["geneval"]["prompts"]}
    digest = runs.file_hash(given["prompts"])
    monkeypatch.setitem(benchmarks.PUBLISHED, digest, ("geneval", "", "test"))
    assert open_benchmark("geneval", **given).prompts["published"] is True
    monkeypatch.setitem(benchmarks.PUBLISHED, digest, ("geneval2", "", "test"))
    with pytest.raises(UniLIPError, match="geneval2"):
        open_benchmark("geneval", **given)


@pytest.mark.parametrize(("files", "protocol"), [("verified", "legacy"), ("legacy", "verified")])
def test_prompts_of_the_other_protocol_are_refused(files, protocol, prompts):
    folder = prompts["wise"]["prompts"].parent / files
    with pytest.raises(UniLIPError, match=f"--protocol {files}"):
        open_benchmark("wise", folder, protocol=protocol, own_prompts=True)
    assert len(open_benchmark("wise", folder, protocol=files, own_prompts=True).items) == 12


def test_another_model_in_the_same_folder_is_refused_and_nothing_is_lost(prompts, draw, fresh_model, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark, tmp_path / "run")
    before = tree(tmp_path / "run")
    fresh_model(seed=1).save_pretrained(tmp_path / "other")
    settings = Settings.resolve(tmp_path / "other", steps=1)
    with pytest.raises(UniLIPError, match="another run: model"):
        generate(benchmark, tmp_path / "run", tmp_path / "other", settings, place=Place())
    with pytest.raises(UniLIPError, match=r"another run: settings: seed \(0 there, 5 here\)\."):
        draw(benchmark, tmp_path / "run", settings={"seed": 5})
    assert tree(tmp_path / "run") == before


def test_other_sources_under_the_same_names_are_refused(prompts, draw, tmp_path):
    given = {"prompts": prompts["imgedit"]["prompts"], "own_prompts": True}
    before = open_benchmark("imgedit", sources=prompts["imgedit"]["sources"], **given)
    draw(before.first(1), tmp_path / "run")
    for n, name in enumerate(("animal/1.jpg", "for_add/2.jpg")):
        paint(tmp_path / "other" / name, n + 5)
    other = open_benchmark("imgedit", sources=tmp_path / "other", **given)
    with pytest.raises(UniLIPError, match="another run: prompts"):
        draw(other, tmp_path / "run")
    about = {"task": "imgedit", "protocol": "p", "scorer": "s"}
    assert column({**about, "prompts": before.prompts}) != column({**about, "prompts": other.prompts}), "other tables"
    assert draw(before, tmp_path / "run")["made"] == 1


def test_a_picture_of_another_run_is_not_taken_for_this_ones(prompts, draw, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark, tmp_path / "run")
    draw(benchmark, tmp_path / "seed 1", settings={"seed": 1})
    (tmp_path / "run/images/0000.png").write_bytes((tmp_path / "seed 1/images/0000.png").read_bytes())
    with pytest.raises(UniLIPError, match=r"0000\.png is of another seed"):
        draw(benchmark, tmp_path / "run")


def test_the_same_model_under_another_path_goes_on(prompts, draw, tiny_model, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark.first(1), tmp_path / "run")
    tiny_model.save_pretrained(tmp_path / "copy")
    settings = Settings.resolve(tmp_path / "copy", steps=1)
    found = generate(benchmark, tmp_path / "run", tmp_path / "copy", settings, place=Place(), load=lambda: tiny_model)
    assert (found["made"], found["there"]) == (1, 1)


def test_pictures_of_the_wrong_size_are_refused(prompts, draw, tmp_path):
    benchmark = open_benchmark("geneval2", **prompts["geneval2"])
    draw(benchmark, tmp_path / "run")
    paint(tmp_path / "run/images/0001.png", 0, (64, 64))
    with pytest.raises(UniLIPError, match=r"0001.png is 64x64 px, but this run makes 56x56"):
        draw(benchmark, tmp_path / "run")
    (tmp_path / "run/images/0001.png").write_bytes(b"half a picture")
    with pytest.raises(UniLIPError, match="no whole picture"):
        draw(benchmark, tmp_path / "run")


def test_pictures_of_unknown_origin_are_refused(prompts, draw, tmp_path):
    paint(tmp_path / "run/images/0000.png", 0, (56, 56))
    with pytest.raises(UniLIPError, match=r"no run\.json"):
        draw(open_benchmark("geneval2", **prompts["geneval2"]), tmp_path / "run")


def test_two_runs_at_once_in_a_folder_are_refused(tmp_path):
    with RunFolder(tmp_path / "run", {"a": 1}, Place()):
        with pytest.raises(UniLIPError, match="torchrun"):
            RunFolder(tmp_path / "run", {"a": 1}, Place())
        RunFolder(tmp_path / "run", {"a": 1}, Place(1, 2)).close()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("geneval", "not json", "line 1 is not JSON"),
        ("geneval", '{"prompt": "a", "tag": "colours", "include": []}', "tag"),
        ("geneval", '{"prompt": "", "tag": "colors", "include": []}', "'prompt'"),
        ("geneval", "\n", "holds no prompt"),
        ("geneval2", '{"prompt": "a", "vqa_list": [["Is it?", "Yes"]], "skills": []}', "skills"),
        ("wise", '[{"prompt_id": 1001}]', "1001"),
        ("wise", '{"a": 1}', "not a list"),
        ("imgedit", "[]", "not an object"),
        ("imgedit", '{"../x": {"id": "a.jpg", "prompt": "p", "edit_type": "add"}}', "leads out of"),
        *(
            ("imgedit", json.dumps({key: {"id": "a.jpg", "prompt": "p", "edit_type": "add"}}), "the name")
            for key in ("a" * 300, "\ud800", "a\0b")
        ),
    ],
)
def test_damaged_prompt_files_say_what_is_wrong(name, text, message, tmp_path):
    file = tmp_path / ("p.json" if name in ("wise", "imgedit") else "p.jsonl")
    file.write_text(text)
    paint(tmp_path / "a.jpg", 0)
    sources = {"sources": tmp_path} if name == "imgedit" else {}
    with pytest.raises(UniLIPError, match=message):
        open_benchmark(name, file, own_prompts=True, **sources)


def test_names_that_are_no_unicode_are_drawn(draw, tmp_path):
    try:
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / os.fsdecode(b"\xff.txt")).write_text("a cat")
    except (OSError, UnicodeError):
        pytest.skip("the file system has Unicode names alone")
    draw(open_benchmark("dpg", tmp_path / "p", own_prompts=True), tmp_path / "run")
    assert os.listdir(os.fsencode(tmp_path / "run" / "images")) == [b"\xff.png"]


def test_edits_without_their_pictures_are_refused(prompts, tmp_path):
    with pytest.raises(UniLIPError, match="--sources"):
        open_benchmark("imgedit", prompts["imgedit"]["prompts"], own_prompts=True)
    with pytest.raises(UniLIPError, match=r"2 of 2 pictures .* animal/1\.jpg"):
        open_benchmark("imgedit", prompts["imgedit"]["prompts"], sources=tmp_path, own_prompts=True)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "0")])
def test_impossible_ranks_are_refused(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UniLIPError, match="torchrun"):
        Place.of_environment()
