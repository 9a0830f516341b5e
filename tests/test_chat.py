"""Conversations: what is drawn, changed and answered is what the verbs themselves give; what fails changes nothing."""

import pytest
from PIL import Image, ImageChops

from unilip.chat import Conversation, joined
from unilip.errors import UniLIPError

QUICK = {"num_inference_steps": 1, "progress": False, "max_new_tokens": 4}


def same(a, b):
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def drawn(model, verb, *values, **named):
    return getattr(model, verb)(*values, num_inference_steps=1, progress=False, **named).images[0]


def test_a_conversation_draws_changes_and_answers(tiny_model):
    chat = tiny_model.chat(seed=5, **QUICK)
    first = chat("Please draw two dogs")
    assert (first.verb, first.text, first.seed) == ("generate", "two dogs", 5)
    assert same(first.images[0], drawn(tiny_model, "generate", "two dogs", generator=5))
    second = chat("now remove the hat")
    assert (second.verb, second.text, second.seed) == ("edit", "remove the hat", 6)
    assert same(second.images[0], drawn(tiny_model, "edit", first.images[0], "remove the hat", generator=6))
    asked = ["How many dogs are there?", "Which colour?"]
    answers = [chat(question) for question in asked]
    assert [one.verb for one in answers] == ["ask", "ask"] and answers[0].seed is None
    turns = [{"role": "user", "content": "draw two dogs"}, {"role": "assistant", "content": "Here is the picture."}]
    assert answers[0].text == tiny_model.ask(second.images[0], asked[0], max_new_tokens=4)
    turns = [
        {"role": "user", "content": asked[0], "images": [second.images[0]]},
        {"role": "assistant", "content": answers[0].text or "Here is the picture."},
    ]
    assert answers[1].text == tiny_model.ask(None, asked[1], history=turns, max_new_tokens=4)
    assert [reply.verb for reply in chat.replies] == ["generate", "edit", "ask", "ask"]
    for _ in range(3):
        chat.undo()
    assert chat.images == first.images and len(chat.replies) == 1
    assert same(chat("now remove the hat").images[0], second.images[0]), "the same seed again"


def test_a_message_brings_a_picture_of_its_own(tiny_model):
    chat, photo = tiny_model.chat(**QUICK), Image.new("RGB", (80, 40), "red")
    chat("draw a cat", seed=1)
    reply = chat("make it blue", photo, seed=3)
    assert same(reply.images[0], drawn(tiny_model, "edit", photo, "make it blue", generator=3))
    assert chat("a car", verb="edit").verb == "edit" and chat("draw: a car").text == "a car"
    assert 0 <= chat.replies[-1].seed < 2**31
    for output_type in ("pil", "np", "pt"):
        several = tiny_model.reconstruct([photo, photo], output_type=output_type)
        assert len(chat("make it blue", several).images) == len(chat("make it blue", several.images).images) == 2


def test_changes_from_the_original(tiny_model):
    chat, photo = tiny_model.chat(seed=0, from_original=True, **QUICK), Image.new("RGB", (56, 56), "red")
    chat("make it blue.", photo)
    reply = chat("add a star")
    assert reply.text == "make it blue. add a star" == joined(["make it blue.", "add a star"])
    assert same(reply.images[0], drawn(tiny_model, "edit", photo, reply.text, generator=1))


def test_a_long_conversation_drops_what_came_first(tiny_model):
    chat = tiny_model.chat(**QUICK)
    long = "What is " + "very " * 60 + "red here?"
    for _ in range(12):
        chat(long)
    assert len(chat.conversation.turns) == 24 and all(reply.verb == "ask" for reply in chat.replies)
    with pytest.raises(UniLIPError, match="reads at most"):
        chat("What is " + "very " * 900 + "red?")


def test_what_cannot_be_changes_nothing(tiny_model):
    chat = tiny_model.chat(**QUICK)
    with pytest.raises(UniLIPError, match="taken back"):
        chat.undo()
    for match, message, named in (
        ("no picture to change", "make it blue", {"verb": "edit"}),
        ("message", "  ", {}),
        ("There is no verb", "a cat", {"verb": "paint"}),
        ("setting of a chat", "draw a cat", {"generator": 3}),
        ("guidance_scale", "draw a cat", {"guidance_scale": float("nan")}),
        ("seed", "draw a cat", {"seed": -1}),
        ("no-such", "make it blue", {"image": "no-such.png"}),
    ):
        with pytest.raises(UniLIPError, match=match):
            chat(message, **named)
    assert chat.conversation == Conversation() and not chat.replies
    for wrong in ({"seed": 1.5}, {"from_original": 1}, {"steps": 3}):
        with pytest.raises(UniLIPError):
            tiny_model.chat(**wrong)


def test_the_pictures_that_came_last_are_changed():
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    told = Conversation().heard("draw", ()).answered("", [red])
    assert told.shown == (red,) and told.heard("and this", [blue]).shown == (blue,)
    assert told.heard("what?").turns[-1].images == (red,), "read in the turn that follows"
    assert told.heard("what?").answered("a cat").shown == (red,)
