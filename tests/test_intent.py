"""What turns of a conversation want."""

import pytest

from intent_lists import QUESTIONS, WISHES
from unilip.intent import intent


@pytest.mark.parametrize(
    ("text", "has_picture", "expected"),
    [
        ("Draw three yellow stars", False, ("generate", "three yellow stars")),
        ("please draw me a picture of a blue car.", False, ("generate", "a blue car.")),
        ("Could you generate an image of two dogs?", True, ("generate", "two dogs?")),
        ("Generate an image: a red house", False, ("generate", "a red house")),
        ("draw a car", True, ("generate", "a car")),
        ("a picture of a cat", False, ("generate", "a cat")),
        ("create a green tree", False, ("generate", "a green tree")),
        ("Make me a new picture of a dog", True, ("generate", "a dog")),
        ("Change the background to pink", True, ("edit", "Change the background to pink")),
        ("please make it blue", True, ("edit", "make it blue")),
        ("now add a star", True, ("edit", "add a star")),
        ("paint the car red", True, ("edit", "paint the car red")),
        ("draw a hat on the dog", True, ("edit", "draw a hat on the dog")),
        ("remove the tree", True, ("edit", "remove the tree")),
        ("remove the tree", False, ("ask", "remove the tree")),
        ("What color is the background?", True, ("ask", "What color is the background?")),
        ("How many stars are there?", False, ("ask", "How many stars are there?")),
        ("Describe the picture.", True, ("ask", "Describe the picture.")),
        ("draw", False, ("ask", "draw")),
        ("", False, ("ask", "")),
    ],
)
def test_intent(text, has_picture, expected):
    assert intent(text, has_picture) == expected


def test_questions_are_not_drawn():
    """At most 1 % of messages that ask for words are drawn, with a picture at hand and without."""
    assert len(QUESTIONS) > 150
    for has_picture in (True, False):
        asked = [line.removeprefix("- ") for line in QUESTIONS if not (has_picture and line.startswith("- "))]
        drawn = [text for text in asked if intent(text, has_picture)[0] != "ask"]
        assert len(drawn) <= 0.01 * len(asked), drawn


def test_wishes_are_not_answered_in_words():
    """At most 5 % of messages that want a picture are answered in words, and changes change the picture at hand."""
    assert len(WISHES) > 150
    found = [(line, intent(line.removeprefix("+ "), line.startswith("+ "))[0]) for line in WISHES]
    answered = [line for line, verb in found if verb == "ask"]
    assert len(answered) <= 0.05 * len(WISHES), answered
    mistaken = [line for line, verb in found if verb == "edit" and not line.startswith("+ ")]
    assert not mistaken


def test_a_prefix_decides():
    assert intent("answer: draw a cat", True) == ("ask", "draw a cat")
    assert intent("Draw: what is this?", False) == ("generate", "what is this?")
    assert intent("edit: is it blue", True) == ("edit", "is it blue")
    assert intent("edit: blue", False)[0] == "ask"


def test_long_texts_are_read_quickly():
    import time

    started = time.perf_counter()
    for text in ("please " * 1100, "draw a " + "b " * 3900, "paint " + "on " * 2600, "a " * 4000):
        intent(text, True)
    assert time.perf_counter() - started < 1
