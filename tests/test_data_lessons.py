"""Labels of the lessons: what a text says is found however it is written, and what lies on a token is what covers it.

In: scenes, captions, edits of the pico world. Out: words and tokens with their labels.
"""

import random

import numpy as np
import pytest

from unilip.emoji.captions import as_written, caption, plan
from unilip.emoji.dataset import prompt
from unilip.emoji.edits import Edit, sample_edit
from unilip.emoji.lessons import MARK, SUMMARY, UNKNOWN, cells, numbers, of_caption, of_edit, of_question
from unilip.emoji.questions import questions
from unilip.emoji.world import TRAINED, Obj, Scene, World, sample_scene

PICO = World.pico()
CAT = Obj("cat", "flat", None, None, 4, 4, 48)
HEART = Obj("heart", "flat", "blue", None, 60, 32, 48)
TWO = Scene("pink", (CAT, HEART))


def said(text, lesson):
    """Label names by the end of the text up to the mark; "?" where the word does not tell."""
    names = {kind: {number: name for name, number in numbers(kind).items()} | {UNKNOWN: "?"} for kind in MARK}
    return {
        text[:end].split()[-1]: [names[k][n] for k, n in zip(MARK, labels, strict=True)] for end, labels in lesson.marks
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("a cat, a blue heart and pink", {"cat": ["cat", None, 1, "?"], "heart": ["heart", "blue", 1, "?"]}),
        ("DRAW CAT  and a BLUE  heart, please", {"CAT": ["cat", None, 1, "?"], "heart": ["heart", "blue", 1, "?"]}),
        (
            "a blue heart on the right and in the upper left corner a cat",
            {"heart": ["heart", "blue", 1, "?"], "right": ["heart", "blue", "?", ("middle", "right")],
             "corner": ["cat", None, "?", ("top", "left")], "cat": ["cat", None, 1, "?"]},
        ),
        ("a catalogue with a bluer heart", {}),
    ],
)  # fmt: skip
def test_words_of_a_caption_say_what_they_mean(text, words):
    lesson = of_caption(text, TWO, PICO)
    assert said(text, lesson) == words
    assert lesson.summary[SUMMARY.index("background")] == numbers("background")["pink"]
    assert lesson.present == tuple(sorted((numbers("concept")["cat"], numbers("concept")["heart"])))


def test_every_prompt_of_training_says_something_and_a_plan_says_everything():
    rng, drawn = random.Random(0), 0
    for _ in range(400):
        task = rng.choice(TRAINED)
        scene = sample_scene(PICO, rng, task, "train", "generation")
        text = as_written(prompt(scene, task, rng, PICO), rng)
        assert of_caption(text, scene, PICO).marks, text
        whole = of_caption(plan(scene, PICO), scene, PICO)
        assert sum(labels[3] != UNKNOWN for _, labels in whole.marks) == len(scene.objects), plan(scene, PICO)
        edit = sample_edit(PICO, rng, rng.choice(PICO.edits))
        told = dict(
            zip(SUMMARY, of_edit(edit, as_written(edit.instruction, rng, wish=False), PICO).summary, strict=True)
        )
        assert told["kind"] == numbers("kind")[edit.kind]
        drawn += told["gone"] > 0 and told["come"] > 0
    assert drawn > 50
    placed = caption(TWO, "two", random.Random(1), PICO, where=True)
    assert placed != caption(TWO, "two", random.Random(1), PICO)


def test_edits_say_what_goes_and_what_comes():
    red = Obj("heart", "flat", "red", None, 60, 32, 48)
    for kind, source, target, instruction, known in (
        (
            "recolour",
            TWO,
            Scene("pink", (CAT, red)),
            "make the heart red",
            {"gone": "heart", "come": "heart", "paint": "red"},
        ),
        ("remove", TWO, Scene("pink", (CAT,)), "Delete the HEART.", {"gone": "heart", "come": None}),
        (
            "add",
            Scene("pink", (CAT,)),
            TWO,
            "add a blue heart to the right of the cat",
            {"come": "heart", "side": "right"},
        ),
        (
            "background",
            TWO,
            Scene("gray", TWO.objects),
            "make the background gray",
            {"background": "gray", "gone": None},
        ),
    ):
        lesson = of_edit(Edit(source, instruction, target, kind), instruction, PICO)
        for name, value in {**known, "kind": kind}.items():
            assert lesson.summary[SUMMARY.index(name)] == numbers(name)[value], (instruction, name)


def test_cells_are_what_covers_most_of_a_token():
    found = cells(TWO, PICO).reshape(4, 4, 3)
    cat, heart, blue = numbers("concept")["cat"], numbers("concept")["heart"], numbers("colour")["blue"]
    wanted = np.zeros((4, 4), int)
    wanted[:2, :2], wanted[1:3, 2:] = cat, heart
    assert (found[..., 0] == wanted).all() and (found[..., 1] == np.where(wanted == heart, blue, 0)).all()
    assert (found[..., 2] == numbers("background")["pink"]).all()


def test_words_of_a_question_lie_where_what_they_name_lies():
    """A name lies where such things lie, "yes" where there are any; the hearts of a picture without hearts nowhere."""
    rng, answers = random.Random(0), set()
    for _ in range(300):
        scene = sample_scene(PICO, rng, rng.choice(TRAINED), "train", "understanding")
        everything = cells(scene, PICO)[:, 0] > 0
        for qa in questions(scene, rng, PICO):
            found = of_question(qa, scene, PICO)
            for end, *_, tokens in found:
                named = [
                    obj for obj in scene.objects if qa.question[:end].lower().endswith((obj.concept, obj.concept + "s"))
                ]
                assert not (tokens & ~everything).any() and (tokens.any() or not named or end == len(qa.question)), qa
            if qa.kind == "background":
                assert not found
                continue
            end, *_, tokens = found[-1]
            assert end == len(qa.question)
            if qa.answer in ("yes", "no"):
                assert tokens.any() == (qa.answer == "yes"), qa
                answers.add((qa.kind, qa.answer))
            elif qa.kind in ("identity", "caption"):
                assert np.array_equal(tokens, everything)
    assert len(answers) == 8, answers
