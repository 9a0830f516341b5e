"""Scene -> questions with short answers, true by construction; yes and no are equally likely."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.captions import NUMBERS, PLACES, WORDS, canonical, cell, counted, definite, grouped, listed, noun
from unilip.emoji.concepts import SHAPES, concept
from unilip.emoji.world import INVERSE, Obj, Scene, World, reading_order, relation

KINDS = ("identity", "colour", "count", "position", "presence", "background", "style", "caption")
BESIDE: dict[str, str] = {where: words[0] for where, words in WORDS["relations"].items()}
SIDES: dict[str, str] = WORDS["sides"]


@dataclass(frozen=True)
class QA:
    """A question about one picture; ``accepted`` holds every right answer in lower case, ``answer`` first.

    ``about`` are the objects that it asks about: none where what it claims is not so, None where it is about none.
    """

    question: str
    answer: str
    accepted: tuple[str, ...]
    kind: str
    about: tuple[Obj, ...] | None = None


def _qa(kind: str, question: str, answer: str, *others: str, about: Sequence[Obj] | None = None) -> QA:
    forms = dict.fromkeys(form.lower() for form in (answer, *others))
    return QA(question, answer, tuple(forms), kind, None if about is None else tuple(about))


def questions(scene: Scene, rng: random.Random, world: World, split: str = "train") -> list[QA]:
    """Return one question of every kind that SCENE can answer; in training none names a held-out combination."""
    found = [
        _identity(scene, rng, world), _colour(scene, rng, world, split), _count(scene, rng, world),
        _position(scene, rng, world), _presence(scene, rng, world, split), _background(scene, rng, world),
        _style(scene, rng, world), describe(scene, rng, world),
    ]  # fmt: skip
    return [qa for qa in found if qa is not None]


def describe(scene: Scene, rng: random.Random, world: World) -> QA:
    """Ask for a caption; the answer is the canonical one, which always names the background."""
    answer = canonical(scene, "two", world, background=True)
    place = BACKGROUNDS[scene.background].phrases[0]
    orders = (f"{words} {place}" for words in _orders(scene, world))
    return _qa("caption", rng.choice(WORDS["describe"]), answer, *orders, about=scene.objects)


def _orders(scene: Scene, world: World) -> list[str]:
    """All ways to list the objects of a scene, with and without colours and articles."""
    ways = [
        (counted(obj, n, world), counted(obj, n, world, style=False), noun(obj, world, plural=n > 1, style=False))
        for obj, n in grouped(reading_order(scene))
    ]
    return [listed(words) for order in permutations(ways) for words in zip(*order, strict=True)]


def _called(obj: Obj, world: World) -> tuple[str, str, str]:
    """What one object may be called: "a car", "car", "a red car"."""
    return concept(obj.concept).phrase, obj.concept, counted(obj, 1, world, style=False)


def _identity(scene: Scene, rng: random.Random, world: World) -> QA:
    groups = grouped(reading_order(scene))
    obj, count = groups[0]
    if len(scene.objects) == 1:
        question = rng.choice(("What is this?", "What is in the picture?", "What do you see?", "What does this show?"))
        return _qa("identity", question, *_called(obj, world), noun(obj, world), about=scene.objects)
    if len(groups) == 1:
        question = rng.choice(("What are these?", "What do you see?", "What is in the picture?"))
        thing, exact = concept(obj.concept), counted(obj, count, world, style=False)
        forms = [exact, f"{NUMBERS[count]} {thing.plural}", noun(obj, world, True), thing.phrase]
        return _qa("identity", question, thing.plural, *forms, about=scene.objects)
    question = rng.choice(("What is in the picture?", "What do you see?", "Which things are in the picture?"))
    named = [concept(obj.concept).phrase if count == 1 else concept(obj.concept).plural for obj, count in groups]
    forms = [*map(listed, permutations(named)), *_orders(scene, world)]
    return _qa("identity", question, *forms, about=scene.objects)


def _colour(scene: Scene, rng: random.Random, world: World, split: str) -> QA | None:
    # a colour is asked for only where we painted it: artists disagree about the rest
    groups = grouped(scene.objects)
    painted = [(obj, n) for obj, n in groups if obj.colour and len(_alike(scene, obj.concept)) == n]
    if not painted:
        return None
    obj, count = rng.choice(painted)
    assert obj.colour is not None
    about = _alike(scene, obj.concept)
    things = f"the {concept(obj.concept).plural}" if count > 1 else definite(obj)
    verb = "are" if count > 1 or obj.concept.startswith("pair") else "is"
    if rng.random() < 0.65:
        helper = "do" if count > 1 else "does"
        patterns = ("What color {v} {t}?", "What color {v} {t}?", "What colour {v} {t}?", "What color {h} {t} have?")
        question = rng.choice(patterns).format(v=verb, t=things, h=helper)
        return _qa("colour", question, obj.colour, f"{things} {verb} {obj.colour}", f"{verb} {obj.colour}", about=about)
    if rng.random() < 0.5:
        return _yes_no("colour", about, f"{verb.capitalize()} {things} {obj.colour}?")
    # another object's colour is the hard wrong answer
    others = [c for c in world.colours if c != obj.colour]
    if split == "train":
        others = [c for c in others if not world.colour_held_out(obj.concept, c)] or others
    here = [o.colour for o in scene.objects if o.colour in others]
    wrong = rng.choice(here) if here and rng.random() < 0.5 else rng.choice(others)
    return _yes_no("colour", (), f"{verb.capitalize()} {things} {wrong}?")


def _yes_no(kind: str, about: Sequence[Obj], question: str) -> QA:
    """Ask for yes or no: yes where there are objects of which it is true."""
    answer = "yes" if about else "no"
    return _qa(kind, question, answer, f"{answer}.", about=about)


def _alike(scene: Scene, name: str) -> list[Obj]:
    return [obj for obj in scene.objects if obj.concept == name]


def _count(scene: Scene, rng: random.Random, world: World) -> QA:
    total = len(scene.objects)
    obj = rng.choice(scene.objects)
    about = _alike(scene, obj.concept)
    same, many = len(about), concept(obj.concept).plural
    if not concept(obj.concept).countable or rng.random() < 0.25:
        question = rng.choice(("How many objects are there?", "How many things are in the picture?"))
        forms = (str(total), f"{NUMBERS[total]} objects", f"{NUMBERS[total]} things")
        return _qa("count", question, NUMBERS[total], *forms, about=scene.objects)
    if rng.random() < 0.75:
        question = rng.choice((f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}."))
        named = f"{NUMBERS[same]} {many if same > 1 else obj.concept}"
        return _qa("count", question, NUMBERS[same], str(same), named, about=about)
    truth = rng.random() < 0.5
    number = same if truth else rng.choice([n for n in range(1, world.max_count + 1) if n != same])
    question = f"Are there {NUMBERS[number]} {many}?" if number > 1 else f"Is there exactly one {obj.concept}?"
    return _yes_no("count", about if truth else (), question)


def _position(scene: Scene, rng: random.Random, world: World) -> QA | None:
    if len({o.concept for o in scene.objects}) != len(scene.objects):
        return None
    pairs = [(a, b, where) for a, b in permutations(scene.objects, 2) if (where := relation(a, b))]
    if not pairs or rng.random() < 0.5:
        return _place(scene, rng, world)
    a, b, where = rng.choice(pairs)
    the_b = definite(b)
    if rng.random() < 0.5 and len(scene.objects) == 2:
        question = rng.choice((f"What is {BESIDE[where]} {the_b}?", f"What is {SIDES[where]}?"))
        return _qa("position", question, *_called(a, world), noun(a, world, style=False), about=[a])
    truth = rng.random() < 0.5
    asked = where if truth else INVERSE[where]
    return _yes_no("position", [a] if truth else (), f"Is {definite(a)} {BESIDE[asked]} {the_b}?")


def _place(scene: Scene, rng: random.Random, world: World) -> QA:
    """Ask where in the picture an object is, or what is there; of two objects, the side will do as well."""
    obj = rng.choice(scene.objects)
    forms = PLACES[cell(obj, world)]
    thing, choice = definite(obj), rng.random()
    if choice < 0.6:
        others = [other for other in scene.objects if other is not obj]
        where = relation(obj, others[0]) if len(others) == 1 else None
        sides = (SIDES[where], f"{BESIDE[where]} {definite(others[0])}") if where else ()
        question = rng.choice((f"Where is {thing}?", f"Where is {thing}?", f"Where in the picture is {thing}?"))
        bare = (re.sub("^(in|on|at) (the )?", "", form) for form in forms)
        said = (f"{thing} is {form}" for form in forms)
        return _qa("position", question, forms[0], *forms, *bare, *said, *sides, about=[obj])
    if choice < 0.8:
        return _qa("position", f"What is {forms[0]}?", *_called(obj, world), about=[obj])
    truth = rng.random() < 0.5
    place = forms[0] if truth else rng.choice([p[0] for p in PLACES.values() if p is not forms])
    return _yes_no("position", [obj] if truth else (), f"Is {thing} {place}?")


def _presence(scene: Scene, rng: random.Random, world: World, split: str) -> QA:
    present = list(dict.fromkeys(o.concept for o in scene.objects))
    truth = rng.random() < 0.5
    name = rng.choice(present) if truth else _absent(present, rng, world, split)
    start = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?"))
    return _yes_no("presence", _alike(scene, name), start.format(concept(name).phrase))


def _absent(present: Sequence[str], rng: random.Random, world: World, split: str) -> str:
    rest = [name for name in world.concepts if name not in present]
    if split == "train":
        rest = [n for n in rest if not any(world.pair_held_out(n, p) for p in present)]
    alike = [name for name in rest if concept(name).group == concept(present[0]).group]
    return rng.choice(alike) if alike and rng.random() < 0.4 else rng.choice(rest)


def _background(scene: Scene, rng: random.Random, world: World) -> QA:
    found = BACKGROUNDS[scene.background]
    if found.kind == "plain" and rng.random() < 0.7:
        question = rng.choice(
            ("What color is the background?", "What colour is the background?", "Which color does the background have?")
        )
        said = (f"{found.answer} background", f"the background is {found.answer}")
        return _qa("background", question, found.answer, *said)
    if rng.random() < 0.5:
        forms = (found.name, f"a {found.name} background", f"the {found.name}", *found.phrases)
        return _qa("background", "What is the background?", found.answer, *forms)
    answer = "yes" if rng.random() < 0.5 else "no"
    name = found.name if answer == "yes" else rng.choice([n for n in world.backgrounds if n != found.name])
    return _qa("background", f"Is the background {BACKGROUNDS[name].answer}?", answer, f"{answer}.")


def _style(scene: Scene, rng: random.Random, world: World) -> QA | None:
    if len(world.styles) < 2 or all(o.concept in SHAPES for o in scene.objects):
        return None
    style = world.style_of(scene)
    question = rng.choice(("What style is this?", "In which style is this drawn?", "What is the style of the picture?"))
    return _qa("style", question, style, f"{style} style", f"in {style} style", f"a {style} style")
