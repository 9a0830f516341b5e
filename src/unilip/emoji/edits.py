"""Edits with exact targets: a source scene, an instruction in one of several wordings, and the scene that results.

Whatever the instruction does not name stays as it is, to the pixel: ``render.change_mask`` says where changes may be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from unilip.data.errors import DataError
from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.captions import WORDS, definite, indefinite
from unilip.emoji.concepts import SHAPES, concept
from unilip.emoji.questions import BESIDE
from unilip.emoji.world import (
    EDITS,
    RELATIONS,
    Obj,
    Scene,
    World,
    overlap,
    place,
    relation,
    sample_background,
    sample_look,
)

COMBINING = ("add", "replace", "recolour")  # kinds whose target can be a combination that the source is not


@dataclass(frozen=True)
class Edit:
    """SOURCE becomes TARGET when INSTRUCTION (a sentence without its full stop) is followed."""

    source: Scene
    instruction: str
    target: Scene
    kind: str


def sample_edit(world: World, rng: random.Random, kind: str, split: str = "train", seen: bool = True) -> Edit:
    """Draw an edit of KIND whose scenes SPLIT allows to generate; SEEN false: its target is a held-out combination.

    Raises DataError: WORLD has no such kind, or SEEN is false in training.
    """
    if kind not in world.edits:
        raise DataError(f"world {world.name!r} has no edit {kind!r}; allowed are {', '.join(world.edits)}")
    if split == "train" and not seen:
        raise DataError("seen=False was given for the training split; only split='val' may hold unseen combinations")
    wanted = seen or kind not in COMBINING
    if split == "train":
        world = world.training
    for _ in range(2000):
        try:
            edit = _MAKERS[kind](world, rng)
        except _Unfit:
            continue
        fits = edit.source != edit.target and world.seen(edit.source) and world.seen(edit.target) == wanted
        if fits and all(world.allowed(scene, split, "generation") for scene in (edit.source, edit.target)):
            return edit
    raise DataError(f"no edit of kind {kind!r} could be drawn (split {split}, seen={seen}); try another kind")


def sample_joint(world: World, rng: random.Random, split: str = "train") -> tuple[Edit, Scene]:
    """Draw an edit that puts the thing of a second picture, colour unsaid, into the first; and that picture."""
    if split == "train":
        world = world.training
    for _ in range(2000):
        try:
            names, style = _names(world, rng, 2), _style(world, rng)
            source = _lay_out(world, rng, _objects(world, rng, names[:1], style), horizon=False)
            look = _objects(world, rng, names[1:], style, 0.7)[0]
            other = _lay_out(world, rng, [look], horizon=False)
            where = rng.choice(RELATIONS)
            target = _put_beside(world, rng, look, source, where)
        except _Unfit:
            continue
        if all(world.seen(scene) and world.allowed(scene, split, "generation") for scene in (source, other, target)):
            thing, beside = definite(look), f"{BESIDE[where]} {definite(source.objects[0])}"
            return Edit(source, rng.choice(WORDS["joint"]).format(thing=thing, beside=beside), target, "add"), other
    raise DataError(f"no edit of two pictures could be drawn in the world {world.name!r}")


def sample_chain(world: World, rng: random.Random, length: int) -> list[Edit]:
    """Draw LENGTH edits, each of what the one before leaves, that never touch one object nor the background."""
    kinds = [kind for kind in ("remove", "replace", "move", "recolour") if kind in world.edits]
    for _ in range(200):
        try:
            names = _names(world, rng, 2)
            scene = _lay_out(world, rng, _objects(world, rng, names, _style(world, rng)))
        except _Unfit:
            continue
        kept, found = scene.objects[0], list[Edit]()
        for _ in range(50 * length * world.seen(scene)):
            kind = rng.choice(kinds) if len(scene.objects) > 1 else "add"
            try:
                edit = _MAKERS[kind](world, rng, scene)
            except _Unfit:
                continue
            if kept in edit.target.objects and edit.target != scene and world.seen(edit.target):
                found, scene = [*found, edit], edit.target
            if len(found) == length:
                return found
    raise DataError(f"no row of {length} edits could be drawn in the world {world.name!r}; try fewer")


class _Unfit(Exception):
    """What was drawn makes no edit; another try may."""


def _style(world: World, rng: random.Random) -> str:
    return world.default_style if rng.random() < 0.5 else rng.choice(world.styles)


def _objects(world: World, rng: random.Random, names: Sequence[str], style: str, colours: float = 0.3) -> list[Obj]:
    sizes = world.sizes(max(2, len(names)))
    return [replace(sample_look(world, rng, name, style, colours), size=rng.choice(sizes)) for name in names]


def _lay_out(
    world: World, rng: random.Random, objects: Sequence[Obj], horizon: bool = True, where: str | None = None
) -> Scene:
    if all(obj.concept in SHAPES for obj in objects):
        objects = [replace(obj, style=world.default_style) for obj in objects]
    background = sample_background(world, rng, objects, horizon=horizon and where not in ("above", "below"))
    placed = place(world, rng, objects, background, where) if background else None
    if not background or not placed:
        raise _Unfit
    return Scene(background, placed)


def _names(world: World, rng: random.Random, count: int, pool: Sequence[str] | None = None) -> list[str]:
    return rng.sample(list(pool if pool is not None else world.pool("generation")), count)


def _count(world: World, rng: random.Random) -> int:
    """Objects in the larger of the two scenes."""
    return 2 if world.max_objects == 2 or rng.random() < 0.75 else 3


def _scene(world: World, rng: random.Random) -> Scene:
    count = 1 if rng.random() < 0.5 else 2
    return _lay_out(world, rng, _objects(world, rng, _names(world, rng, count), _style(world, rng)))


def _add(world: World, rng: random.Random, given: Scene | None = None) -> Edit:
    if given is None:
        count = _count(world, rng)
        objects = _objects(world, rng, _names(world, rng, count), _style(world, rng))
        where = rng.choice(RELATIONS)
        target = _lay_out(world, rng, objects, horizon=count == 2, where=where)
    else:
        where = rng.choice(RELATIONS)
        names = [n for n in world.pool("generation") if n not in {obj.concept for obj in given.objects}]
        look = sample_look(world, rng, rng.choice(names), _shown_style(world, given), 0.3)
        look = replace(look, size=rng.choice(world.sizes(len(given.objects) + 1)))
        target = _put_beside(world, rng, look, given, where)
    new, anchor = target.objects[0], target.objects[1]
    source = Scene(target.background, target.objects[1:])
    words = indefinite(new, world, style=_shown_style(world, source) != new.style)
    verb = rng.choice(("add", "add", "put", "place", "draw"))
    return Edit(source, f"{verb} {words} {BESIDE[where]} {definite(anchor)}", target, "add")


def _put_beside(world: World, rng: random.Random, look: Obj, scene: Scene, where: str) -> Scene:
    """Put another object into SCENE, before the rest, WHERE seen from its first one."""
    across, down = (world.positions(look.size, axis=axis) for axis in (0, 1))
    for _ in range(100):
        new = replace(look, x=rng.choice(across), y=rng.choice(down))
        near = any(overlap(new, other, world.gap) for other in scene.objects)
        flying = world.is_horizon(scene.background) and not world.grounded(new)
        if not (near or flying or world.clashes(new, scene.background)) and relation(new, scene.objects[0]) == where:
            return replace(scene, objects=(new, *scene.objects))
    raise _Unfit


def _shown_style(world: World, scene: Scene) -> str:
    """The style that an unnamed new object takes: that of the others, or the default where shapes show none."""
    return next((obj.style for obj in scene.objects if obj.concept not in SHAPES), world.default_style)


def _remove(world: World, rng: random.Random, given: Scene | None = None) -> Edit:
    count = _count(world, rng) if given is None else 0
    names = _names(world, rng, count)
    source = given or _lay_out(world, rng, _objects(world, rng, names, _style(world, rng)), horizon=count == 2)
    gone = rng.choice(source.objects)
    target = Scene(source.background, tuple(obj for obj in source.objects if obj is not gone))
    words = rng.choice(("remove {}", "delete {}", "erase {}", "take {} away")).format(definite(gone))
    return Edit(source, words, target, "remove")


def _replace(world: World, rng: random.Random, given: Scene | None = None) -> Edit:
    source = given or _scene(world, rng)
    old = rng.choice(source.objects)
    style = _shown_style(world, source)
    new = sample_look(world, rng, rng.choice(world.pool("generation")), style, 0.3)
    new = replace(new, x=old.x, y=old.y, size=old.size)
    if any(new.concept == obj.concept for obj in source.objects) or world.clashes(new, source.background):
        raise _Unfit
    pattern = rng.choice(("replace {} with {}", "replace {} with {}", "turn {} into {}", "change {} to {}"))
    words = pattern.format(definite(old), indefinite(new, world, style=False))
    return Edit(source, words, _swap(source, {old: new}), "replace")


def _swap(scene: Scene, changes: dict[Obj, Obj]) -> Scene:
    return replace(scene, objects=tuple(changes.get(obj, obj) for obj in scene.objects))


def _move(world: World, rng: random.Random, given: Scene | None = None) -> Edit:
    source = given or _scene(world, rng)
    if len(source.objects) == 2 and rng.random() < 0.5:
        return _exchange(world, rng, source)
    obj = rng.choice(source.objects)
    where = rng.choice(RELATIONS)
    xs, ys = (world.positions(obj.size, axis=axis) for axis in (0, 1))
    ends = {"left": (xs[0], obj.y), "above": (obj.x, ys[0]), "right": (xs[-1], obj.y), "below": (obj.x, ys[-1])}
    x, y = ends[where]
    moved = replace(obj, x=x, y=y)
    hardly = abs(x - obj.x) + abs(y - obj.y) < 0.25 * world.image_size  # would be seen
    near = any(overlap(moved, other, world.gap) for other in source.objects if other is not obj)
    if hardly or near or (world.is_horizon(source.background) and not world.grounded(moved)):
        raise _Unfit
    words = f"move {definite(obj)} {rng.choice(WORDS['moves'][where])}"
    return Edit(source, words, _swap(source, {obj: moved}), "move")


def _exchange(world: World, rng: random.Random, source: Scene) -> Edit:
    """Swap two objects of one size."""
    a, b = source.objects
    where = relation(a, b)
    if where is None or a.size != b.size:
        raise _Unfit
    target = _swap(source, {a: replace(a, x=b.x, y=b.y), b: replace(b, x=a.x, y=a.y)})
    words = f"{rng.choice(('swap', 'exchange'))} {definite(a)} and {definite(b)}"
    return Edit(source, words, target, "move")


def _recolour(world: World, rng: random.Random, given: Scene | None = None) -> Edit:
    if given is not None:
        found = [obj for obj in given.objects if world.colours_of(obj.concept, obj.style)]
        return _painted(world, rng, given, rng.choice(found) if found else given.objects[0])
    style = _style(world, rng)
    pool = world.pool("generation")
    paintable = [name for name in (*pool, *world.guests) if world.colours_of(name, style)]
    names = _names(world, rng, 1, paintable)
    if rng.random() < 0.5:
        names += _names(world, rng, 1, [name for name in pool if name not in names])
    source = _lay_out(world, rng, _objects(world, rng, names, style, 0.6))
    return _painted(world, rng, source, next(o for o in source.objects if o.concept == names[0]))


def _painted(world: World, rng: random.Random, source: Scene, obj: Obj) -> Edit:
    colours = world.colours_of(obj.concept, obj.style)
    if not colours:
        raise _Unfit
    colour = rng.choice(colours)
    painted = replace(obj, colour=colour)
    if world.looks(obj, colour) or world.clashes(painted, source.background):
        raise _Unfit
    words = rng.choice(WORDS["paint"]).format(thing=definite(obj), colour=colour)
    return Edit(source, words, _swap(source, {obj: painted}), "recolour")


def _background(world: World, rng: random.Random) -> Edit:
    target = _scene(world, rng)
    horizon = all(world.grounded(obj) for obj in target.objects)
    before = sample_background(world, rng, target.objects, horizon=horizon, other_than=target.background)
    if before is None:
        raise _Unfit
    found = BACKGROUNDS[target.background]
    thing = definite(target.objects[0]) if len(target.objects) == 1 else "everything"
    words = rng.choice(WORDS["backgrounds"][found.kind]).format(found, thing)
    return Edit(replace(target, background=before), words, target, "background")


def _restyle(world: World, rng: random.Random) -> Edit:
    source = _scene(world, rng)
    if any(obj.concept in SHAPES for obj in source.objects):
        raise _Unfit
    style = rng.choice([name for name in world.styles if name != source.objects[0].style])
    changes = {obj: replace(obj, style=style) for obj in source.objects}
    for obj in changes.values():
        lost = obj.colour and obj.colour not in world.colours_of(obj.concept, style)
        if lost or world.clashes(obj, source.background):
            raise _Unfit
    return Edit(source, rng.choice(WORDS["restyle"]).format(style=style), _swap(source, changes), "style")


def _skin_tone(world: World, rng: random.Random) -> Edit:
    pool = world.pool("generation")
    names = _names(world, rng, 1, [name for name in pool if concept(name).toned])
    if rng.random() < 0.3:
        names += _names(world, rng, 1, [name for name in pool if name not in names])
    source = _lay_out(world, rng, _objects(world, rng, names, _style(world, rng)))
    obj = next(o for o in source.objects if o.concept == names[0])
    tone = rng.choice(world.tones)
    words = rng.choice(WORDS["skin"]).format(thing=definite(obj), tone=tone)
    return Edit(source, words, _swap(source, {obj: replace(obj, tone=tone)}), "skin_tone")


_MAKERS: dict[str, Callable[..., Edit]] = dict(
    zip(EDITS, (_add, _remove, _replace, _move, _recolour, _background, _restyle, _skin_tone), strict=True)
)
