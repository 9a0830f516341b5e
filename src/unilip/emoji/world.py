"""The emoji world: which things, colours, styles, sizes and places exist, what is held out, and scenes drawn from it.

Scenes have exact ground truth: boxes in pixels, x to the right, y down, from the top left corner.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

from unilip.emoji.art import BACKGROUNDS, HORIZON, HUES, PAINTS, PALETTE, STYLES
from unilip.emoji.concepts import SHAPES, TONES, concept, concepts, measured
from unilip.errors import DataError, check_choice
from unilip.files import read_table, stable_fraction, stable_hash
from unilip.method.config import TOKEN_PIXELS
from unilip.shapes import Size

if TYPE_CHECKING:
    from unilip.emoji.judge import Found

TASKS = ("single", "two", "counting", "colour", "position", "colour_attr")
TRAINED = (*TASKS, "two", "position", "colour_attr")  # how often training meets each
COMPOSITIONAL = ("two", "colour", "position", "colour_attr")
EDITS = ("add", "remove", "replace", "move", "recolour", "background", "style", "skin_tone")
PURPOSES = ("tokenizer", "understanding", "generation")
SPLITS = ("train", "val")
RELATIONS = ("left", "right", "above", "below")
GUESTS = 0.2  # share of the scenes to look at in which guests may be
STRANGERS = 0.75  # share of the scenes to reconstruct that are of nothing else
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}

KNOWN: dict[str, Any] = read_table("unilip.emoji", "worlds.json")


@dataclass(frozen=True)
class Obj:
    """One drawn object: a square box of SIZE pixels with its top left corner at (x, y); without them, how it looks."""

    concept: str
    style: str
    colour: str | None
    tone: str | None
    x: int = 0
    y: int = 0
    size: int = 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def look(self) -> tuple[str, str | None, str | None]:
        """What a caption can say of the object alone: concept, colour, tone."""
        return self.concept, self.colour, self.tone


@dataclass(frozen=True)
class Scene:
    """A background by name and the objects on it, none overlapping."""

    background: str
    objects: tuple[Obj, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Scene:
        return cls(record["background"], tuple(Obj(**entry) for entry in record["objects"]))


@dataclass(frozen=True)
class World:
    """What exists, how large it is drawn, and what is held out. All sizes in pixels.

    ``concepts`` are in use, ``extra`` in no training; ``recolourable`` names the styles in which a concept takes a
    colour. Training has more (``training``): ``hues`` between the ``colours``, ``paint`` that takes colour too,
    ``guests`` that are seen and recoloured, ``strangers`` that are only reconstructed. Corners lie on a lattice of
    ``grid`` pixels around the centred position, of a single object at most ``single_shift`` from the middle (None:
    anywhere). In a ``shape`` other than the square the lattice goes on from the top left corner; of a coarse one a line
    stays to each third of a side.
    """

    name: str
    image_size: int
    concepts: tuple[str, ...]
    extra: tuple[str, ...]
    generation_held_out: tuple[str, ...]
    styles: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    recolourable: dict[str, frozenset[str]]
    single_sizes: tuple[int, ...]
    multi_sizes: tuple[int, ...]
    edits: tuple[str, ...]
    tones: tuple[str, ...] = ()
    hues: tuple[str, ...] = ()
    paint: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    max_objects: int = 2
    max_count: int = 4
    grid: int = 1
    gap: int = 6
    margin: int = 2
    single_shift: int | None = None
    default_background: str = "white"
    default_style: str = "flat"
    shape: Size | None = None

    def __post_init__(self) -> None:
        known = concepts()
        for field, given, allowed in (
            ("concepts", (*self.concepts, *self.extra, *self.generation_held_out, *self.recolourable), known),
            ("guests", (*self.guests, *self.paint, *self.strangers), known),
            ("styles", (*self.styles, self.default_style), STYLES),
            ("colours", (*self.colours, *self.hues), PAINTS),
            ("backgrounds", (*self.backgrounds, self.default_background), BACKGROUNDS),
            ("tones", self.tones, TONES),
            ("edits", self.edits, EDITS),
        ):
            if wrong := [entry for entry in given if entry not in allowed]:
                raise DataError(f"World.{field} names {wrong[0]!r}, which does not exist; use {', '.join(allowed)}")
        largest = max(*self.single_sizes, *self.multi_sizes)
        room = min(self.size) - 2 * self.margin
        if largest > room:
            raise DataError(
                f"World sizes go up to {largest} pixels, but a picture of {self.size[0]}x{self.size[1]} less twice the "
                f"margin {self.margin} leaves {room}; use smaller sizes"
            )
        if set(self.concepts) & set(self.extra):
            raise DataError("World.extra must not repeat concepts; extra is what no training ever sees")
        if {*self.guests, *self.strangers} & {*self.concepts, *self.extra} or not set(self.paint) <= set(self.concepts):
            raise DataError(
                "World.guests and World.strangers must be neither among concepts nor among extra, World.paint among "
                "concepts"
            )

    @classmethod
    def preset(cls, name: str) -> World:
        """Return the world called NAME; raises DataError, naming them all, where there is none."""
        check_choice("world", name, ("nano", "pico", "tiny"), DataError)
        world: World = getattr(cls, name)()
        return world

    @classmethod
    @cache
    def nano(cls) -> World:
        """224 pixels, three styles, all concepts. The art's own coloured hearts and shapes give way to ours."""
        drawable = [name for name in concepts() if name.split()[-1] not in SHAPES or name == "broken heart"]
        # what pico knows stays in use here, so that one example prompt serves both worlds
        plain = [name for name in drawable if name not in (*KNOWN["pico"]["concepts"], "boy", "girl", "broken heart")]
        shuffled = sorted(plain, key=lambda name: stable_hash("held out of nano", name))
        badly = KNOWN["badly recoloured"]
        paintable = {
            name: frozenset(style for style in badly if name not in badly[style]) for name in KNOWN["recolourable"]
        }
        return cls(
            name="nano", concepts=(*(name for name in drawable if name not in shuffled[:24]), *SHAPES),
            extra=tuple(shuffled[:24]), generation_held_out=tuple(shuffled[24:48]), styles=tuple(STYLES),
            colours=tuple(PALETTE), backgrounds=tuple(BACKGROUNDS), edits=EDITS, tones=tuple(TONES),
            recolourable=paintable, **_fields("nano"),
        )  # fmt: skip

    @classmethod
    @cache
    def pico(cls) -> World:
        """112 pixels, one style, 40 concepts and four shapes, one size, nine places, plain grounds: learned on CPUs."""
        fields = _fields("pico")
        named = KNOWN["pico"]["concepts"]
        candidates = [name for name in named if name not in fields["recolourable"]]
        shuffled = sorted(candidates, key=lambda name: stable_hash("held out of pico", name))
        taken = {*named, *fields["extra"]}
        paintable = [name for name, styles in cls.nano().recolourable.items() if "flat" in styles and name not in taken]
        taken |= {"fire truck", "eagle", *paintable, *SHAPES}  # the two are too much like what is held out
        others = [name for name in (*cls.nano().concepts, *cls.nano().extra) if name not in taken]
        return cls(
            name="pico", generation_held_out=tuple(shuffled[:2]), hues=("pink", "black", *HUES),
            guests=tuple(paintable), strangers=tuple(others), **fields,
        )  # fmt: skip

    @classmethod
    @cache
    def tiny(cls) -> World:
        """56 pixels, six concepts and four shapes: for tests, drawn without any art."""
        return replace(cls.pico(), **_fields("tiny"))

    @property
    def size(self) -> Size:
        return self.shape or (self.image_size, self.image_size)

    @property
    def names(self) -> tuple[str, ...]:
        """All concepts that it can show."""
        return (*self.concepts, *self.extra, *self.guests, *self.strangers)

    def shaped(self, size: Size) -> World:
        """The same world in pictures of another width and height; raises DataError where its objects have no room."""
        return self if size == self.size else replace(self, shape=None if size == (self.image_size,) * 2 else size)

    @cached_property
    def training(self) -> World:
        """The world that training draws from: with everything that is there to learn from and never measured."""
        more = dict.fromkeys((*self.paint, *self.guests), frozenset((self.default_style,)))
        colours = tuple(dict.fromkeys((*self.colours, *self.hues)))
        return replace(self, colours=colours, recolourable={**self.recolourable, **more}, hues=(), paint=())

    def of_split(self, split: str, seen: bool = True) -> World:
        """The world that SPLIT draws from; raises DataError where training is asked for what is not SEEN in it."""
        if split == "train" and not seen:
            raise DataError(
                "seen=False was given for the training split; only split='val' may hold unseen combinations"
            )
        return self.training if split == "train" else self

    def pair_held_out(self, a: str, b: str) -> bool:
        """Whether concepts A and B never meet in a training picture (10 % of pairs)."""
        return a != b and stable_fraction("pair", *sorted((a, b))) < 0.10

    def colour_held_out(self, concept: str, colour: str) -> bool:
        """Whether CONCEPT never has COLOUR in a training picture (15 % of pairs)."""
        return stable_fraction("colour", concept, colour) < 0.15

    def seen(self, scene: Scene) -> bool:
        """Whether SCENE holds no held-out pair, colour or concept."""
        return (
            not any(obj.concept in self.extra for obj in scene.objects)
            and not any(obj.colour and self.colour_held_out(obj.concept, obj.colour) for obj in scene.objects)
            and not any(self.pair_held_out(a.concept, b.concept) for a, b in combinations(scene.objects, 2))
        )

    def allowed(self, scene: Scene, split: str, purpose: str) -> bool:
        """Whether SCENE may be used: training lacks what is held out, for "generation" also ``generation_held_out``."""
        check_choice("split", split, SPLITS, DataError)
        check_choice("purpose", purpose, PURPOSES, DataError)
        barred = self.generation_held_out if purpose == "generation" else ()
        return split == "val" or (self.seen(scene) and not any(obj.concept in barred for obj in scene.objects))

    def pool(self, purpose: str) -> tuple[str, ...]:
        """Return the concepts that scenes are made of for PURPOSE unless a caller names others."""
        check_choice("purpose", purpose, PURPOSES, DataError)
        barred = self.generation_held_out if purpose == "generation" else ()
        return tuple(name for name in self.concepts if name not in barred)

    def colours_of(self, name: str, style: str) -> tuple[str, ...]:
        """Return the colours that concept NAME can be painted in."""
        return self.colours if name in SHAPES or style in self.recolourable.get(name, ()) else ()

    def style_of(self, scene: Scene) -> str:
        """Return the style of a scene: the one that is not the default, if any."""
        return next((obj.style for obj in scene.objects if obj.style != self.default_style), self.default_style)

    def clashes(self, obj: Obj, background: str) -> bool:
        """Whether OBJ would hardly show on BACKGROUND."""
        if obj.colour is not None:
            return obj.colour in (background, *KNOWN["colour clashes"].get(background, ()))
        return background in measured()["clashes"].get(obj.style, {}).get(obj.concept, ())

    def looks(self, obj: Obj, colour: str) -> bool:
        """Whether OBJ already has COLOUR, painted or as the artist chose."""
        if obj.colour is not None:
            return obj.colour == colour
        return colour in measured()["natural"].get(obj.style, {}).get(obj.concept, ())

    def is_horizon(self, background: str) -> bool:
        """Whether BACKGROUND has a ground that objects stand on."""
        return BACKGROUNDS[background].kind == "horizon"

    def grounded(self, obj: Obj) -> bool:
        """Whether the foot of OBJ is on the ground of a horizon background."""
        return obj.y + obj.size >= self.size[1] * (HORIZON + 0.06)

    def positions(self, size: int, single: bool = False, axis: int = 0) -> Sequence[int]:
        """Return where a corner of an object of SIZE may lie, along x (AXIS 0) or y."""
        if self.shape is not None:
            square = replace(self, shape=None).positions(size)
            corners = range(square[0], self.shape[axis] - size - self.margin + 1, self.grid)
            if self.grid < TOKEN_PIXELS:
                return corners
            named = {third(corner + size / 2, self.shape[axis]): corner for corner in reversed(corners)}
            return tuple(sorted(named.values()))
        middle = (self.image_size - size) // 2
        reach = middle - self.margin
        if single and self.single_shift is not None:
            reach = min(reach, self.single_shift)
        steps = reach // self.grid
        return range(middle - steps * self.grid, middle + steps * self.grid + 1, self.grid)

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return the object sizes for a scene of COUNT objects: the more, the smaller."""
        if count == 1:
            return self.single_sizes
        limit = {2: 1.0, 3: 0.40, 4: 0.33}.get(count, 0.33) * self.image_size
        return tuple(size for size in self.multi_sizes if size <= limit) or self.multi_sizes[:1]


def _fields(name: str) -> dict[str, Any]:
    """Return what the table says of a world, which has the drawn shapes, too, and paints in the flat style."""
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in KNOWN[name].items()}
    if "concepts" in found:
        found["concepts"] += SHAPES
        found["recolourable"] = dict.fromkeys(found["recolourable"], frozenset(("flat",)))
    return found


def overlap(a: Obj, b: Obj, gap: int = 0) -> bool:
    """Whether the boxes of A and B come closer than GAP pixels along both axes."""
    across = a.x < b.x + b.size + gap and b.x < a.x + a.size + gap
    return across and a.y < b.y + b.size + gap and b.y < a.y + a.size + gap


def relation(a: Obj, b: Obj) -> str | None:
    """Return where A is, seen from B: one of RELATIONS, or None where people would disagree."""
    near, far = sorted(abs(one - other) for one, other in zip(a.centre, b.centre, strict=True))
    return found_relation(a, b) if far >= (a.size + b.size) / 2 and far >= 1.5 * near else None


def found_relation(a: Obj | Found, b: Obj | Found) -> str:
    """Return where A is, seen from B: one of RELATIONS, by the longer of the two distances between their middles."""
    (ax, ay), (bx, by) = a.centre, b.centre
    if abs(ax - bx) >= abs(ay - by):
        return "left" if ax < bx else "right"
    return "above" if ay < by else "below"


def third(middle: float, side: int) -> int:
    """Return whether people call a place along a SIDE its beginning, its middle or its end: 0, 1 or 2."""
    return 0 if middle / side < 0.4 else 2 if middle / side > 0.6 else 1


def reading_order(scene: Scene) -> tuple[Obj, ...]:
    """Return the objects from left to right, those in one column from top to bottom."""
    return tuple(sorted(scene.objects, key=lambda obj: obj.centre))


@lru_cache(maxsize=256)
def _lattice_layouts(
    columns: tuple[int, ...], rows: tuple[int, ...], size: int, gap: int, count: int
) -> tuple[tuple[Obj, ...], ...]:
    """All ways to place COUNT equal objects, whatever they are, on a coarse lattice, up to their order."""
    cells = [Obj("", "", None, None, x, y, size) for x in columns for y in rows]
    ways = combinations(cells, count)
    return tuple(way for way in ways if not any(overlap(a, b, gap) for a, b in combinations(way, 2)))


def place(
    world: World, rng: random.Random, objects: Sequence[Obj], background: str, where: str | None = None
) -> tuple[Obj, ...] | None:
    """Give OBJECTS corners where they do not overlap, the first WHERE of the second; None where there is no layout."""
    horizon = world.is_horizon(background)
    for placed in _placings(world, rng, objects, horizon):
        fits = len(placed) == len(objects) and (not horizon or all(world.grounded(obj) for obj in placed))
        if fits and (where is None or relation(placed[0], placed[1]) == where):
            return tuple(placed)
    return None


def _placings(world: World, rng: random.Random, objects: Sequence[Obj], horizon: bool) -> Iterator[list[Obj]]:
    """Try to give OBJECTS corners, again and again; without those that found no room."""
    single = len(objects) == 1 and objects[0].size in world.single_sizes
    columns, rows = (tuple(world.positions(objects[0].size, single, axis)) for axis in (0, 1))
    if len({obj.size for obj in objects}) == 1 and max(len(columns), len(rows)) <= 8:
        layouts = _lattice_layouts(columns, rows, objects[0].size, world.gap, len(objects))
        for _ in range(64 if layouts else 0):
            corners = list(rng.choice(layouts))
            rng.shuffle(corners)
            yield [replace(obj, x=corner.x, y=corner.y) for obj, corner in zip(objects, corners, strict=True)]
        return
    for _ in range(24):
        done: list[Obj] = []
        for obj in objects:
            across, down = (world.positions(obj.size, single, axis) for axis in (0, 1))
            ground = int(world.size[1] * (HORIZON + 0.06)) + 1 - obj.size
            top = max(down[0], ground) if horizon else down[0]
            for _ in range(24):
                y = rng.randrange(top, down[-1] + 1) if world.grid == 1 else rng.choice(down)
                candidate = replace(obj, x=rng.choice(across), y=y)
                if not any(overlap(candidate, other, world.gap) for other in done):
                    done.append(candidate)
                    break
            else:
                break
        yield done


def sample_scene(
    world: World,
    rng: random.Random,
    task: str,
    split: str = "train",
    purpose: str = "tokenizer",
    seen: bool | None = None,
    pool: Sequence[str] | None = None,
) -> Scene:
    """Draw a scene for TASK that SPLIT and PURPOSE allow, of POOL (such as ``world.extra``) where one is given.

    SEEN asks for combinations that training has (True) or lacks (False; by default in validation, for COMPOSITIONAL
    tasks); of a pool of never-seen concepts it is not looked at.
    """
    check_choice("task", task, TASKS, DataError)
    candidates = tuple(pool) if pool is not None else world.pool(purpose)
    if seen is None:
        seen = split == "train" or task not in COMPOSITIONAL
    world = world.of_split(split, seen)
    if split == "train" and pool is None:
        if purpose != "generation" and rng.random() < GUESTS:
            candidates = (*candidates, *world.guests)
        plain = world.strangers and task not in ("colour", "colour_attr")
        if purpose == "tokenizer" and plain and rng.random() < STRANGERS:
            candidates = world.strangers
    free = pool is not None and split == "val" and any(name in world.extra for name in pool)
    others = [style for style in world.styles if style != world.default_style]
    for _ in range(2000):
        style = world.default_style if not others or rng.random() < 0.5 else rng.choice(others)
        looks = _sample_looks(world, rng, task, style, candidates)
        if looks is None:
            continue
        draft = Scene("", looks)
        wanted = free or world.seen(draft) == (seen or task not in COMPOSITIONAL)
        if not wanted or not world.allowed(draft, split, purpose):
            continue
        where = rng.choice(RELATIONS) if task == "position" else None
        background = sample_background(world, rng, looks, horizon=len(looks) < 3 and where not in ("above", "below"))
        if background is None:
            continue
        sizes = world.sizes(len(looks))
        alike = rng.choice(sizes) if len(looks) > 1 and len({obj.look for obj in looks}) == 1 else None
        sized = [replace(obj, size=alike or rng.choice(sizes)) for obj in looks]
        placed = place(world, rng, sized, background, where)
        if placed is not None:
            return Scene(background, placed)
    raise DataError(
        f"no scene for task {task!r} (split {split}, seen={seen}) could be drawn from {len(candidates)} concepts; "
        "give a larger pool, or another task"
    )


def _sample_looks(
    world: World, rng: random.Random, task: str, style: str, pool: Sequence[str]
) -> tuple[Obj, ...] | None:
    """Draw what the objects are, without places."""
    if task in ("colour", "colour_attr"):
        pool = [name for name in pool if world.colours_of(name, style)]
    count = {"two": 2, "position": 2, "colour_attr": 2}.get(task, 1)
    if len(pool) < count:
        return None
    chosen = rng.sample(list(pool), count) if count > 1 else [rng.choice(pool)]
    rate = {"colour": 1.0, "colour_attr": 1.0, "counting": 0.4, "position": 0.25}.get(task, 0.0)
    objects = tuple(sample_look(world, rng, name, style, rate) for name in chosen)
    if task == "colour_attr" and objects[0].colour == objects[1].colour:
        return None
    if all(obj.concept in SHAPES for obj in objects):
        objects = tuple(replace(obj, style=world.default_style) for obj in objects)
    if task != "counting":
        return objects
    return objects * rng.randint(2, world.max_count) if concept(objects[0].concept).countable else None


def sample_look(world: World, rng: random.Random, name: str, style: str, colour_rate: float = 0.0) -> Obj:
    """Draw colour and skin tone for concept NAME; no place or size yet."""
    colours = world.colours_of(name, style)
    colour = rng.choice(colours) if colours and (name in SHAPES or rng.random() < colour_rate) else None
    tone = rng.choice(world.tones) if world.tones and concept(name).toned and rng.random() < 0.5 else None
    return Obj(name, style, colour, tone)


def sample_background(
    world: World, rng: random.Random, objects: Sequence[Obj], horizon: bool = True, other_than: str | None = None
) -> str | None:
    """Draw a background on which all OBJECTS show; the default one comes up more often. None if there is none."""
    fit = [name for name in world.backgrounds if name != other_than and (horizon or not world.is_horizon(name))]
    fit = [name for name in fit if not any(world.clashes(obj, name) for obj in objects)]
    if not fit:
        return None
    # captions leave the default background unsaid, so it has to be common: see captions.caption
    if world.default_background in fit and other_than is None and rng.random() < 0.27:
        return world.default_background
    return rng.choice(fit)
