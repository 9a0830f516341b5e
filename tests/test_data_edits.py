"""Edits and datasets: only what the instruction names changes; item i is always the same item i."""

import hashlib
import pickle
import random
import re

import numpy as np
import pytest

from unilip.emoji.art import Atlas
from unilip.emoji.dataset import Edits, Questions, Scenes
from unilip.emoji.edits import sample_chain, sample_edit, sample_joint
from unilip.emoji.lessons import cells, of_caption, of_edit
from unilip.emoji.render import change_mask, render
from unilip.emoji.world import EDITS, World, overlap, relation
from unilip.errors import DataError

WORLDS = ("pico", "nano")
KINDS = [(name, kind) for name in WORLDS for kind in World.preset(name).edits]


@pytest.fixture(scope="module")
def atlas():
    return Atlas.synthetic(World.nano(), size=24)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_edits_change_only_what_they_name(name, kind, atlas):
    world, rng = World.preset(name), random.Random(f"{name} {kind}")
    for _ in range(40):
        edit = sample_edit(world, rng, kind)
        source, target = edit.source, edit.target
        assert edit.kind == kind
        for scene in (source, target):
            assert world.allowed(scene, "train", "generation")
            objects = scene.objects
            assert 0 < len(objects) <= world.max_objects
            assert not any(overlap(a, b, world.gap) for i, a in enumerate(objects) for b in objects[:i])
            assert not any(world.clashes(obj, scene.background) for obj in objects)
        before, after = (np.asarray(render(scene, atlas, world)).astype(int) for scene in (source, target))
        mask = change_mask(source, target, atlas, world)
        assert mask.any()
        assert not mask.all()
        assert np.array_equal(before[~mask], after[~mask])
        assert (before != after).any()
        _check(edit, world)


def _check(edit, world):
    """The instruction says what happened, and nothing else did."""
    source, target, words = edit.source, edit.target, edit.instruction
    gone = [obj for obj in source.objects if obj not in target.objects]
    new = [obj for obj in target.objects if obj not in source.objects]
    if edit.kind == "background":
        assert not gone
        assert not new
        assert target.background in words
        return
    assert source.background == target.background
    match edit.kind:
        case "add":
            assert (len(gone), len(new)) == (0, 1)
            (where,) = [w for w in ("left", "right", "above", "below") if w in words.split()]
            assert any(relation(new[0], obj) == where and words.endswith(obj.concept) for obj in source.objects)
        case "remove":
            assert (len(gone), len(new)) == (1, 0)
            assert gone[0].concept in words
        case "replace":
            assert (len(gone), len(new)) == (1, 1)
            assert gone[0].box == new[0].box
            assert words.index(gone[0].concept) >= 0
            assert new[0].concept.removeprefix("pair of ") in words
        case "move":
            assert [obj.look for obj in source.objects] == [obj.look for obj in target.objects]
            if words.startswith("move"):
                dx, dy = new[0].x - gone[0].x, new[0].y - gone[0].y
                said = words.split()
                assert ("left" in said) == (dx < 0)
                assert ("right" in said) == (dx > 0)
                assert bool({"up", "top"} & set(said)) == (dy < 0)
                assert bool({"down", "bottom"} & set(said)) == (dy > 0)
            else:
                assert {obj.box for obj in gone} == {obj.box for obj in new}
        case "recolour":
            assert gone[0].box == new[0].box
            assert new[0].colour in words.split()
            assert not world.looks(gone[0], new[0].colour)
        case "style":
            assert {obj.style for obj in target.objects} <= set(words.split())
        case "skin_tone":
            assert new[0].tone in words
            assert gone[0].concept == new[0].concept


def test_held_out_targets_in_validation():
    world, rng = World.pico(), random.Random(0)
    for kind in ("add", "replace", "recolour"):
        edit = sample_edit(world, rng, kind, "val", seen=False)
        assert world.seen(edit.source)
        assert not world.seen(edit.target)
    assert world.seen(sample_edit(world, rng, "move", "val", seen=False).target)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("style",), "no edit 'style'"), (("add", "test"), "train, val"), (("add", "train", False), "split='val'")],
)
def test_impossible_edits_are_refused(arguments, words):
    assert "style" in EDITS
    with pytest.raises(DataError, match=words):
        sample_edit(World.pico(), random.Random(0), *arguments)


# ------------------------------------------------------------------------------------------------ datasets


def datasets(world: World, atlas: Atlas, split: str = "train", seed: int = 0, size: int = 1000):
    return {
        "scenes": Scenes(world, atlas, split, seed, size, "generation"),
        "questions": Questions(world, atlas, split, seed, size),
        "edits": Edits(world, atlas, split, seed, size),
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) if k != "scene" else a[k] == b[k] for k in a)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("what", ["scenes", "questions", "edits"])
def test_items_depend_on_seed_split_and_index_alone(name, what, atlas):
    world = World.preset(name)
    first, second = datasets(world, atlas)[what], pickle.loads(pickle.dumps(datasets(world, atlas)[what]))
    forwards = [first[i] for i in range(8)]
    backwards = [second[i] for i in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    longer = datasets(world, atlas, size=10**12)[what]
    assert same(longer[5], forwards[5])  # the length does not matter
    assert same(first[-1], first[999])
    for other in (datasets(world, atlas, seed=1), datasets(world, atlas, split="val")):
        assert not all(same(a, other[what][i]) for i, a in enumerate(forwards))
    for image in ("image", "source", "target"):
        if image in forwards[0]:
            assert forwards[0][image].dtype == np.uint8
            assert forwards[0][image].shape == (world.image_size, world.image_size, 3)
            assert forwards[0][image].flags.writeable


def test_datasets_hold_what_they_say(atlas):
    world = World.pico()
    made = datasets(world, atlas)
    assert set(made["scenes"][0]) == {"image", "caption", "scene", "task"}
    assert set(made["questions"][0]) == {"image", "question", "answer", "accepted", "kind", "scene"}
    assert set(made["edits"][0]) == {"source", "target", "instruction", "kind", "edit"}
    assert {made["edits"][i]["kind"] for i in range(80)} == set(world.edits)
    kinds = [made["questions"][i]["kind"] for i in range(200)]
    assert kinds.count("caption") / 200 == pytest.approx(0.33, abs=0.1)
    only = Questions(world, atlas, "val", 0, 50, kinds=("count",))
    assert {only[i]["kind"] for i in range(20)} == {"count"}
    counting = Scenes(world, atlas, "train", 0, 50, "tokenizer", tasks=("counting",))
    assert {counting[i]["task"] for i in range(20)} == {"counting"}


def test_datasets_refuse_wrong_splits_kinds_and_indices(atlas):
    world = World.pico()
    with pytest.raises(DataError, match="train, val"):
        Scenes(world, atlas, "test", 0, 10, "tokenizer")
    with pytest.raises(IndexError, match="10 items"):
        Scenes(world, atlas, "train", 0, 10, "tokenizer")[10]
    with pytest.raises(DataError, match="style"):
        Questions(world, atlas, "train", 0, 10, kinds=("style",))[0]


@pytest.mark.parametrize("name", ["tiny", "pico", "nano"])
def test_edits_in_a_row_leave_one_object_alone(name):
    world, rng = World.preset(name), random.Random(name)
    kinds = set()
    for _ in range(12):
        row = sample_chain(world, rng, 5)
        assert [edit.source for edit in row[1:]] == [edit.target for edit in row[:-1]]
        assert set.intersection(*(set(scene.objects) for edit in row for scene in (edit.source, edit.target)))
        for edit in row:
            objects = edit.target.objects
            assert 0 < len(objects) <= 2 and edit.target.background == edit.source.background
            assert not any(overlap(a, b, world.gap) for i, a in enumerate(objects) for b in objects[:i])
            assert not any(world.clashes(obj, edit.target.background) for obj in objects)
            _check(edit, world)
        kinds |= {edit.kind for edit in row}
    assert kinds == {"add", "remove", "replace", "move", "recolour"}


def test_what_training_draws_stays_as_it_was():
    """Scenes, captions, edits, lessons and pictures of the world that the embedded model learns, by their hash."""
    world = World.pico()
    common = dict(world=world, atlas=Atlas.synthetic(world), split="train", seed=0, size=1 << 40)
    scenes, edits = Scenes(**common, purpose="generation"), Edits(**common)
    found = hashlib.sha256()
    for i in range(100):
        edit, (scene, task, text) = edits.draw(i), scenes.draw(i)
        lessons = of_edit(edit, edit.instruction, world), of_caption(text, scene, world)
        for value in (edit, scene, task, text, *lessons):
            found.update(repr(value).encode())
        for one in (edit.target, scene):
            found.update(cells(one, world).tobytes())
    for i in range(3):
        for data in (scenes[i]["image"], edits[i]["source"], edits[i]["target"]):
            found.update(data.tobytes())
    assert found.hexdigest() == "c1b283d6b6f3add7263291a1a520fae030d549955b56c35e5aa6f61f6f924835"


@pytest.mark.parametrize("name", ["tiny", "pico", "nano"])
def test_an_edit_of_two_pictures_brings_the_thing_of_the_second(name):
    world, rng = World.preset(name), random.Random(name)
    colours = set()
    for _ in range(40):
        edit, other = sample_joint(world, rng)
        thing = edit.target.objects[0]
        assert edit.target.objects[1:] == edit.source.objects and edit.target.background == edit.source.background
        assert [obj.look for obj in other.objects] == [thing.look] and thing.concept in edit.instruction
        assert re.search(r"picture 2|second picture|image 2", edit.instruction)
        colours.add(thing.colour)
        for scene in (edit.source, other, edit.target):
            assert world.allowed(scene, "train", "generation")
    assert len(colours) > 2, "of which the instruction says nothing"
