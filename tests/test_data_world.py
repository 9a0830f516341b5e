"""Scenes: what is held out stays out, nothing overlaps, everything is reproducible."""

import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from unilip.emoji.art import Atlas
from unilip.emoji.captions import cell
from unilip.emoji.concepts import SHAPES, concepts
from unilip.emoji.edits import sample_edit
from unilip.emoji.lessons import cells as token_cells
from unilip.emoji.render import change_mask, object_mask, render
from unilip.emoji.world import (
    COMPOSITIONAL,
    PURPOSES,
    TASKS,
    Obj,
    Scene,
    World,
    overlap,
    reading_order,
    relation,
    sample_scene,
)
from unilip.errors import DataError
from unilip.files import generator, stable_hash

WORLDS = ("pico", "nano")


@pytest.fixture(scope="module")
def atlas():
    return Atlas.synthetic(World.nano(), size=24)


def scenes(world: World, task: str, n: int = 150, split: str = "train", purpose: str = "tokenizer", **more):
    rng = random.Random(f"{world.name} {task} {split}")
    return [sample_scene(world, rng, task, split, purpose, **more) for _ in range(n)]


def test_hashes_do_not_depend_on_the_process():
    assert stable_hash("pair", "cat", "dog") == 4688969809018821462
    assert generator(1, "train", 2).random() == generator(1, "train", 2).random()
    assert generator(1, "train", 2).random() != generator(1, "val", 2).random()


def test_preset_worlds_are_as_announced():
    nano, pico = World.preset("nano"), World.preset("pico")
    assert (nano.image_size, pico.image_size) == (224, 112)
    assert len(pico.concepts) == 44
    assert len(pico.generation_held_out) == 2
    assert len(pico.extra) == 4
    assert len(nano.extra) == len(nano.generation_held_out) == 24
    assert set(pico.concepts) <= set(nano.concepts) - set(nano.generation_held_out)
    for world in (nano, pico, World.tiny()):
        assert len(set(world.names)) == len(world.names) and set(world.paint) <= set(world.concepts)
    gone = set(concepts()) - set(nano.concepts) - set(nano.extra)
    assert all(name.split()[-1] in SHAPES for name in gone)  # the art's coloured shapes give way to ours
    with pytest.raises(DataError, match=r"milli.*nano, pico"):
        World.preset("milli")


def test_more_paint_never_shows_what_pico_holds_out():
    pico = World.preset("pico")
    edits = [sample_edit(pico, random.Random(i), "recolour") for i in range(600)]
    drawn = [scene for edit in edits for scene in (edit.source, edit.target)]
    assert all(pico.allowed(scene, "train", "generation") for scene in drawn)
    painted = {(obj.concept, obj.colour) for scene in drawn for obj in scene.objects if obj.colour}
    assert {name for name, _ in painted} > set(pico.recolourable)
    assert {colour for _, colour in painted} == set(pico.training.colours) > set(pico.colours)
    assert not any(pico.colour_held_out(name, colour) for name, colour in painted)


def test_guests_are_looked_at_and_recoloured_but_never_asked_for():
    world = World.preset("pico")
    guests = set(world.guests)
    assert len(guests) > 40 and not guests & {*world.concepts, *world.extra}
    met = {}
    for kind in world.edits:
        edits = [sample_edit(world, random.Random(i), kind) for i in range(200)]
        met[kind] = {obj.concept for e in edits for scene in (e.source, e.target) for obj in scene.objects} & guests
        assert all(world.allowed(scene, "train", "generation") for e in edits for scene in (e.source, e.target))
    assert len(met.pop("recolour")) > 30
    assert not any(met.values())
    for purpose in PURPOSES:
        shown = {
            obj.concept for task in TASKS for scene in scenes(world, task, purpose=purpose) for obj in scene.objects
        }
        assert bool(shown & guests) == (purpose != "generation")
        assert bool(shown & set(world.strangers)) == (purpose == "tokenizer")
    for kind in world.edits:
        assert sample_edit(world, random.Random(0), kind, "val").target.objects[0].concept not in guests
    painted = render(Scene("white", (Obj("vase", "flat", "blue", None, 32, 32, 48),)), Atlas.synthetic(world), world)
    assert np.asarray(painted).min() < 200


@pytest.mark.parametrize("name", WORLDS)
def test_shares_held_out(name):
    world = World.preset(name)
    pairs = [world.pair_held_out(a, b) for a, b in combinations(world.concepts, 2)]
    assert np.mean(pairs) == pytest.approx(0.10, abs=0.02)
    nano = World.nano()
    colours = [nano.colour_held_out(n, c) for n in (*nano.recolourable, *SHAPES) for c in nano.colours]
    assert np.mean(colours) == pytest.approx(0.15, abs=0.03)
    assert world.pair_held_out("dog", "cat") == world.pair_held_out("cat", "dog")
    assert not world.pair_held_out("cat", "cat")


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("purpose", PURPOSES)
def test_training_never_sees_what_is_held_out(name, purpose):
    world = World.preset(name)
    for task in TASKS:
        for scene in scenes(world, task, purpose=purpose):
            names = [obj.concept for obj in scene.objects]
            assert not set(names) & set(world.extra)
            assert not any(world.pair_held_out(a, b) for a, b in combinations(names, 2))
            assert not any(obj.colour and world.colour_held_out(obj.concept, obj.colour) for obj in scene.objects)
            if purpose == "generation":
                assert not set(names) & set(world.generation_held_out)
            assert world.allowed(scene, "train", purpose)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_validation_shows_held_out_combinations_and_seen_ones(name, task):
    world = World.preset(name)
    assert all(world.seen(scene) != (task in COMPOSITIONAL) for scene in scenes(world, task, 60, "val"))
    assert all(world.seen(scene) for scene in scenes(world, task, 60, "val", seen=True))
    with pytest.raises(DataError, match="split='val'"):
        scenes(world, task, 1, "train", seen=False)


@pytest.mark.parametrize("name", WORLDS)
def test_unseen_concepts_can_be_asked_for_in_validation_only(name):
    world = World.preset(name)
    found = scenes(world, "single", 40, "val", pool=world.extra)
    assert {obj.concept for scene in found for obj in scene.objects} <= set(world.extra)
    held = scenes(world, "single", 40, "val", "generation", pool=world.generation_held_out)
    assert {obj.concept for scene in held for obj in scene.objects} <= set(world.generation_held_out)
    with pytest.raises(DataError, match="larger pool"):
        sample_scene(world, random.Random(0), "single", "train", "tokenizer", pool=world.extra[:2])


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_objects_are_inside_apart_and_on_the_ground(name, task):
    world = World.preset(name)
    for scene in scenes(world, task):
        count = len(scene.objects)
        assert count == {"two": 2, "position": 2, "colour_attr": 2}.get(task, count)
        assert (2 <= count <= world.max_count) if task == "counting" else count <= 2
        for obj in scene.objects:
            assert world.margin <= min(obj.box)
            assert max(obj.box) <= world.image_size - world.margin
            assert obj.size in (world.single_sizes if count == 1 else world.multi_sizes)
            assert (obj.x - (world.image_size - obj.size) // 2) % world.grid == 0
            assert obj.colour is None or obj.colour in world.training.colours_of(obj.concept, obj.style)
            assert not world.clashes(obj, scene.background)
            if world.is_horizon(scene.background):
                assert world.grounded(obj)
        assert not any(overlap(a, b, world.gap) for a, b in combinations(scene.objects, 2))
        if task == "counting":
            assert len({obj.look for obj in scene.objects}) == 1
        if task == "position":
            assert relation(*scene.objects) is not None
        if task == "colour_attr":
            assert len({obj.colour for obj in scene.objects} - {None}) == 2


def test_every_count_relation_and_background_comes_up():
    for world in (World.pico(), World.nano()):
        assert {len(s.objects) for s in scenes(world, "counting")} == {2, 3, 4}
        assert {relation(*s.objects) for s in scenes(world, "position")} == {"left", "right", "above", "below"}
        assert {s.background for s in scenes(world, "single", 800)} == set(world.backgrounds)


def test_relations():
    def at(x, y):
        return Obj("cat", "flat", None, None, x, y, 48)

    middle = at(100, 100)
    assert relation(at(30, 110), middle) == "left"
    assert relation(at(170, 90), middle) == "right"
    assert relation(at(110, 20), middle) == "above"
    assert relation(at(90, 190), middle) == "below"
    assert relation(at(30, 30), middle) is None  # a diagonal: people would disagree
    assert relation(at(110, 110), middle) is None  # overlapping
    assert reading_order(Scene("white", (middle, at(30, 110))))[0].x == 30


def test_scenes_survive_json():
    import json

    for scene in scenes(World.nano(), "two", 20):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_the_same_generator_gives_the_same_scene_and_pixels(atlas):
    world = World.nano()
    for task in TASKS:
        one, two = (sample_scene(world, generator(7, task), task) for _ in range(2))
        assert one == two
        assert render(one, atlas, world).tobytes() == render(two, atlas, world).tobytes()


@pytest.mark.parametrize("background", ["red", "night sky", "snow"])
def test_pixels_outside_the_masks_are_background(atlas, background):
    world = World.nano()
    objects = tuple(Obj("car", "flat", "blue", None, 20 + 100 * i, 120, 80) for i in range(2))
    empty = np.asarray(render(Scene(background, ()), atlas, world))
    full = np.asarray(render(Scene(background, objects), atlas, world))
    masks = np.stack([object_mask(obj, atlas, world) for obj in objects])
    assert full.shape == (224, 224, 3)
    assert masks.shape == (2, 224, 224)
    assert not (masks[0] & masks[1]).any()
    assert np.array_equal(full[~masks.any(0)], empty[~masks.any(0)])
    assert (full != empty).any(-1)[masks[0]].mean() > 0.9


def test_change_mask_of_a_new_background_spares_kept_objects(atlas):
    world = World.nano()
    obj = Obj("heart", "flat", "red", None, 60, 60, 96)
    before, after = Scene("white", (obj,)), Scene("blue", (obj,))
    mask = change_mask(before, after, atlas, world)
    pictures = [np.asarray(render(scene, atlas, world)) for scene in (before, after)]
    assert np.array_equal(mask, (pictures[0] != pictures[1]).any(-1))
    assert not mask[100, 108]
    assert object_mask(obj, atlas, world)[100, 108]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("dance",), "single"), (("two", "test"), "train, val"), (("two", "train", "fun"), "tokenizer")],
)
def test_wrong_names_are_answered_with_the_right_ones(arguments, words):
    with pytest.raises(DataError, match=words):
        sample_scene(World.pico(), random.Random(0), *arguments)


def test_a_world_checks_itself():
    from dataclasses import replace

    pico = World.pico()
    with pytest.raises(DataError, match=r"120.*112x112"):
        replace(pico, single_sizes=(120,))
    with pytest.raises(DataError, match=r"styles.*oil"):
        replace(pico, styles=("oil",))
    with pytest.raises(DataError, match="extra"):
        replace(pico, extra=("cat",))
    with pytest.raises(DataError, match=r"World\.strangers must be neither"):
        replace(pico, guests=("car",))
    with pytest.raises(DataError, match="paint among concepts"):
        replace(pico, paint=("tractor",))
    with pytest.raises(DataError, match=r"no background"):
        render(Scene("plaid", ()), Atlas({}), pico)


def test_lattice_of_pico():
    pico = World.pico()
    assert list(pico.positions(48)) == [4, 32, 60]
    assert all(b - a == 1 for a, b in pairwise(World.nano().positions(96)))


def test_other_shapes_keep_the_lattice_and_the_names_of_places(atlas):
    pico = World.pico()
    wide, tall = pico.shaped((140, 84)), pico.shaped((84, 140))
    assert pico.shaped((112, 112)) is pico and tall.shaped((112, 112)) == pico
    assert [list(wide.positions(48, axis=axis)) for axis in (0, 1)] == [[4, 32, 88], [4, 32]]
    assert [list(tall.positions(48, axis=axis)) for axis in (0, 1)] == [[4, 32], [4, 32, 88]]
    rng, places = random.Random(0), set()
    for world, (width, height) in ((wide, (140, 84)), (tall, (84, 140))):
        for task in TASKS:
            for _ in range(12):
                scene = sample_scene(world, rng, task, "train", "generation")
                cells = [cell(obj, world) for obj in scene.objects]
                assert len(set(cells)) == len(cells), "a place has one name"
                places |= set(cells)
                for obj in scene.objects:
                    assert obj.x % 28 == obj.y % 28 == 4
                    assert min(obj.box) >= 2 and obj.box[2] <= width - 2 and obj.box[3] <= height - 2
                picture = np.asarray(render(scene, atlas, world))
                assert picture.shape == (height, width, 3)
                shown = token_cells(scene, world).reshape(height // 28, width // 28, 3)
                assert all(shown[obj.y // 28, obj.x // 28, 0] for obj in scene.objects)
        for kind in world.edits:
            edit = sample_edit(world, rng, kind)
            assert change_mask(edit.source, edit.target, atlas, world).shape == (height, width)
    assert len(places) == 8, "all but the middle of the middle"
    with pytest.raises(DataError, match="28x140"):
        pico.shaped((28, 140))
