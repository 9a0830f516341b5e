"""Exact labels for lessons that exist in training alone: what lies on each image token, what each word means.

Goes in: a scene, a text about it. Comes out: class numbers; 0 is "nothing" in every kind.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from unilip.emoji.art import BACKGROUNDS, PAINTS
from unilip.emoji.captions import PLACES, cell, grouped, noun
from unilip.emoji.concepts import concepts
from unilip.emoji.edits import Edit
from unilip.emoji.knowledge import met_riddles
from unilip.emoji.questions import QA
from unilip.emoji.world import EDITS, RELATIONS, Obj, Scene, World, found_relation, relation
from unilip.method.config import TOKEN_PIXELS

UNKNOWN = -100  # what cross entropy leaves out
MARK = ("concept", "colour", "count", "place")  # what a word can tell, in this order
SUMMARY = ("background", "relation", "kind", "gone", "come", "paint", "side")  # what a whole text can tell


@cache
def numbers(kind: str) -> dict[object, int]:
    """Return name -> class number (from 1; None is 0) of a kind of label."""
    kinds: dict[str, Iterable[object]] = {
        "concept": concepts(), "gone": concepts(), "come": concepts(), "colour": PAINTS, "paint": PAINTS,
        "background": BACKGROUNDS, "count": (1, 2, 3, 4), "place": PLACES, "relation": RELATIONS, "kind": EDITS,
        "side": RELATIONS,
    }  # fmt: skip
    return {None: 0, **{name: i + 1 for i, name in enumerate(kinds[kind])}}


def classes(kind: str) -> int:
    """Return how many classes a kind has, "nothing" among them."""
    return len(numbers(kind))


def cells(scene: Scene, world: World) -> np.ndarray:
    """Return (N,3) int64: concept and colour of what covers most, a quarter at least, of each image token; ground."""
    columns, rows = (side // TOKEN_PIXELS for side in world.size)
    found = np.zeros((rows, columns, 3), dtype=np.int64)
    found[..., 2] = numbers("background")[scene.background]
    covered = np.full((rows, columns), TOKEN_PIXELS**2 / 4)
    across, down = (np.arange(count) * TOKEN_PIXELS for count in (columns, rows))
    for obj in scene.objects:
        left, top, right, bottom = obj.box
        width = (np.minimum(right, across + TOKEN_PIXELS) - np.maximum(left, across)).clip(0)
        height = (np.minimum(bottom, down + TOKEN_PIXELS) - np.maximum(top, down)).clip(0)
        area = height[:, None] * width
        most = area >= covered
        found[most, 0], found[most, 1] = numbers("concept")[obj.concept], numbers("colour")[obj.colour]
        covered = np.where(most, area, covered)
    return found.reshape(-1, 3)


@dataclass(frozen=True)
class Lesson:
    """What a text says: `marks` pair the end of a word (a character) with labels in the order of MARK; UNKNOWN: unsaid.

    `summary` has the labels of the whole in the order of SUMMARY, `present` the class numbers of a caption's concepts.
    """

    marks: tuple[tuple[int, tuple[int, ...]], ...]
    summary: tuple[int, ...]
    present: tuple[int, ...]


def of_caption(text: str, scene: Scene, world: World) -> Lesson:
    """Return what a caption of SCENE says, however it is written; of a riddle, what it means."""
    groups = grouped(scene.objects)
    phrases = {noun(obj, world, plural=count > 1): _labels(obj, count) for obj, count in groups}
    if len(groups) == 1:
        obj, count = groups[0]
        phrases |= {riddle.removeprefix("the "): _labels(obj, count) for riddle in met_riddles(world, obj.concept)}
    found = _find(text, phrases)
    marks = [(end, labels) for end, _, labels in found]
    where = {words: place for place, forms in PLACES.items() for words in forms}
    here = {cell(obj, world): obj for obj in scene.objects}
    for end, words, _ in _find(text, dict.fromkeys(where, ())):
        if where[words] in here:
            marks.append((end, (*_labels(here[where[words]], 1)[:2], UNKNOWN, numbers("place")[where[words]])))
    said: dict[str, str | None] = {"background": scene.background}
    if len(found) == 2 and len(scene.objects) == 2:
        first, second = (next(o for o in scene.objects if _labels(o, 1) == labels) for _, _, labels in sorted(found))
        said["relation"] = relation(first, second)
    present = tuple(sorted({numbers("concept")[obj.concept] for obj in scene.objects}))
    return Lesson(tuple(marks), _summary(**said), present)


def of_edit(edit: Edit, text: str, world: World) -> Lesson:
    """Return what an instruction says, however it is written: its words, what it takes away and what it brings."""
    source, target = edit.source.objects, edit.target.objects
    gone = [obj for obj in source if obj not in target]
    come = [obj for obj in target if obj not in source]
    phrases = {obj.concept: (numbers("concept")[obj.concept], *[UNKNOWN] * 3) for obj in (*source, *target)}
    phrases |= {noun(obj, world): _labels(obj, 1) for obj in come}
    marks = tuple((end, labels) for end, _, labels in _find(text, phrases))
    said: dict[str, str | None] = {"kind": edit.kind, "side": None}
    if edit.kind == "add":
        said["side"] = relation(come[0], source[0])  # beside the first that was there before
    elif edit.kind == "move" and len(come) == 1:
        said["side"] = found_relation(come[0], gone[0])
    if len(come) <= 1:
        said |= {"gone": gone[0].concept if gone else None, "come": come[0].concept if come else None}
    if edit.kind == "background":
        said["background"] = edit.target.background
    elif edit.kind in ("add", "replace", "recolour"):
        said["paint"] = come[0].colour
    return Lesson(marks, _summary(**said), ())


def of_question(qa: QA, scene: Scene, world: World) -> tuple[tuple[int, int, int, np.ndarray], ...]:
    """Return where in the picture it lies what a question speaks of: (end, concept, colour, image tokens (N,) bool).

    One for each name of a thing or a paint; and what it is about at its end, without concept and colour.
    """
    asked: list[tuple[int, int, int, list[Obj]]] = []
    if qa.about is not None:
        for found in _names().finditer(qa.question):
            name = _named().get(found[0].lower(), found[0].lower())
            kinds = (numbers("concept").get(name, 0), numbers("colour").get(name, 0))
            asked.append((found.end(), *kinds, [obj for obj in scene.objects if name in (obj.concept, obj.colour)]))
        asked.append((len(qa.question), 0, 0, list(qa.about)))
    return tuple(
        (end, concept, colour, cells(Scene(scene.background, tuple(objs)), world)[:, 0] > 0)
        for end, concept, colour, objs in asked
    )


@cache
def _named() -> dict[str, str]:
    """Return concepts by what they are called, of one and of many."""
    return {words.lower(): name for name, c in concepts().items() for words in (c.plural, name)}


@cache
def _names() -> re.Pattern[str]:
    longest = sorted((*_named(), *PAINTS), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)


def _labels(obj: Obj, count: int) -> tuple[int, ...]:
    return numbers("concept")[obj.concept], numbers("colour")[obj.colour], numbers("count")[count], UNKNOWN


def _summary(**known: str | None) -> tuple[int, ...]:
    return tuple(numbers(name)[known[name]] if name in known else UNKNOWN for name in SUMMARY)


def _find(text: str, phrases: dict[str, tuple[int, ...]]) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return (end, phrase, labels) of each phrase's first occurrence, the longest first, in any case and spacing."""
    found = []
    for phrase in sorted(phrases, key=len, reverse=True):
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)"
        if match := re.search(pattern, text, re.IGNORECASE):
            found.append((match.end(), phrase, phrases[phrase]))
            text = f"{text[: match.start()]}{chr(0) * (match.end() - match.start())}{text[match.end() :]}"
    return found
