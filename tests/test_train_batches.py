"""Batches: the same for any number of workers, a function of seed and sample, labels where answers are, folders."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from unilip.errors import ConfigError, ImageError, PromptError
from unilip.preprocess import TURN_END, Message, Processor
from unilip.train.batches import NOT_LEARNED, _leave_signals, conversation, iterate, make_batches
from unilip.train.recipe import override
from unilip.train.recipes import get_recipe


def opened(name: str, model, *settings: str):
    return make_batches(override(get_recipe(name), settings), model.config, model.processor)


def same(a, b) -> bool:
    """Whether two batches are equal, tensor for tensor."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- conversations ----------------------------------------------------------------------------------------------------

TALK = [("What is it?", "a red apple"), ("How many are there?", "Two, I think.")]


def test_only_answers_are_learned(tiny_model):
    processor = tiny_model.processor
    tokens, labels = conversation(processor, [(1, TALK), (0, [("Who says moo?", "a cow")])])
    for row, answers in enumerate((["a red apple", "Two, I think."], ["a cow"])):
        learned = labels[row] != NOT_LEARNED
        assert torch.equal(tokens.input_ids[row][learned], labels[row][learned])
        assert processor.tokenizer.decode(labels[row][learned]) == "".join(f"{a}{TURN_END}" for a in answers)
    assert not (labels[tokens.attention_mask == 0] != NOT_LEARNED).any(), "padding is never learned"
    assert int(tokens.image_slots[0].sum()) == processor.num_image_tokens and not tokens.image_slots[1].any()


def test_answers_are_learned_after_the_very_tokens_that_ask_reads(tiny_model):
    """In each turn, what stands before the answer is the tokenized prompt of inference, history and all."""
    processor = tiny_model.processor
    (tokens, labels), row = conversation(processor, [(1, TALK)]), 0
    starts = [
        i for i in range(1, labels.shape[1]) if labels[row, i] != NOT_LEARNED and labels[row, i - 1] == NOT_LEARNED
    ]
    assert len(starts) == len(TALK)
    messages = []
    for start, (question, answer) in zip(starts, TALK, strict=True):
        messages.append(Message("user", question, () if messages else (1,)))
        asked = processor.tokenize([processor.chat_text(messages)])
        assert torch.equal(asked.input_ids[0], tokens.input_ids[row, :start])
        assert torch.equal(asked.image_slots[0], tokens.image_slots[row, :start])
        messages.append(Message("assistant", answer))
        end = tokens.input_ids[row, start:].tolist().index(processor.end_id)
        assert processor.decode(tokens.input_ids[row : row + 1, start : start + end]) == [answer]
    whole = processor.tokenize([processor.chat_text(messages, open_turn=False)])
    assert torch.equal(whole.input_ids[row], tokens.input_ids[row, : whole.input_ids.shape[1]])


def test_training_reads_the_prompt_that_ask_reads(fresh_model, picture, monkeypatch):
    model = fresh_model(parts=("encoder", "mllm"))
    seen = []
    monkeypatch.setattr(
        model.mllm, "embed", lambda ids, *rest: seen.append(ids) or type(model.mllm).embed(model.mllm, ids, *rest)
    )
    model.ask(picture(), "What is it?", max_new_tokens=1)
    tokens, labels = conversation(model.processor, [(1, [("What is it?", "a cat")])])
    start = int((labels[0] != NOT_LEARNED).nonzero()[0])
    assert torch.equal(seen[0], tokens.input_ids[:, :start])


# --- the emoji world --------------------------------------------------------------------------------------------------


def test_understanding_batches(tiny_model):
    batches = opened("tiny/instruct", tiny_model, "batch_size=4", "data.text_share=0.5")
    batch = batches[3]
    assert batch["images"].shape == (4, 3, 56, 56) and batch["images"].dtype == torch.uint8
    words = batch["words"]
    torch.testing.assert_close(words.sum(-1), torch.ones(4))
    assert (words >= 0).all() and words.shape[1] == tiny_model.config.text.vocab_size
    for row, caption in zip(words, tiny_model.processor.decode(batch["captions"].input_ids), strict=True):
        inside = set(tiny_model.processor.tokenizer(caption, add_special_tokens=False)["input_ids"])
        assert set(row.nonzero()[:, 0].tolist()) == inside, "a word of the caption, and no other"
    assert torch.equal(batch["same"], batch["same"].T) and bool((batch["same"].diagonal() == 1).all())
    assert len(batch["labels"]) == 4 + 2, "half as many questions without a picture"
    assert batch["conversations"].image_slots.any(1).tolist() == [True] * 4 + [False] * 2
    assert ((batch["labels"] != NOT_LEARNED).sum(1) > 0).all()


def test_rare_words_weigh_more(tiny_model):
    batches = opened("tiny/clip", tiny_model)
    weights = batches.word_weights()
    often = batches._words("a picture of")
    rare = set(range(len(weights))) - {t for i in range(1000) for t in batches._words(batches.caption(i))}
    assert weights[often].mean() < weights[list(rare)].min() and weights.min() > 0


def test_equal_captions_are_marked(tiny_model, monkeypatch):
    batches = opened("tiny/clip", tiny_model, "batch_size=3")
    texts = iter(["a cat", "a dog", "a cat"])
    item = batches.questions_item(0, 1)
    monkeypatch.setattr(batches, "questions_item", lambda i, turns: (item[0], next(texts), item[2]))
    assert batches[0]["same"].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("name", ["tiny/instruct", "tiny/recon", "tiny/sft"])
def test_workers_change_nothing(name, tiny_model):
    settings = ("steps=5", "batch_size=2")
    alone = list(iterate(opened(name, tiny_model, *settings), 1))
    workers = list(iterate(opened(name, tiny_model, *settings, "data.workers=2"), 1))
    assert len(alone) == len(workers) == 4
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))
    assert not same(alone[0], alone[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_worker_leaves_signals_to_the_loop():
    child = os.fork()
    if child == 0:
        _leave_signals(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_accumulated_batches_are_the_larger_batch_in_pieces(tiny_model):
    whole = opened("tiny/sft", tiny_model, "batch_size=4", "steps=6", "objective.drop_prompt=0.5")
    parts = opened("tiny/sft", tiny_model, "batch_size=2", "steps=6", "accumulate=2", "objective.drop_prompt=0.5")
    assert len(parts) == 2 * len(whole) == 12
    tasks = set()
    for step in range(6):
        one, (a, b) = whole[step], (parts[2 * step], parts[2 * step + 1])
        tasks.add("sources" in one)
        assert one.keys() == a.keys() == b.keys(), "all batches of a step have one task"
        assert torch.equal(one["targets"], torch.cat([a["targets"], b["targets"]]))
        assert one["seeds"] == a["seeds"] + b["seeds"]
        texts = [tiny_model.processor.decode(batch["prompts"].input_ids) for batch in (one, a, b)]
        assert texts[0] == texts[1] + texts[2]
    assert tasks == {True, False}


@pytest.mark.parametrize(("share", "drop"), [(0.0, 0.0), (0.6, 0.3), (1.0, 1.0)])
def test_shares_of_edits_and_of_dropped_prompts(tiny_model, share, drop):
    settings = (f"data.edit_share={share}", f"objective.drop_prompt={drop}", "steps=60", "batch_size=1")
    batches = list(iterate(opened("tiny/sft", tiny_model, *settings), 0))
    edits = sum("sources" in batch for batch in batches) / 60
    texts = [tiny_model.processor.decode(batch["prompts"].input_ids)[0] for batch in batches]
    dropped = sum("image." in text.split("\n")[1] for text in texts) / 60
    assert edits == share if share in (0, 1) else abs(edits - share) < 0.2
    assert dropped == drop if drop in (0, 1) else abs(dropped - drop) < 0.2


def test_seed_and_step_decide_everything(tiny_model):
    one, again, other = (opened("tiny/pretrain", tiny_model, f"seed={seed}") for seed in (0, 0, 1))
    assert same(one[2], again[2]) and not same(one[2], other[2]) and not same(one[2], one[3])


def test_the_world_must_have_the_model_s_size(tiny_model):
    with pytest.raises(ConfigError, match="world of the model's size"):
        opened("tiny/recon", tiny_model, "data.world=pico")


# --- folders ----------------------------------------------------------------------------------------------------------


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


def from_folder(name, folder, model, *settings):
    return opened(name, model, "data.source=folder", f"data.path={folder}", *settings)


def prompts(batches, index):
    return batches.processor.decode(batches[index]["prompts"].input_ids)


def test_captions_and_edits_from_a_folder(folder, tiny_model):
    batches = from_folder("tiny/sft", folder, tiny_model, "batch_size=3", "objective.drop_prompt=0", "steps=20")
    kinds = {"sources" in batches[i]: i for i in range(20)}
    captioned, edited = batches[kinds[False]], batches[kinds[True]]
    assert captioned["targets"].shape == edited["sources"].shape == edited["targets"].shape == (3, 3, 56, 56)
    assert all("Generate an image: a picture of" in text for text in prompts(batches, kinds[False]))
    assert all("Edit the image: make it" in text for text in prompts(batches, kinds[True]))
    assert batches.pairs[0][0].name == "e0.input.png" and batches.pairs[0][1].name == "e0.output.jpg"
    assert len(batches.pictures) == 6, "pictures of edits are no captioned pictures"


def test_pictures_are_cropped_in_the_middle(folder, tiny_model):
    batches = from_folder("tiny/pretrain", folder, tiny_model)
    path, _ = batches.pictures[batches._pick(0, 6)]
    image = Image.open(path)
    scale = 56 / image.width
    tall = image.resize((56, round(image.height * scale)), Image.Resampling.BICUBIC)
    top = (tall.height - 56) // 2
    wanted = np.asarray(tall.crop((0, top, 56, top + 56)), dtype=float)
    assert np.abs(batches.caption_item(0)[0] - wanted).mean() < 4


def test_every_picture_comes_once_an_epoch_in_an_order_of_seed_and_epoch(folder, tiny_model):
    batches = from_folder("tiny/pretrain", folder, tiny_model)
    epochs = [[batches._pick(6 * epoch + i, 6) for i in range(6)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    again = from_folder("tiny/pretrain", folder, tiny_model)
    assert [again._pick(6 + i, 6) for i in range(6)] == epochs[1], "any epoch can be begun with"
    other = from_folder("tiny/pretrain", folder, tiny_model, "seed=5")
    assert [[other._pick(6 * epoch + i, 6) for i in range(6)] for epoch in range(3)] != epochs


def test_folder_batches_do_not_depend_on_workers(folder, tiny_model):
    settings = ("steps=4", "batch_size=2")
    alone = list(iterate(from_folder("tiny/sft", folder, tiny_model, *settings), 0))
    workers = list(iterate(from_folder("tiny/sft", folder, tiny_model, *settings, "data.workers=2"), 0))
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))


def test_a_tokenizer_stage_takes_pictures_without_text_and_without_a_tokenizer(tmp_path, picture, tiny_model):
    for i in range(3):
        picture(60, 60, i).save(tmp_path / f"{i}.PNG")
    recipe = override(get_recipe("tiny/recon"), ["data.source=folder", f"data.path={tmp_path}"])
    batches = make_batches(recipe, tiny_model.config, None)
    assert batches[5]["images"].shape == (2, 3, 56, 56)
    with pytest.raises(ConfigError, match="no text"):
        from_folder("tiny/pretrain", tmp_path, tiny_model)
    recipe = override(get_recipe("tiny/pretrain"), ["data.source=folder", f"data.path={tmp_path}"])
    with pytest.raises(ConfigError, match="starts from nothing that has a tokenizer"):
        make_batches(recipe, tiny_model.config, None)


def test_dcae_targets_are_read_at_the_autoencoder_s_size(folder, tiny_model):
    batches = from_folder("tiny/pretrain", folder, tiny_model, "objective.target=dcae")
    assert batches[0]["targets"].shape == (2, 3, 64, 64), "32 px, where the encoder has 28"


def test_texts_that_are_too_long_are_left_out(folder, tiny_model, caplog):
    (folder / "part0" / "scene.0.txt").write_text("x" * 1001)
    (folder / "part0" / "scene.2.txt").write_text(
        "é" * 999, encoding="utf-8"
    )  # more bytes, but not too many characters
    with caplog.at_level("INFO"):
        batches = from_folder("tiny/pretrain", folder, tiny_model)
    assert len(batches.pictures) == 5 and "scene.0.txt is left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "harm", "error", "message"),
    [
        ("tiny/clip", lambda f: None, ConfigError, "no questions"),
        ("tiny/sft", lambda f: (f / "e1.output.jpg").unlink(), ConfigError, r"e1\.input\.png has no e1\.output"),
        ("tiny/sft", lambda f: (f / "e0.txt").unlink(), ConfigError, r"e0\.input\.png has no text.* e0\.txt"),
        ("tiny/pretrain", lambda f: (f / "part1/scene.1.txt").unlink(), ConfigError, r"scene\.1\.png has no text"),
        ("tiny/sft", lambda f: [p.unlink() for p in f.glob("e*")], ConfigError, "holds no NAME.input"),
        ("tiny/recon", lambda f: [p.unlink() for p in f.rglob("*.*g")], ConfigError, "holds no pictures"),
        ("tiny/pretrain", lambda f: [p.unlink() for p in f.rglob("part*/*")], ConfigError, "2 edits set"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_when_opened(folder, tiny_model, name, harm, error, message):
    harm(folder)
    with pytest.raises(error, match=message):
        from_folder(name, folder, tiny_model)


def test_a_missing_folder_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        from_folder("tiny/recon", tmp_path / "nowhere", tiny_model)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda png, txt: png.write_bytes(png.read_bytes()[:90]), ImageError, r"scene\.0\.png: The image"),
        (lambda png, txt: txt.write_bytes(b"\xff\xfe\x00"), PromptError, r"scene\.0\.txt is not UTF-8"),
        (lambda png, txt: txt.write_text(" \n"), PromptError, r"text in .*scene\.0\.txt is empty"),
        (lambda png, txt: txt.write_text("an <IMG_CONTEXT>"), PromptError, r"scene\.0\.txt contains <IMG_CONTEXT>"),
    ],
)
def test_broken_items_are_named(folder, tiny_model, harm, error, message):
    """A bad sample stops the run and says which file it is; it is not silently replaced."""
    place = folder / "part0"
    harm(place / "scene.0.png", place / "scene.0.txt")
    batches = from_folder("tiny/pretrain", folder, tiny_model, "batch_size=6")
    with pytest.raises(error, match=message):
        batches[0]


def test_the_processor_of_a_resized_model_sets_the_size(tiny_tokenizer, tiny_model, folder):
    config = tiny_model.config.replace(image_size=84)
    recipe = override(get_recipe("tiny/sft"), ["data.source=folder", f"data.path={folder}", "data.edit_share=1"])
    batch = make_batches(recipe, config, Processor(tiny_tokenizer, config))[0]
    assert batch["sources"].shape[-1] == 84 and int(batch["prompts"].image_slots[0].sum()) == 9
