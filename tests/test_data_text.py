"""Words about scenes: grammar of captions, answers that agree with the scene graph, riddles, tokenizer."""

import itertools
import json
import random
import re

import pytest

from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.captions import NUMBERS, canonical, caption, counted, indefinite, listed, noun, with_article
from unilip.emoji.concepts import concept, concepts
from unilip.emoji.knowledge import CLUES, knowledge, riddles
from unilip.emoji.questions import KINDS, questions
from unilip.emoji.tokenizer import SPECIAL_TOKENS, corpus, train_tokenizer
from unilip.emoji.world import TASKS, Obj, Scene, World, relation, sample_scene
from unilip.errors import DataError

WORLDS = ("pico", "nano")
NANO = World.nano()


def obj(name: str, colour=None, style="flat", tone=None, x=0, y=0) -> Obj:
    return Obj(name, style, colour, tone, x, y, 56)


def sampled(name: str, n: int = 60):
    world = World.preset(name)
    rng = random.Random(name)
    for task in TASKS:
        for _ in range(n):
            yield world, task, sample_scene(world, rng, task, "val"), rng


# ------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("given", "one", "many"),
    [
        (obj("car", "red"), "a red car", "three red cars"),
        (obj("car", "orange"), "an orange car", "three orange cars"),
        (obj("umbrella", "blue"), "a blue umbrella", "three blue umbrellas"),
        (obj("octopus"), "an octopus", "three octopuses"),
        (obj("unicorn"), "a unicorn", "three unicorns"),
        (obj("hourglass"), "an hourglass", "three hourglasses"),
        (obj("mouse", style="glossy"), "a glossy mouse", "three glossy mice"),
        (obj("pair of socks", "red"), "a pair of red socks", "three pairs of red socks"),
        (obj("slice of pizza"), "a slice of pizza", "three slices of pizza"),
        (obj("broccoli"), "broccoli", "three broccoli"),
        (obj("doctor", tone="dark"), "a doctor with dark skin", "three doctors with dark skin"),
    ],
)
def test_noun_phrases(given, one, many):
    assert indefinite(given, NANO) == one
    assert counted(given, 3, NANO) == many


def test_articles_of_all_concepts_agree_with_the_list():
    for name, c in concepts().items():
        if c.countable:
            assert with_article(name) == c.phrase


def test_lists():
    assert [listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_canonical_forms():
    two = (obj("whale", "blue", x=100), obj("car", "red", x=10))
    assert canonical(Scene("yellow", two), "two", NANO) == "a red car and a blue whale on a yellow background"
    assert canonical(Scene("white", two), "position", NANO) == "a red car to the left of a blue whale"
    assert canonical(Scene("white", two), "two", NANO, background=True).endswith(" on a white background")
    above = (obj("cat", y=100, x=10), obj("dog", x=12))
    assert canonical(Scene("grass", above), "position", NANO) == "a dog above a cat on grass"
    stars = tuple(obj("star", "yellow", x=60 * i) for i in range(3))
    assert canonical(Scene("night sky", stars), "counting", NANO) == "three yellow stars in front of a night sky"


@pytest.mark.parametrize("name", WORLDS)
def test_captions_are_grammatical_and_complete(name):
    mentioned = []
    for world, task, scene, rng in sampled(name):
        text = caption(scene, task, rng, world)
        assert text == text.strip()
        assert "  " not in text
        assert not re.search(r"\ban (?!hour)[^aeiou]", text), text
        assert not re.search(r"\ba (?!uni)[aeiou]", text), text
        for thing in scene.objects:
            c = concept(thing.concept)
            said = thing.concept in text or c.plural in text or thing.concept.removeprefix("pair of ") in text
            assert said or c.plural.removeprefix("pairs of ") in text, text
            assert thing.colour is None or thing.colour in text
            assert thing.style == "flat" or thing.style in text
            assert thing.tone is None or f"{thing.tone} skin" in text
        named = any(phrase in text for phrase in BACKGROUNDS[scene.background].phrases)
        assert named or scene.background == world.default_background, text  # what is unsaid is white
        mentioned.append(named)
        if task == "counting":
            assert NUMBERS[len(scene.objects)] in text
    assert 0.62 < sum(mentioned) / len(mentioned) < 0.85


@pytest.mark.parametrize("name", WORLDS)
def test_captions_come_in_several_wordings(name):
    for world, task, scene, rng in sampled(name, 3):
        assert len({caption(scene, task, rng, world) for _ in range(40)}) >= 4


def test_positions_in_captions_are_true():
    for world, task, scene, rng in sampled("pico"):
        if task != "position":
            continue
        text = caption(scene, task, rng, world)
        a, b = sorted(scene.objects, key=lambda o: text.index(noun(o, world)))
        found = re.search(
            r"to the (left|right) of|on the (left|right)|(above|over)|(below|under)|at the (top|bottom)", text
        )
        assert found, text
        word = next(group for group in found.groups() if group)
        where = {"over": "above", "under": "below", "top": "above", "bottom": "below"}.get(word, word)
        assert relation(a, b) == where, text


# ------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize("name", WORLDS)
def test_answers_agree_with_the_scene(name):
    kinds, yes = set(), {}
    for world, _, scene, rng in sampled(name, 120):
        by_name = {o.concept: o for o in scene.objects}
        things = {o.concept: sum(p.concept == o.concept for p in scene.objects) for o in scene.objects}
        for qa in questions(scene, rng, world):
            kinds.add(qa.kind)
            assert qa.accepted[0] == qa.answer.lower()
            assert len(set(qa.accepted)) == len(qa.accepted)
            if qa.answer in ("yes", "no"):
                yes.setdefault(qa.kind, []).append(qa.answer == "yes")
            if qa.kind == "presence":
                asked = re.sub(r"^(Is there|Do you see|Can you see) (an? )?", "", qa.question).removesuffix("?")
                asked = asked.removesuffix(" in the picture")
                assert (asked in by_name) == (qa.answer == "yes"), qa
            elif qa.kind == "colour" and qa.answer not in ("yes", "no"):
                assert qa.answer in {
                    o.colour for o in scene.objects if o.concept in qa.question or things[o.concept] > 1
                }
            elif qa.kind == "count" and qa.answer not in ("yes", "no"):
                total = NUMBERS[len(scene.objects)]
                assert qa.answer in ({total} if "objects" in qa.question or "things" in qa.question else
                                     {NUMBERS[n] for n in things.values()})  # fmt: skip
            elif qa.kind == "position" and (
                match := re.match(r"Is (.+) (to the left of|to the right of|above|below) (.+)\?", qa.question)
            ):
                a, b = (by_name[side.removeprefix("the ")] for side in (match[1], match[3]))
                told = {"to the left of": "left", "to the right of": "right"}.get(match[2], match[2])
                assert (relation(a, b) == told) == (qa.answer == "yes")
            elif qa.kind == "identity":
                assert all(o.concept in qa.answer or concept(o.concept).plural in qa.answer for o in scene.objects)
            elif qa.kind == "caption":
                assert BACKGROUNDS[scene.background].phrases[0] in qa.answer
    assert kinds == (set(KINDS) if name == "nano" else set(KINDS) - {"style"})
    for kind, truths in yes.items():
        assert sum(truths) / len(truths) == pytest.approx(0.5, abs=0.17), kind


def test_training_questions_do_not_name_held_out_pairs():
    world, rng = World.pico(), random.Random(3)
    for _ in range(300):
        scene = sample_scene(world, rng, "single")
        for qa in questions(scene, rng, world, "train"):
            if qa.kind == "presence" and qa.answer == "no":
                (absent,) = [n for n in world.concepts if re.search(rf" an? {n}( in the picture)?\?$", qa.question)]
                assert not world.pair_held_out(absent, scene.objects[0].concept)


# ------------------------------------------------------------------------------------------------ knowledge


def test_clues_are_about_known_concepts_and_do_not_name_them():
    assert set(CLUES) <= set(concepts())
    assert set(World.pico().concepts) <= set(CLUES)
    clues = list(itertools.chain.from_iterable((kind, clue) for kind, found in CLUES.values() for clue in found))
    assert len(clues) > 500
    for name, (_, found) in CLUES.items():
        for clue in found:
            assert not re.search(rf"\b{re.escape(name)}\b", clue), (name, clue)


@pytest.mark.parametrize("name", WORLDS)
def test_knowledge_is_of_the_world_and_split_by_wording(name):
    world = World.preset(name)
    train, val = knowledge(world, "train"), knowledge(world, "val")
    assert len(train) == 3 * len(val)
    assert not {f.question for f in train} & {f.question for f in val}
    assert all(f.concept in world.concepts and f.answer == concept(f.concept).phrase for f in (*train, *val))
    assert len({f.question for f in train}) == len(train)  # one question, one answer
    assert len(riddles(world)) == len(val)
    assert all(r.caption.startswith("the ") and r.concept in world.concepts for r in riddles(world))


# ------------------------------------------------------------------------------------------------ tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(World.pico(), 900, folder, sentences=3000), folder


def test_corpus_is_reproducible_and_holds_all_kinds_of_text():
    world = World.pico()
    lines = list(corpus(world, 400, 1))
    assert lines == list(corpus(world, 400, 1))
    assert lines != list(corpus(world, 400, 2))
    text = "\n".join(lines)
    assert all(words in text for words in ("Generate an image:", "Edit the image:", "user\n", "assistant\n", "0 1 2"))


def test_any_text_survives_the_tokenizer_but_for_what_it_folds(tokenizer):
    made, _ = tokenizer
    for text, read in (
        ("a red car on a yellow background", None),
        ("Zażółć gęślą jaźń", "zażółć gęślą jaźń"),
        ("漢字 🐶\n\ttabs  and   spaces", "漢字 🐶\n tabs and spaces"),
        ("“A  RED car” .", '"a red car".'),
        ("the farmer’s cat ", "the farmer's cat"),
        ("3.14159", None),
        ("", None),
    ):
        assert made.decode(made(text)["input_ids"]) == (text if read is None else read)


def test_frequent_words_are_one_token(tokenizer):
    made, _ = tokenizer
    assert len(made("Generate an image: a red car")["input_ids"]) == 7
    assert len(made("<|im_start|>assistant\n")["input_ids"]) == 3


def test_saved_tokenizer_loads_by_the_ordinary_way(tokenizer):
    from transformers import AutoTokenizer

    made, folder = tokenizer
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.get_vocab() == made.vocabulary
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    ids = loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    turns = [{"role": "user", "content": "<img><IMG_CONTEXT></img>What is this?"}]
    text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>user\n<img><IMG_CONTEXT></img>What is this?<|im_end|>\n<|im_start|>assistant\n")
    assert ids[5] in loaded(text)["input_ids"]


def test_training_twice_gives_the_same_bytes(tokenizer, tmp_path):
    _, folder = tokenizer
    train_tokenizer(World.pico(), 900, tmp_path, sentences=3000)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(DataError, match="at least 320"):
        train_tokenizer(World.pico(), 100)


def test_words_that_training_never_read_are_found(tokenizer):
    from unilip.checkpoints.tokenizer import load_tokenizer
    from unilip.model import UniLIP

    for one in (load_tokenizer(tokenizer[1]), UniLIP.from_pretrained(parts=("mllm",)).processor.tokenizer):
        found = one.unread("A RED car, and the Car's dragon; 3 roter Drachen \u9f99 \N{DRAGON FACE}")
        assert found == ["dragon", "roter", "drachen", "\u9f99"]
        assert one.unread("a photograph of an owl") == ["photograph", "owl"] and one.unread("") == []
