"""What turns of a conversation want."""

import pytest

from unilip.serve.intent import intent


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


def test_long_texts_are_read_quickly():
    import time

    started = time.perf_counter()
    for text in ("please " * 1100, "draw a " + "b " * 3900, "paint " + "on " * 2600, "a " * 4000):
        intent(text, True)
    assert time.perf_counter() - started < 1
