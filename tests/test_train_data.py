"""Batches from files: order and resuming, processes and lanes, mixtures, limits, and samples that cannot be read."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from support import ShardWriter
from unilip.data.order import Order
from unilip.errors import ConfigError, DataError
from unilip.method.text import Processor
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train import processes
from unilip.train.batches import NOT_LEARNED, iterate
from unilip.train.build import make_batches


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(name, place, model, *settings):
    recipe = override(get_recipe(name), ["data.source=files", f"data.path={place}", *settings])
    return make_batches(recipe, model.config, model.processor)


def same(a, b) -> bool:
    """Whether two batches are equal, tensor for tensor."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def prompts(batches, index):
    return said(batches, batches[index])


def said(batches, batch):
    """What the prompts of a batch ask for."""
    texts = batches.processor.decode(batch["prompts"].input_ids)
    return [text.split("image: ", 1)[1].split("\n")[0] for text in texts]


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path, picture):
    """Shards of captions and edits: f(captions, edits, each, name) -> folder."""

    def write(captions=0, edits=0, each=4, name="shards", word="caption"):
        writer = ShardWriter(tmp_path / name, "part", each)
        for i in range(captions):
            writer.write(f"c{i:03d}", {"png": encoded(picture(30, 30, i)), "txt": f"{word} {i}".encode()})
        for i in range(edits):
            pair = {
                f"{part}.png": encoded(picture(30, 30, 50 + 2 * i + j)) for j, part in enumerate(("input", "output"))
            }
            writer.write(f"e{i:03d}", {**pair, "txt": f"edit {i}".encode()})
        writer.close()
        return tmp_path / name

    return write


# --- order ------------------------------------------------------------------------------------------------------------

WHOLE = ("objective.drop_prompt=0", "data.edit_share=0")


def test_every_sample_comes_once_an_epoch_and_epochs_differ(shards, tiny_model):
    batches = opened("tiny/pretrain", shards(12), tiny_model, *WHOLE, "batch_size=4", "steps=9")
    epochs = [[text for i in range(3 * e, 3 * e + 3) for text in prompts(batches, i)] for e in range(3)]
    assert all(sorted(epoch) == sorted(f"caption {i}" for i in range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = opened("tiny/pretrain", shards(12), tiny_model, *WHOLE, "batch_size=4", "steps=9")
    assert prompts(again, 7) == epochs[2][4:8], "any batch can be begun with"
    other = opened("tiny/pretrain", shards(12), tiny_model, *WHOLE, "batch_size=4", "steps=9", "seed=5")
    assert prompts(other, 0) != epochs[0][:4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_a_shard(shards, tiny_model, workers):
    settings = ("steps=7", "batch_size=3", f"data.workers={workers}", "data.window=1", "data.edit_share=0.5")
    place = shards(13, 7, each=5)
    whole = list(iterate(opened("tiny/sft", place, tiny_model), 0))
    whole = list(iterate(opened("tiny/sft", place, tiny_model, *settings), 0))
    rest = list(iterate(opened("tiny/sft", place, tiny_model, *settings), 4))
    assert len(rest) == 3 and all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert {"sources" in batch for batch in whole} == {True, False} and "tried" not in whole[0]


def test_a_parent_that_reads_meanwhile_disturbs_no_worker(shards, tiny_model):
    """Sheets of pictures are drawn from the first batch, while workers that were forked read on."""
    settings = ("steps=12", "batch_size=4", "data.window=1", *WHOLE)
    place = shards(12, each=12)
    alone = list(iterate(opened("tiny/pretrain", place, tiny_model, *settings), 0))
    batches = opened("tiny/pretrain", place, tiny_model, *settings, "data.workers=2")
    first = batches[0]["targets"]  # the files are open now
    for wanted, batch in zip(alone, iterate(batches, 0), strict=True):
        assert same(wanted, batch) and torch.equal(batches[0]["targets"], first)


def test_processes_share_out_a_step(shards, tiny_model, monkeypatch):
    """The batches that four processes read are those that one reads."""
    recipe = override(
        get_recipe("tiny/pretrain"),
        ["data.source=files", f"data.path={shards(10)}", "batch_size=4", "accumulate=2", "steps=3", *WHOLE],
    )
    alone = make_batches(recipe, tiny_model.config, tiny_model.processor)
    wanted = [[text for i in (2 * s, 2 * s + 1) for text in prompts(alone, i)] for s in range(3)]
    monkeypatch.setenv("WORLD_SIZE", "4")
    own = processes.divided(recipe, 4)
    steps = [[] for _ in range(3)]
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        mine = make_batches(own, tiny_model.config, tiny_model.processor)
        found = list(iterate(mine, 0))
        assert len(found) == 3
        for step, batch in zip(steps, found, strict=True):
            step += said(mine, batch)
    assert [sorted(step) for step in steps] == [sorted(step) for step in wanted]


def test_lanes_keep_processes_to_their_own_shards(shards, tiny_model, monkeypatch):
    place = shards(24, each=3)
    recipe = override(
        get_recipe("tiny/pretrain"),
        ["data.source=files", f"data.path={place}", "batch_size=2", "accumulate=4", "data.lanes=4", "steps=6", *WHOLE],
    )
    alone = make_batches(recipe, tiny_model.config, tiny_model.processor)
    wanted = [sorted(t for i in range(4 * s, 4 * s + 4) for t in prompts(alone, i)) for s in range(6)]
    assert sorted(text for step in wanted[:3] for text in step) == sorted(f"caption {i}" for i in range(24))
    monkeypatch.setenv("WORLD_SIZE", "2")
    steps, read = [[] for _ in range(6)], []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        mine = make_batches(processes.divided(recipe, 2), tiny_model.config, tiny_model.processor)
        texts = [text for batch in iterate(mine, 0) for text in said(mine, batch)]
        read.append({int(text.split()[1]) // 3 for text in texts})
        for step in range(6):
            steps[step] += texts[4 * step : 4 * step + 4]
    assert not read[0] & read[1] and len(read[0]) == 4
    assert [sorted(step) for step in steps] == wanted
    with pytest.raises(ConfigError, match=r"data.lanes is 3; it must divide"):
        override(recipe, ["data.lanes=3"])
    with pytest.raises(DataError, match="8 shards with samples for 16 lanes"):
        opened("tiny/pretrain", place, tiny_model, "batch_size=16", "data.lanes=16")


def test_the_window_decides_how_far_samples_mix(shards, tiny_model):
    place = shards(16, each=4)

    def spans(window):
        batches = opened("tiny/pretrain", place, tiny_model, *WHOLE, "batch_size=4", "steps=4", f"data.window={window}")
        return [len({int(text.split()[1]) // 4 for text in prompts(batches, i)}) for i in range(4)]

    assert spans(1) == [1, 1, 1, 1] and max(spans(4)) > 1


def test_what_comes_next_is_announced(shards, tiny_model, monkeypatch):
    batches = opened("tiny/pretrain", shards(16), tiny_model, *WHOLE, "batch_size=2", "data.window=1")
    source, told = batches.sources[0][1], []
    monkeypatch.setattr(source, "expect", told.extend)
    order = Order([4] * 4, 0, f"{source.location} (pictures with captions)", 1)
    assert prompts(batches, 0) and set(told) == set(order.ahead(0))


# --- mixtures and tasks -----------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight(shards, tiny_model):
    a, b = shards(8, name="a", word="first"), shards(6, 4, name="b", word="second")
    batches = opened("tiny/pretrain", f"{a}:3,{b}:1", tiny_model, *WHOLE, "batch_size=8", "steps=50")
    drawn = [text for i in range(50) for text in prompts(batches, i)]
    share = sum(text.startswith("first") for text in drawn) / len(drawn)
    assert 0.7 < share < 0.8
    seconds = [text for text in drawn if text.startswith("second")]
    assert sorted(seconds[:6]) == sorted(f"second {i}" for i in range(6)), "each of them once, then again"
    only = opened("tiny/pretrain", f"{a}:0,{b}:1", tiny_model, *WHOLE, "batch_size=8")
    assert all(text.startswith("second") for text in prompts(only, 0)), "weight 0 is off"


def test_a_batch_has_one_task_in_the_share_of_the_recipe(shards, tiny_model):
    batches = opened(
        "tiny/sft", shards(5, 3), tiny_model, "data.edit_share=0.25", "batch_size=2", "accumulate=2", "steps=40"
    )
    tasks = ["sources" in batches[i] for i in range(80)]
    assert tasks[::2] == tasks[1::2], "all batches of a step have one task"
    assert 5 <= sum(tasks[::2]) <= 15
    steps = [batches.is_edit(step) for step in range(10_000)]
    assert sum(steps) == 2500


def test_edits_come_once_an_epoch_too(shards, tiny_model):
    """The steps between do not use numbers up."""
    batches = opened("tiny/sft", shards(5, 6), tiny_model, "objective.drop_prompt=0", "batch_size=3", "steps=60")
    edited = [said(batches, b) for b in (batches[i] for i in range(60)) if "sources" in b][:2]
    assert sorted(edited[0] + edited[1]) == sorted(f"edit {i}" for i in range(6))


def test_prompts_are_dropped(shards, tiny_model):
    batches = opened("tiny/sft", shards(5, 3), tiny_model, "objective.drop_prompt=1")
    for i in range(4):
        texts = batches.processor.decode(batches[i]["prompts"].input_ids)
        assert all(re.search("(Generate an|Edit the) image\\.", text) for text in texts)


# --- pictures and limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "colour"), [("auto", 255), ("crop", 255), ("resize", 0), ("pad", 255)])
def test_pictures_become_square_as_the_recipe_says(tmp_path, tiny_model, fit, colour):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255  # the middle square is white, the sides are black
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("wide")
    batches = opened("tiny/pretrain", tmp_path, tiny_model, f"data.fit={fit}", "batch_size=1")
    made = batches[0]["targets"][0]
    assert made.shape == (3, 56, 56) and int(made[0, 28, 2]) == (0 if fit == "pad" else colour)
    assert int(made[0, 2, 28]) == 255


def test_dcae_targets_are_read_at_the_autoencoder_s_size(shards, tiny_model):
    batches = opened("tiny/pretrain", shards(2), tiny_model, "objective.target=dcae")
    assert batches[0]["targets"].shape == (2, 3, 64, 64), "32 px, where the encoder has 28"


def test_texts_over_a_limit_are_left_out_and_counted_apart(tmp_path, picture, tiny_model, caplog):
    for i, text in enumerate(("short", "x" * 300, "word " * 80)):
        picture(seed=i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    settings = (*WHOLE, "batch_size=3", "steps=4", "data.max_skipped=0")
    batches = opened("tiny/pretrain", tmp_path, tiny_model, *settings, "data.max_characters=250")
    with caplog.at_level("INFO"):
        found = {text for batch in iterate(batches, 0) for text in said(batches, batch)}
    assert found == {"short"} and set(batches.tally.left_out) == {"caption over 250 characters"}
    count = batches.tally.left_out.total()
    assert 8 <= count <= 16 and batches.tally.tried == 12 + count, "twice in each of four epochs, and as a stand-in"
    assert not batches.tally.skipped
    assert f"of {12 + count} samples {count} were over a limit (caption over 250 characters: {count})" in caplog.text
    batches = opened("tiny/pretrain", tmp_path, tiny_model, *settings, "data.max_tokens=150", "data.max_characters=0")
    found = {text for batch in iterate(batches, 0) for text in said(batches, batch)}
    assert "short" in found and "caption over 150 tokens" in batches.tally.left_out


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, picture):
    """Six captioned pictures of odd sizes in two subfolders, and two edits."""
    for i in range(6):
        place = tmp_path / f"part{i % 2}"
        place.mkdir(exist_ok=True)
        picture(60 + i, 80, i).save(place / f"scene.{i}.png")
        (place / f"scene.{i}.txt").write_text(f"a picture of {i}\n", encoding="utf-8")
    for i in range(2):
        picture(64, 64, 10 + i).save(tmp_path / f"e{i}.input.png")
        picture(64, 64, 20 + i).save(tmp_path / f"e{i}.output.jpg")
        (tmp_path / f"e{i}.txt").write_text(f"make it {i}", encoding="utf-8")
    return tmp_path


HARM = {
    "picture unreadable": lambda png, txt: png.write_bytes(png.read_bytes()[:90]),
    "picture missing": lambda png, txt: png.unlink(),
    "caption missing": lambda png, txt: txt.unlink(),
    "caption not UTF-8": lambda png, txt: txt.write_bytes(b"\xff\xfe\x00"),
    "caption empty": lambda png, txt: txt.write_text(" \n"),
    "caption refused": lambda png, txt: txt.write_text("an <IMG_CONTEXT>"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("reason", HARM)
def test_a_sample_that_cannot_be_read_is_skipped_named_and_counted(folder, tiny_model, caplog, reason, workers):
    settings = (*WHOLE, "batch_size=6", "steps=2", f"data.workers={workers}")
    batches = opened("tiny/pretrain", folder, tiny_model, *settings)  # opened before the harm
    place = folder / "part0"
    HARM[reason](place / "scene.0.png", place / "scene.0.txt")
    with caplog.at_level("INFO"):
        found = list(iterate(batches, 0))
    assert [len(batch["targets"]) for batch in found] == [6, 6]
    texts = [text for batch in found for text in said(batches, batch)]
    assert "a picture of 0" not in texts
    skipped = batches.tally.skipped
    assert set(skipped) == {reason} and skipped.total() >= 2, "once an epoch, and where it was drawn instead"
    assert "part0/scene.0" in caplog.text and f"could not be read ({reason}: {skipped.total()})" in caplog.text
    if not workers:
        assert all(same(a, b) for a, b in zip(found, iterate(batches, 0), strict=True)), "the same stand in each time"


def test_over_a_share_of_skipped_samples_the_run_stops(folder, tiny_model):
    for i in (0, 2, 4):
        (folder / "part0" / f"scene.{i}.png").write_bytes(b"")
    settings = (*WHOLE, "batch_size=6", "steps=40")
    with pytest.raises(DataError, match=r"\d+ of \d+ samples cannot be read \(picture unreadable: \d+\).*scene\.\d"):
        list(iterate(opened("tiny/pretrain", folder, tiny_model, *settings), 0))
    assert len(list(iterate(opened("tiny/pretrain", folder, tiny_model, *settings, "data.max_skipped=1"), 0))) == 40
    with pytest.raises(DataError, match=r"allow a larger share with data.max_skipped, which is 0\."):
        list(iterate(opened("tiny/pretrain", folder, tiny_model, *settings, "data.max_skipped=0"), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_read_the_run_stops_at_once(folder, tiny_model, workers):
    for path in folder.glob("part*/*.png"):
        path.write_bytes(b"x")
    batches = opened("tiny/pretrain", folder, tiny_model, *WHOLE, f"data.workers={workers}")
    with pytest.raises(DataError, match=r"no sample that can be used: 6 were tried.*scene\.\d\.png"):
        next(iterate(batches, 0))


def test_an_edit_with_half_a_pair_is_skipped(folder, tiny_model):
    (folder / "e1.output.jpg").unlink()
    batches = opened("tiny/sft", folder, tiny_model, "data.edit_share=1", "objective.drop_prompt=0", "steps=3")
    assert {text for batch in iterate(batches, 0) for text in said(batches, batch)} == {"make it 0"}
    assert batches.tally.skipped == {"picture missing": 3}, "once an epoch"


def test_captions_and_edits_from_a_folder(folder, tiny_model):
    batches = opened("tiny/sft", folder, tiny_model, "batch_size=3", "objective.drop_prompt=0", "steps=20")
    kinds = {"sources" in batches[i]: batches[i] for i in range(20)}
    assert (
        kinds[False]["targets"].shape == kinds[True]["sources"].shape == kinds[True]["targets"].shape == (3, 3, 56, 56)
    )
    assert all(text.startswith("a picture of") for text in said(batches, kinds[False]))
    assert all(text.startswith("make it") for text in said(batches, kinds[True]))


@pytest.mark.parametrize(
    ("name", "settings", "harm", "message"),
    [
        ("tiny/instruct", (), lambda f: None, "no pictures with conversations, which tiny/instruct learns from"),
        ("tiny/sft", ("data.edit_share=0.6",), lambda f: [p.unlink() for p in f.glob("e*")], "holds no edits"),
        ("tiny/pretrain", (), lambda f: [p.unlink() for p in f.rglob("part*/*")], "2 edits .*edit_share=1"),
    ],
)  # fmt: skip
def test_places_without_what_the_recipe_learns_from_are_refused(folder, tiny_model, name, settings, harm, message):
    harm(folder)
    with pytest.raises(ConfigError, match=message):
        opened(name, folder, tiny_model, *settings)


def test_a_tokenizer_stage_takes_pictures_without_text_and_without_a_tokenizer(tmp_path, picture, tiny_model):
    for i in range(3):
        picture(60, 60, i).save(tmp_path / f"{i}.PNG")
    recipe = override(get_recipe("tiny/recon"), ["data.source=files", f"data.path={tmp_path}"])
    batches = make_batches(recipe, tiny_model.config, None)
    assert batches[5]["images"].shape == (2, 3, 56, 56)
    recipe = override(get_recipe("tiny/pretrain"), ["data.source=files", f"data.path={tmp_path}"])
    with pytest.raises(ConfigError, match="starts from nothing that has a tokenizer"):
        make_batches(recipe, tiny_model.config, None)


def test_a_tokenizer_stage_uses_every_picture_of_shards(shards, tiny_model):
    batches = opened("tiny/recon", shards(2, 2), tiny_model, "batch_size=6")
    assert len(torch.unique(batches[0]["images"].flatten(1), dim=0)) == 6, "both pictures of an edit, too"


def test_the_processor_of_a_resized_model_sets_the_size(tiny_tokenizer, tiny_model, folder):
    config = tiny_model.config.replace(image_size=84)
    recipe = override(get_recipe("tiny/sft"), ["data.source=files", f"data.path={folder}", "data.edit_share=1"])
    batch = make_batches(recipe, config, Processor(tiny_tokenizer, config))[0]
    assert batch["sources"].shape[-1] == 84 and int(batch["prompts"].image_slots[0].sum()) == 9


# --- understanding ----------------------------------------------------------------------------------------------------


@pytest.fixture
def talks(tmp_path, picture):
    """Pictures with captions and conversations, and conversations alone."""
    rows = []
    for i in range(4):
        picture(seed=i).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nWhich is {i}?"}, {"from": "gpt", "value": f"number {i}"}]
        rows.append({"image": f"{i}.png", "caption": f"picture {i}", "conversations": turns * 3})
        rows.append({"conversations": turns[:2]})
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "talks.jsonl"


def test_conversations_are_learned(talks, tiny_model):
    settings = ("batch_size=4", "data.text_share=0.5", "objective.turns=2")
    batches = opened("tiny/instruct", talks, tiny_model, *settings)
    batch = batches[0]
    assert batch["images"].shape == (4, 3, 56, 56) and batch["words"].shape[0] == 4 and len(batch["labels"]) == 6
    learned = [batches.processor.tokenizer.decode(row[row != NOT_LEARNED]) for row in batch["labels"]]
    assert all(re.fullmatch(r"(number \d){2}", text) for text in learned[:4]), "as many turns as allowed"
    assert all(re.fullmatch(r"number \d", text) for text in learned[4:])
    ends = (batch["labels"] == batches.processor.end_id).sum(1).tolist()
    assert ends == [2, 2, 2, 2, 1, 1], "an answer ends with its turn"
    texts = [batches[i]["labels"][4:] for i in range(2)]
    alone = {batches.processor.tokenizer.decode(r[r != NOT_LEARNED]) for rows in texts for r in rows}
    assert len(alone) == 4, "conversations without a picture come once an epoch, too"


def test_turns_that_do_not_fit_are_left_out(talks, tiny_model):
    long = opened("tiny/instruct", talks, tiny_model, "objective.turns=3", "data.text_share=0")
    length = long[0]["labels"].shape[1]
    short = opened(
        "tiny/instruct", talks, tiny_model, "objective.turns=3", "data.text_share=0", f"data.max_tokens={length - 1}"
    )
    learned = (short[0]["labels"] == short.processor.end_id).sum(1)
    assert learned.tolist() == [2, 2]


def test_contrast_needs_captions_only(folder, tiny_model):
    batch = opened("tiny/clip", folder, tiny_model)[0]
    assert batch["same"].shape == (2, 2) and "conversations" not in batch
