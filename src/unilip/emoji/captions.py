"""Scene -> words: noun phrases with the right article and plural, captions in several wordings, one canonical form.

What a caption leaves out is at its default (white background, flat style, the art's own colour), so that words
determine the picture up to places and sizes. Places are said only where the task is about them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.concepts import concept
from unilip.emoji.world import INVERSE, Obj, Scene, World, reading_order, relation

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATION_WORDS = {
    "left": ("to the left of", "on the left of"),
    "right": ("to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ")


# ---------------------------------------------------------------------------------------------- noun phrases


def with_article(words: str) -> str:
    """Put "a" or "an" in front of WORDS, by their first sound."""
    return f"{'an' if _vowel(words) else 'a'} {words}"


def _vowel(words: str) -> bool:
    start = words.lower()
    return start.startswith(("hour", "honest")) or (
        start[:1] in ("a", "e", "i", "o", "u") and not start.startswith(("uni", "use", "eu", "one"))
    )


def noun(obj: Obj, world: World, plural: bool = False, style: bool = True) -> str:
    """Return concept with style, colour and tone, but no article: "glossy red car", "pairs of red socks"."""
    name = concept(obj.concept).plural if plural else obj.concept
    if obj.colour:
        for pair in ("pair of ", "pairs of "):
            if name.startswith(pair):
                name = f"{pair}{obj.colour} {name.removeprefix(pair)}"
                break
        else:
            name = f"{obj.colour} {name}"
    if style and obj.style != world.default_style:
        name = f"{obj.style} {name}"
    return f"{name} with {obj.tone} skin" if obj.tone else name


def indefinite(obj: Obj, world: World, style: bool = True) -> str:
    """Return "a red car", "broccoli": what a caption calls one object."""
    words = noun(obj, world, style=style)
    return with_article(words) if concept(obj.concept).countable else words


def definite(obj: Obj, world: World, scene: Scene | None = None) -> str:
    """Return "the car"; with colour or tone where SCENE holds another object of that concept."""
    twins = scene is not None and sum(other.concept == obj.concept for other in scene.objects) > 1
    name = noun(obj, world, style=False) if twins else obj.concept
    return name if obj.concept == "santa claus" else f"the {name}"


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
    counts: dict[tuple[str, str | None, str | None], tuple[Obj, int]] = {}
    for obj in objects:
        first, count = counts.get(obj.look, (obj, 0))
        counts[obj.look] = (first, count + 1)
    return list(counts.values())


# ---------------------------------------------------------------------------------------------- captions


def scene_style(scene: Scene, world: World) -> str:
    """Return the style of a scene: the one that is not the default, if any."""
    return next((obj.style for obj in scene.objects if obj.style != world.default_style), world.default_style)


def canonical(scene: Scene, task: str, world: World, background: bool | None = None) -> str:
    """Return the one caption that evaluation uses: left to right, first wordings.

    BACKGROUND says whether the background is named; None names it unless it is the default one.
    """
    objects = reading_order(scene)
    if task == "position" and len(objects) == 2:
        where = relation(objects[0], objects[1])
        if where in ("below", "right"):
            objects, where = (objects[1], objects[0]), INVERSE[where]
        subject = indefinite(objects[0], world)
        words = f"{subject} {RELATION_WORDS[where][0]} {indefinite(objects[1], world)}" if where else ""
    else:
        words = ""
    if not words:
        words = listed([counted(obj, count, world) for obj, count in grouped(objects)])
    if background or (background is None and scene.background != world.default_background):
        words = f"{words} {BACKGROUNDS[scene.background].phrases[0]}"
    return words


def caption(scene: Scene, task: str, rng: random.Random, world: World) -> str:
    """Describe SCENE in one of several wordings, in lower case and without a full stop."""
    style = scene_style(scene, world)
    # the style is said once for the scene, or on every object that has it
    once = style != world.default_style and rng.random() < 0.5
    objects = list(scene.objects)
    rng.shuffle(objects)
    place = background_words(scene, rng, world)
    if task == "position" and len(objects) == 2:
        where = relation(objects[0], objects[1])
        body = (
            _position(objects[0], objects[1], where, rng, world, not once)
            if where
            else listed([indefinite(obj, world, not once) for obj in objects])
        )
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


def _position(a: Obj, b: Obj, where: str, rng: random.Random, world: World, style: bool) -> str:
    first, second = indefinite(a, world, style), indefinite(b, world, style)
    if rng.random() < 0.7:
        return f"{first} {rng.choice(RELATION_WORDS[where])} {second}"
    if where in ("left", "right"):
        return f"{first} on the {where} and {second} on the {INVERSE[where]}"
    sides = ("top", "bottom") if where == "above" else ("bottom", "top")
    return f"{first} at the {sides[0]} and {second} at the {sides[1]}"


def background_words(scene: Scene, rng: random.Random, world: World) -> str:
    """Return "on a yellow background" in some wording, or "" where the default background may stay unsaid."""
    if scene.background == world.default_background and rng.random() < 0.8:
        return ""
    phrases = BACKGROUNDS[scene.background].phrases
    return phrases[0] if rng.random() < 0.6 else rng.choice(phrases)
