"""Edits with exact targets: a source scene, an instruction in one of several wordings, and the scene that results.

Whatever the instruction does not name stays as it is, to the pixel: ``render.change_mask`` says where changes may be.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from unilip.emoji.art import BACKGROUNDS
from unilip.emoji.captions import WORDS, definite, indefinite
from unilip.emoji.concepts import SHAPES, concept
from unilip.emoji.questions import BESIDE
from unilip.emoji.world import RELATIONS, Obj, Scene, World, overlap, place, relation, sample_background, sample_look
from unilip.errors import DataError

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
    world = world.of_split(split, seen)
    wanted = seen or kind not in COMBINING
    maker = _Maker(world, rng)
    for _ in range(2000):
        with suppress(_Unfit):
            edit: Edit = getattr(maker, kind)()
            fits = edit.source != edit.target and world.seen(edit.source) and world.seen(edit.target) == wanted
            if fits and all(world.allowed(scene, split, "generation") for scene in (edit.source, edit.target)):
                return edit
    raise DataError(f"no edit of kind {kind!r} could be drawn (split {split}, seen={seen}); try another kind")


def sample_joint(world: World, rng: random.Random, split: str = "train") -> tuple[Edit, Scene]:
    """Draw an edit that puts the thing of a second picture, colour unsaid, into the first; and that picture."""
    maker = _Maker(world.of_split(split), rng)
    for _ in range(2000):
        with suppress(_Unfit):
            names, style = maker.names(2), maker.any_style()
            source = maker.lay_out(maker.objects(names[:1], style), horizon=False)
            look = maker.objects(names[1:], style, 0.7)[0]
            other = maker.lay_out([look], horizon=False)
            where = rng.choice(RELATIONS)
            target = maker.put_beside(look, source, where)
            scenes = (source, other, target)
            if all(world.seen(scene) and world.allowed(scene, split, "generation") for scene in scenes):
                thing, beside = definite(look), f"{BESIDE[where]} {definite(source.objects[0])}"
                return Edit(source, rng.choice(WORDS["joint"]).format(thing=thing, beside=beside), target, "add"), other
    raise DataError(f"no edit of two pictures could be drawn in the world {world.name!r}")


def sample_chain(world: World, rng: random.Random, length: int) -> list[Edit]:
    """Draw LENGTH edits, each of what the one before leaves, that never touch one object nor the background."""
    kinds = [kind for kind in ("remove", "replace", "move", "recolour") if kind in world.edits]
    maker = _Maker(world, rng)
    for _ in range(200):
        try:
            scene = maker.scene(2)
        except _Unfit:
            continue
        kept, found = scene.objects[0], list[Edit]()
        for _ in range(50 * length * world.seen(scene)):
            kind = rng.choice(kinds) if len(scene.objects) > 1 else "add"
            with suppress(_Unfit):
                edit: Edit = getattr(maker, kind)(scene)
                if kept in edit.target.objects and edit.target != scene and world.seen(edit.target):
                    found, scene = [*found, edit], edit.target
            if len(found) == length:
                return found
    raise DataError(f"no row of {length} edits could be drawn in the world {world.name!r}; try fewer")


class _Unfit(Exception):
    """What was drawn makes no edit; another try may."""


@dataclass(frozen=True)
class _Maker:
    """Draws edits in a world: a method for each kind, some of which can start from a scene that is given."""

    world: World
    rng: random.Random

    def any_style(self) -> str:
        return self.world.default_style if self.rng.random() < 0.5 else self.rng.choice(self.world.styles)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(self.world.pool("generation"), count)

    def count(self) -> int:
        """Objects in the larger of the two scenes."""
        return 2 if self.world.max_objects == 2 or self.rng.random() < 0.75 else 3

    def objects(self, names: Sequence[str], style: str | None = None, colours: float = 0.3) -> list[Obj]:
        """Draw what NAMES look like, in one style and a share COLOURS of them painted; no places yet."""
        style = style or self.any_style()
        sizes = self.world.sizes(max(2, len(names)))
        looks = (sample_look(self.world, self.rng, name, style, colours) for name in names)
        return [replace(look, size=self.rng.choice(sizes)) for look in looks]

    def lay_out(self, objects: Sequence[Obj], horizon: bool = True, where: str | None = None) -> Scene:
        """Give OBJECTS a background and places; more than two, or one above the other, are in no landscape."""
        if all(obj.concept in SHAPES for obj in objects):
            objects = [replace(obj, style=self.world.default_style) for obj in objects]
        horizon = horizon and len(objects) < 3 and where not in ("above", "below")
        background = sample_background(self.world, self.rng, objects, horizon=horizon)
        placed = place(self.world, self.rng, objects, background, where) if background else None
        if not background or not placed:
            raise _Unfit
        return Scene(background, placed)

    def scene(self, count: int | None = None) -> Scene:
        """Draw a scene of COUNT things, by default of one or two."""
        count = count or (1 if self.rng.random() < 0.5 else 2)
        return self.lay_out(self.objects(self.names(count)))

    def scene_with(self, names: list[str], more: float, style: str | None = None, colours: float = 0.3) -> Scene:
        """Draw a scene of one of NAMES and, in a share MORE, of another thing after it."""
        shown = self.rng.sample(names, 1)
        if self.rng.random() < more:
            shown += self.rng.sample([name for name in self.world.pool("generation") if name not in shown], 1)
        return self.lay_out(self.objects(shown, style, colours))

    def shown_style(self, scene: Scene) -> str:
        """The style that an unnamed new object takes: that of the others, or the default where shapes show none."""
        return next((obj.style for obj in scene.objects if obj.concept not in SHAPES), self.world.default_style)

    def put_beside(self, look: Obj, scene: Scene, where: str) -> Scene:
        """Put another object into SCENE, before the rest, WHERE seen from its first one."""
        across, down = (self.world.positions(look.size, axis=axis) for axis in (0, 1))
        for _ in range(100):
            new = replace(look, x=self.rng.choice(across), y=self.rng.choice(down))
            fits = self.has_room(new, scene, scene.objects) and not self.world.clashes(new, scene.background)
            if fits and relation(new, scene.objects[0]) == where:
                return replace(scene, objects=(new, *scene.objects))
        raise _Unfit

    def has_room(self, obj: Obj, scene: Scene, others: Sequence[Obj]) -> bool:
        near = any(overlap(obj, other, self.world.gap) for other in others)
        return not near and (self.world.grounded(obj) or not self.world.is_horizon(scene.background))

    def add(self, given: Scene | None = None) -> Edit:
        if given is None:
            objects = self.objects(self.names(self.count()))
            where = self.rng.choice(RELATIONS)
            target = self.lay_out(objects, where=where)
        else:
            where = self.rng.choice(RELATIONS)
            names = [n for n in self.world.pool("generation") if n not in {obj.concept for obj in given.objects}]
            look = self.objects([self.rng.choice(names)], self.shown_style(given))[0]
            target = self.put_beside(look, given, where)
        new, *others = target.objects
        source = Scene(target.background, tuple(others))
        words = indefinite(new, self.world, style=self.shown_style(source) != new.style)
        verb = self.rng.choice(("add", "add", "put", "place", "draw"))
        return Edit(source, f"{verb} {words} {BESIDE[where]} {definite(others[0])}", target, "add")

    def remove(self, given: Scene | None = None) -> Edit:
        source = given or self.scene(self.count())
        gone = self.rng.choice(source.objects)
        target = Scene(source.background, tuple(obj for obj in source.objects if obj is not gone))
        words = self.rng.choice(("remove {}", "delete {}", "erase {}", "take {} away")).format(definite(gone))
        return Edit(source, words, target, "remove")

    def replace(self, given: Scene | None = None) -> Edit:
        source = given or self.scene()
        old = self.rng.choice(source.objects)
        name = self.rng.choice(self.world.pool("generation"))
        new = sample_look(self.world, self.rng, name, self.shown_style(source), 0.3)
        new = replace(new, x=old.x, y=old.y, size=old.size)
        if any(new.concept == obj.concept for obj in source.objects) or self.world.clashes(new, source.background):
            raise _Unfit
        pattern = self.rng.choice(("replace {} with {}", "replace {} with {}", "turn {} into {}", "change {} to {}"))
        words = pattern.format(definite(old), indefinite(new, self.world, style=False))
        return Edit(source, words, _swap(source, {old: new}), "replace")

    def move(self, given: Scene | None = None) -> Edit:
        source = given or self.scene()
        if len(source.objects) == 2 and self.rng.random() < 0.5:
            return self.exchange(source)
        obj = self.rng.choice(source.objects)
        where = self.rng.choice(RELATIONS)
        xs, ys = (self.world.positions(obj.size, axis=axis) for axis in (0, 1))
        ends = {"left": (xs[0], obj.y), "above": (obj.x, ys[0]), "right": (xs[-1], obj.y), "below": (obj.x, ys[-1])}
        x, y = ends[where]
        moved = replace(obj, x=x, y=y)
        hardly = abs(x - obj.x) + abs(y - obj.y) < 0.25 * self.world.image_size  # would be seen
        if hardly or not self.has_room(moved, source, [other for other in source.objects if other is not obj]):
            raise _Unfit
        words = f"move {definite(obj)} {self.rng.choice(WORDS['moves'][where])}"
        return Edit(source, words, _swap(source, {obj: moved}), "move")

    def exchange(self, source: Scene) -> Edit:
        """Swap two objects of one size."""
        a, b = source.objects
        if relation(a, b) is None or a.size != b.size:
            raise _Unfit
        target = _swap(source, {a: replace(a, x=b.x, y=b.y), b: replace(b, x=a.x, y=a.y)})
        words = f"{self.rng.choice(('swap', 'exchange'))} {definite(a)} and {definite(b)}"
        return Edit(source, words, target, "move")

    def recolour(self, given: Scene | None = None) -> Edit:
        if given is None:
            style = self.any_style()
            known = (*self.world.pool("generation"), *self.world.guests)
            given = self.scene_with([name for name in known if self.world.colours_of(name, style)], 0.5, style, 0.6)
            obj = given.objects[0]
        else:
            paintable = [obj for obj in given.objects if self.world.colours_of(obj.concept, obj.style)]
            if not paintable:
                raise _Unfit
            obj = self.rng.choice(paintable)
        colour = self.rng.choice(self.world.colours_of(obj.concept, obj.style))
        painted = replace(obj, colour=colour)
        if self.world.looks(obj, colour) or self.world.clashes(painted, given.background):
            raise _Unfit
        words = self.rng.choice(WORDS["paint"]).format(thing=definite(obj), colour=colour)
        return Edit(given, words, _swap(given, {obj: painted}), "recolour")

    def background(self) -> Edit:
        target = self.scene()
        horizon = all(self.world.grounded(obj) for obj in target.objects)
        before = sample_background(self.world, self.rng, target.objects, horizon, other_than=target.background)
        if before is None:
            raise _Unfit
        found = BACKGROUNDS[target.background]
        thing = definite(target.objects[0]) if len(target.objects) == 1 else "everything"
        words = self.rng.choice(WORDS["backgrounds"][found.kind]).format(found, thing)
        return Edit(replace(target, background=before), words, target, "background")

    def style(self) -> Edit:
        source = self.scene()
        if any(obj.concept in SHAPES for obj in source.objects):
            raise _Unfit
        style = self.rng.choice([name for name in self.world.styles if name != source.objects[0].style])
        changes = {obj: replace(obj, style=style) for obj in source.objects}
        for obj in changes.values():
            lost = obj.colour and obj.colour not in self.world.colours_of(obj.concept, style)
            if lost or self.world.clashes(obj, source.background):
                raise _Unfit
        return Edit(source, self.rng.choice(WORDS["restyle"]).format(style=style), _swap(source, changes), "style")

    def skin_tone(self) -> Edit:
        source = self.scene_with([name for name in self.world.pool("generation") if concept(name).toned], 0.3)
        obj = source.objects[0]
        tone = self.rng.choice(self.world.tones)
        words = self.rng.choice(WORDS["skin"]).format(thing=definite(obj), tone=tone)
        return Edit(source, words, _swap(source, {obj: replace(obj, tone=tone)}), "skin_tone")


def _swap(scene: Scene, changes: dict[Obj, Obj]) -> Scene:
    return replace(scene, objects=tuple(changes.get(obj, obj) for obj in scene.objects))
