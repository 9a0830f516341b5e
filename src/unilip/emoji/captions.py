"""Scene -> words: noun phrases with the right article and plural, captions in several wordings, one canonical form.

What a caption leaves out is at its default (white background, flat style, the art's own colour), so words determine the
picture up to sizes, and up to places unless they are said too.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.concepts import concept
from unilip.emoji.world import INVERSE, Obj, Scene, World, reading_order, relation, third
from unilip.files import read_table

WORDS: dict[str, Any] = read_table("unilip.emoji", "words.json")
NUMBERS: list[str] = WORDS["numbers"]
RELATION_WORDS: dict[str, list[str]] = WORDS["relations"]
PLAN = "Place: "  # asks the language model to write a caption out, with all places
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
# where an object is, by its row and column; the first wording is the canonical one
PLACES = {(row, column): tuple(WORDS["places"][f"{row} {column}"]) for row in ROWS for column in COLUMNS}
OPENINGS: tuple[str, ...] = tuple(WORDS["openings"])


def with_article(words: str) -> str:
    """Put "a" or "an" in front of WORDS, by their first sound."""
    start = words.lower()
    vowel = start[:1] in ("a", "e", "i", "o", "u") and not start.startswith(("uni", "use", "eu", "one"))
    return f"{'an' if vowel or start.startswith(('hour', 'honest')) else 'a'} {words}"


def noun(obj: Obj, world: World, plural: bool = False, style: bool = True) -> str:
    """Return concept with style, colour and tone, but no article: "glossy red car", "pairs of red socks"."""
    name = concept(obj.concept).plural if plural else obj.concept
    if obj.colour:
        name = re.sub("^(pairs? of )?", rf"\g<1>{obj.colour} ", name)
    if style and obj.style != world.default_style:
        name = f"{obj.style} {name}"
    return f"{name} with {obj.tone} skin" if obj.tone else name


def indefinite(obj: Obj, world: World, style: bool = True) -> str:
    """Return "a red car", "broccoli": what a caption calls one object."""
    words = noun(obj, world, style=style)
    return with_article(words) if concept(obj.concept).countable else words


def definite(obj: Obj) -> str:
    """Return "the car"."""
    return obj.concept if obj.concept == "santa claus" else f"the {obj.concept}"


def counted(obj: Obj, count: int, world: World, style: bool = True) -> str:
    """Return "three yellow stars", or "a yellow star" for one."""
    if count == 1:
        return indefinite(obj, world, style)
    return f"{NUMBERS[count]} {noun(obj, world, plural=True, style=style)}"


def listed(parts: Sequence[str]) -> str:
    """Join with commas and "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def grouped(objects: Sequence[Obj]) -> list[tuple[Obj, int]]:
    """Return each distinct look with how often it occurs, in order of first occurrence."""
    counts = Counter(obj.look for obj in objects)
    return [(next(obj for obj in objects if obj.look == look), count) for look, count in counts.items()]


def cell(obj: Obj, world: World) -> tuple[str, str]:
    """Return row and column of OBJ among the nine places of a picture."""
    x, y = (third(middle, side) for middle, side in zip(obj.centre, world.size, strict=True))
    return ROWS[y], COLUMNS[x]


def place_words(obj: Obj, world: World, rng: random.Random | None = None) -> str:
    """Return "in the top left corner"; the canonical wording without RNG."""
    forms = PLACES[cell(obj, world)]
    return forms[0] if rng is None or rng.random() < 0.6 else rng.choice(forms)


def placed(scene: Scene, world: World, rng: random.Random | None = None, style: bool = True) -> str:
    """List the objects with their places, without the background: in reading order and canonical words without RNG."""
    objects = list(reading_order(scene))
    if rng is not None:
        rng.shuffle(objects)
    parts = []
    for first, count in grouped(objects):
        where = [place_words(obj, world, rng) for obj in objects if obj.look == first.look]
        words = counted(first, count, world, style)
        parts.append(f"{where[0]} {words}" if count == 1 and rng and rng.random() < 0.1 else f"{words} {listed(where)}")
    return listed(parts)


def canonical(scene: Scene, task: str, world: World, background: bool | None = None) -> str:
    """Return the caption that evaluation uses; BACKGROUND: whether it is named (None: unless it is the default one)."""
    objects = reading_order(scene)
    words = listed([counted(obj, count, world) for obj, count in grouped(objects)])
    if task == "position" and len(objects) == 2 and (where := relation(objects[0], objects[1])):
        one, other = (indefinite(obj, world) for obj in objects)
        if where in ("below", "right"):
            one, other, where = other, one, INVERSE[where]
        words = f"{one} {RELATION_WORDS[where][0]} {other}"
    if background or (background is None and scene.background != world.default_background):
        words = f"{words} {BACKGROUNDS[scene.background].phrases[0]}"
    return words


def plan(scene: Scene, world: World) -> str:
    """Return the one caption that says everything: every object with its place, and the background."""
    return f"{placed(scene, world)} {BACKGROUNDS[scene.background].phrases[0]}"


def caption(scene: Scene, task: str, rng: random.Random, world: World, where: bool = False) -> str:
    """Describe SCENE in one of several wordings, in lower case and without a full stop; WHERE says all places."""
    style = world.style_of(scene)
    # the style is said once for the scene, or on every object that has it
    once = style != world.default_style and rng.random() < 0.5
    objects = list(scene.objects)
    rng.shuffle(objects)
    place = background_words(scene, rng, world)
    if where:
        body = placed(scene, world, rng, not once)
    elif task == "position" and len(objects) == 2 and (side := relation(objects[0], objects[1])):
        one, other = (indefinite(obj, world, not once) for obj in objects)
        body = f"{one} {rng.choice(RELATION_WORDS[side])} {other}"
    else:
        join = rng.choice((" and ", " and ", " next to ", " with ")) if len(grouped(objects)) == 2 else ""
        parts = [counted(obj, count, world, not once) for obj, count in grouped(objects)]
        body = join.join(parts) if join else listed(parts)
    if place and rng.random() < 0.12:
        words = f"{place}, {body}"
    else:
        words = f"{rng.choice(OPENINGS)}{body}{' ' + place if place else ''}"
    if once:
        words = f"{words}, {rng.choice((f'in {style} style', f'{style} style', f'drawn in a {style} style'))}"
    return words


def background_words(scene: Scene, rng: random.Random, world: World) -> str:
    """Return "on a yellow background" in some wording, or "" where the default background may stay unsaid."""
    if scene.background == world.default_background and rng.random() < 0.8:
        return ""
    phrases = BACKGROUNDS[scene.background].phrases
    return phrases[0] if rng.random() < 0.6 else rng.choice(phrases)


def as_written(text: str, rng: random.Random, wish: bool = True) -> str:
    """Give TEXT forms in which people type it; only a WISH, which names what to draw, gets "draw" before it."""
    body = re.sub("^(a|an|the) ", "", text) if wish and rng.random() < 0.3 else text
    form = rng.random()
    if not wish:
        body = f"{rng.choice(('please', 'can you', 'now'))} {body}" if form < 0.25 else body
    elif form < 0.25:
        body = f"{rng.choice(('draw', 'draw me', 'please draw', 'paint', 'show me', 'create', 'make'))} {body}"
    elif form < 0.4:
        opening = rng.choice(("a picture of", "an image of", "picture of", "draw a picture of", "i want"))
        body = body if body.startswith(OPENINGS[4:]) else f"{opening} {body}"
    if rng.random() < 0.15:
        body += rng.choice((" please", ", please", " thanks"))
    body += rng.choice(("", "", ".", ".", "!", " ."))
    case = rng.random()
    body = body[:1].upper() + body[1:] if case < 0.4 else body.upper() if case < 0.5 else body
    if rng.random() < 0.15:
        at = [i for i, letter in enumerate(body) if letter == " "]
        body = f"{body[: (cut := rng.choice(at))]} {body[cut:]}" if at else body
    if rng.random() < 0.1:
        body = rng.choice((f"“{body}”", f'"{body}"', f"‘{body}’"))
    return body
