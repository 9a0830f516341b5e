"""Batches: the same for any number of workers, a function of seed and sample, labels where answers are."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from unilip.emoji.art import STYLES, Atlas
from unilip.emoji.world import World
from unilip.errors import ConfigError
from unilip.method.text import Message
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train import batches as batching
from unilip.train.batches import NOT_LEARNED, _leave_signals, conversation, iterate
from unilip.train.build import make_batches


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
        wanted = [processor.ids((answer, processor.end_id)) for answer in answers]
        assert labels[row][learned].tolist() == [token for ids in wanted for token in ids]
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
        inside = set(tiny_model.processor.tokenizer.encode(caption, special=True))
        assert set(row.nonzero()[:, 0].tolist()) == inside, "a word of the caption, and no other"
    assert torch.equal(batch["same"], batch["same"].T) and bool((batch["same"].diagonal() == 1).all())
    assert len(batch["labels"]) == 4 + 2, "half as many questions without a picture"
    assert batch["conversations"].image_slots.any(1).tolist() == [True] * 4 + [False] * 2
    assert ((batch["labels"] != NOT_LEARNED).sum(1) > 0).all()


def test_rare_words_weigh_more(tiny_model):
    batches = opened("tiny/clip", tiny_model)
    weights = batches.word_weights
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


def test_a_share_of_the_pictures_is_turned_moved_and_exchanges_its_colours(tiny_model):
    plain, varied, again = (
        opened("tiny/recon", tiny_model, f"objective.augment={share}", "batch_size=80")[0] for share in (0, 0.5, 0.5)
    )
    assert torch.equal(varied["images"], again["images"]) and plain["held"].all()
    changed = ~varied["held"]
    assert torch.equal(varied["images"][~changed], plain["images"][~changed]) and 25 < int(changed.sum()) < 55
    same = 0
    for a, b in zip(plain["images"][changed], varied["images"][changed], strict=True):
        turned = [torch.rot90(x, k, (1, 2)) for x in (b, b.flip(2)) for k in range(4)]
        same += any(torch.equal(a, t[list(order)]) for t in turned for order in itertools.permutations(range(3)))
    assert 0.25 < same / int(changed.sum()) < 0.75, "the others are zoomed, moved and turned by any angle"


def test_most_pictures_for_the_tokenizer_alone_are_of_drawings_without_a_name(tiny_model):
    pictures = dataclasses.replace(tiny_model.config, image_size=World.pico().image_size)
    recipe = override(get_recipe("tiny/recon"), ["data.world=pico", "data.path=synthetic"])
    source = make_batches(recipe, pictures, tiny_model.processor)
    assert set(source.atlas.strange) == {(style, code) for style in STYLES for code in ("1f600", "1f4a9")}
    strange = [i for i in range(60) if source.is_strange(source.scenes.draw(i)[0])]
    assert 20 < len(strange) < 50 and [i for i in range(60) if not source.is_held(i, False)] == strange
    assert not any(source.is_held(i, True) for i in range(60))
    other = [i for i in range(60) if not np.array_equal(source.image_item(i), source.scenes[i]["image"])]
    assert 0.6 < len(other) / len(strange) < 0.95 and set(other) <= set(strange)


def test_art_without_the_drawings_that_have_no_name_is_said_and_still_used(tiny_model, monkeypatch, caplog):
    pictures = dataclasses.replace(tiny_model.config, image_size=World.pico().image_size)
    recipe = override(get_recipe("tiny/recon"), ["data.world=pico", "data.path=synthetic"])
    assert make_batches(recipe, pictures, tiny_model.processor) and "older version" not in caplog.text
    monkeypatch.setattr(Atlas, "strange", [])
    source = make_batches(recipe, pictures, tiny_model.processor)
    assert "older version" in caplog.text and "unilip data prepare emoji" in caplog.text
    assert all(np.array_equal(source.image_item(i), source.scenes[i]["image"]) for i in range(20))


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


def test_kinds_of_edits_come_as_often_as_the_recipe_says(tiny_model):
    source = opened("tiny/sft", tiny_model, "data.edit_share=1", "data.edits=recolour:3,background")
    found = Counter(source.edit_pairs[i]["kind"] for i in range(400))
    assert set(found) == {"recolour", "background"} and 0.6 < found["recolour"] / 400 < 0.9
    assert len({opened("tiny/sft", tiny_model).edit_pairs[i]["kind"] for i in range(100)}) > 2


@pytest.mark.parametrize("text", ["repaint", "recolour:0", "recolour:many", "recolour:-1", "recolour:²"])
def test_unknown_kinds_of_edits_are_refused(tiny_model, text):
    with pytest.raises(ConfigError, match=r"data.edits .*KIND:TIMES"):
        opened("tiny/sft", tiny_model, "data.edit_share=1", f"data.edits={text}")


def test_seed_and_step_decide_everything(tiny_model):
    one, again, other = (opened("tiny/pretrain", tiny_model, f"seed={seed}") for seed in (0, 0, 1))
    assert same(one[2], again[2]) and not same(one[2], other[2]) and not same(one[2], one[3])


def test_the_world_must_have_the_model_s_size(tiny_model):
    with pytest.raises(ConfigError, match="world of the model's size"):
        opened("tiny/recon", tiny_model, "data.world=pico")


# --- loader workers ---------------------------------------------------------------------------------------------------


class Unsendable(Exception):
    """An error that cannot be brought from one process to another."""

    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_however_a_run_ends_its_workers_end_too(tiny_model, monkeypatch, how):
    batches = opened("tiny/clip", tiny_model, "data.workers=2", "steps=50", "batch_size=2")
    monkeypatch.setattr(batching, "WORKER_SECONDS", 1.0)
    make = type(batches).__getitem__

    def odd(self, index):
        if index == 3 and how == "raises":
            raise Unsendable("an unforeseen thing", 2)
        if index == 3:
            time.sleep(3600)
        return make(self, index)

    monkeypatch.setattr(type(batches), "__getitem__", odd)
    begun = time.monotonic()
    found = iterate(batches, 0)
    if how == "raises":
        with pytest.raises(RuntimeError, match="an unforeseen thing"):
            list(found)
    else:
        next(found)
        found.close()
    assert not multiprocessing.active_children() and time.monotonic() - begun < 60
