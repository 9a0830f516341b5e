"""The judge of the emoji world, on the tiny world's drawn sprites: what it reads, refuses and is unsure of.

In: scenes with known contents, whole and broken on purpose. Out: readings and verdicts, compared with the scenes.
"""

from dataclasses import replace

import numpy as np
import pytest
from validate_judge import BREAKS, degrade, validate_judge

from unilip.emoji.art import PALETTE, Atlas
from unilip.emoji.dataset import Edits, Scenes, pixels
from unilip.emoji.edits import Edit
from unilip.emoji.judge import (
    UNKNOWN,
    Found,
    Judge,
    Reading,
    assign,
    found_relation,
    judge_edit,
    judge_prompt,
    psnr_outside,
    read_background,
    smooth,
    to_lab,
)
from unilip.emoji.world import Obj, Scene, World
from unilip.errors import UniLIPError

WORLD = World.tiny()
SIZE = WORLD.multi_sizes[0]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.synthetic(WORLD)


@pytest.fixture(scope="module")
def judge(atlas: Atlas) -> Judge:
    return Judge(WORLD, atlas)


def thing(name: str, x: int, y: int, colour: str | None = None) -> Obj:
    return Obj(name, "flat", colour, None, x, y, SIZE)


def draw(scene: Scene, atlas: Atlas) -> np.ndarray:
    return pixels(scene, atlas, WORLD)


# --- reading --------------------------------------------------------------------------------------------------------


def test_reads_names_colours_and_places(judge, atlas):
    scene = Scene("green", (thing("cat", 3, 4), thing("circle", 30, 28, "red")))
    reading = judge.read(draw(scene, atlas))
    assert reading.background == "green"
    found = {f.concept: f for f in reading.objects}
    assert set(found) == {"cat", "circle"}
    assert found["circle"].colour == "red" and found["cat"].colour is None
    for obj in scene.objects:
        assert np.abs(np.subtract(found[obj.concept].centre, obj.centre)).max() <= 2
        assert found[obj.concept].score > 0.9


def test_an_empty_picture_has_no_objects(judge, atlas):
    for background in WORLD.backgrounds:
        assert judge.read(draw(Scene(background, ()), atlas)) == Reading(background, ())


def test_off_the_lattice_and_a_little_larger(judge, atlas):
    scene = Scene("white", (replace(thing("dog", 11, 13), size=SIZE + 1),))
    assert [f.concept for f in judge.read(draw(scene, atlas)).objects] == ["dog"]


def test_a_blob_is_something_but_nothing_known(judge, atlas):
    blob = smooth(draw(Scene("white", (replace(thing("cat", 10, 10), size=36),)), atlas).astype(np.float32), 7.0)
    reading = judge.read(np.clip(blob, 0, 255).astype(np.uint8))
    assert [f.concept for f in reading.objects] == [UNKNOWN]


@pytest.mark.parametrize("colour", WORLD.colours)
def test_a_blob_has_a_colour_but_no_name(judge, atlas, colour):
    asked = Scene("white", (replace(thing("star", 10, 10, colour), size=36),))
    picture = draw(Scene("white", ()), atlas)
    yy, xx = np.mgrid[:56, :56]
    wobbly = np.hypot(xx - 28, yy - 28) < 11 + 5 * np.sin(3 * np.arctan2(yy - 28, xx - 28))
    picture[wobbly] = PALETTE[colour]
    verdict = judge_prompt(judge.read(picture), asked, "colour", WORLD)
    assert verdict.parts["colour"] and not verdict.parts["objects"] and not verdict.ok


def test_noise_is_no_scene(judge):
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    assert {f.concept for f in judge.read(picture).objects} <= {UNKNOWN}


def test_an_unclear_background_has_no_name():
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    picture[..., 1] = 0
    assert read_background(picture, replace(WORLD, backgrounds=("white", "green")))[0] is None


@pytest.mark.parametrize("shape", [(64, 64, 3), (56, 56), (56, 56, 4)])
def test_other_sizes_are_refused(judge, shape):
    with pytest.raises(UniLIPError, match="56"):
        judge.read(np.zeros(shape, dtype=np.uint8))


def test_reading_survives_json(judge, atlas):
    import json

    reading = judge.read(draw(Scene("pink", (thing("star", 3, 4, "blue"),)), atlas))
    assert Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading


def test_lab_of_known_colours():
    assert to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]])) == pytest.approx(
        np.array([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.2]]), abs=0.5
    )


# --- verdicts -------------------------------------------------------------------------------------------------------


def seen(name: str, x: float, y: float, colour: str | None = None) -> Found:
    return Found(name, "flat", colour, (x, y, x + SIZE, y + SIZE), 1.0)


TWO = Scene("white", (thing("car", 3, 17, "red"), thing("fish", 30, 17)))


def test_a_verdict_says_what_is_wrong():
    good = Reading("white", (seen("fish", 30, 17, "blue"), seen("car", 3, 17, "red")))
    assert judge_prompt(good, TWO, "position", WORLD).ok
    cases = {
        "background": replace(good, background="pink"),
        "colour": replace(good, objects=(good.objects[0], seen("car", 3, 17, "green"))),
        "relation": Reading("white", (seen("fish", 3, 17, "blue"), seen("car", 30, 17, "red"))),
        "count": replace(good, objects=(*good.objects, seen("car", 3, 40, "red"))),
        "objects": Reading("white", (seen("dog", 30, 17), seen("car", 3, 17, "red"))),
    }
    for part, reading in cases.items():
        verdict = judge_prompt(reading, TWO, "position", WORLD)
        assert not verdict.ok and not verdict.parts[part], part
        assert part in verdict.reason


def test_colours_have_to_be_on_their_objects():
    asked = Scene("white", (thing("car", 3, 17, "red"), thing("star", 30, 17, "blue")))
    swapped = Reading("white", (seen("car", 3, 17, "blue"), seen("star", 30, 17, "red")))
    assert not judge_prompt(swapped, asked, "colour_attr", WORLD).ok


def test_one_cat_too_many_in_place_of_a_dog():
    asked = Scene("white", (thing("cat", 1, 1), thing("dog", 30, 1), thing("dog", 1, 30)))
    reading = Reading("white", (seen("cat", 1, 1), seen("cat", 30, 1), seen("dog", 1, 30)))
    assert not judge_prompt(reading, asked, "two", WORLD).parts["objects"]


def test_equal_objects_are_matched_by_colour_then_place():
    asked = (thing("car", 3, 17, "red"), thing("car", 30, 17, "blue"))
    assert assign((seen("car", 3, 17, "blue"), seen("car", 30, 17, "red")), asked) == (1, 0)
    assert assign((seen("dog", 3, 17), seen("car", 30, 17, "red")), asked) is None


@pytest.mark.parametrize(("x", "y", "where"), [(-20, 3, "left"), (20, -3, "right"), (2, -20, "above"), (0, 9, "below")])
def test_sides(x, y, where):
    assert found_relation(seen("car", x, y), seen("dog", 0, 0)) == where


# --- edits ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_edit_is_accepted_when_done_and_refused_when_not(judge, atlas):
    for kind in WORLD.edits:
        data = Edits(WORLD, atlas, "val", 1, 4, kinds=(kind,))
        for item in (data[i] for i in range(4)):
            verdict = judge_edit(judge, item["target"], item["edit"])
            assert verdict.ok, (kind, verdict)
            assert psnr_outside(judge, item["target"], item["edit"]) in (None, 100.0)
            assert not judge_edit(judge, item["source"], item["edit"]).parts["done"], kind


def test_an_edit_that_spoils_the_rest_is_not_kept(judge, atlas):
    source = Scene("white", (thing("cat", 3, 17), thing("star", 30, 17, "red")))
    target = replace(source, objects=(source.objects[0], thing("star", 30, 17, "blue")))
    edit = Edit(source, "make the star blue", target, "recolour")
    moved = replace(target, objects=(thing("cat", 3, 33), target.objects[1]))
    other = replace(target, background="green")
    for spoilt in (moved, other):
        verdict, outside = (check(judge, draw(spoilt, atlas), edit) for check in (judge_edit, psnr_outside))
        assert verdict.parts == {"done": True, "rest kept": False} and not verdict.ok
        assert outside is not None and outside < 30


def test_something_new_on_the_wrong_side_is_not_done(judge, atlas):
    source = Scene("white", (thing("cat", 17, 17),))
    target = replace(source, objects=(thing("dog", 1, 0), thing("cat", 30, 30)))
    source = replace(source, objects=(target.objects[1],))
    target = replace(target, objects=(thing("dog", 3, 30), target.objects[1]))
    edit = Edit(source, "add a dog to the left of the cat", target, "add")
    assert judge_edit(judge, draw(target, atlas), edit).ok
    above = replace(target, objects=(thing("dog", 30, 3), target.objects[1]))
    assert not judge_edit(judge, draw(above, atlas), edit).parts["done"]


# --- the judge as a whole -------------------------------------------------------------------------------------------


def test_validation_of_whole_and_broken_scenes(judge, atlas):
    found = validate_judge(WORLD, atlas, count=10, seed=3, decibels=(26.0,), judge=judge)
    assert found["right"]["all"]["share"] >= 0.95, found["misses"]
    assert found["right"]["at 26 dB"]["share"] >= 0.9, found["misses"]
    assert set(BREAKS) < set(found["refused"])
    for name, row in found["refused"].items():
        assert row["share"] >= 0.95, (name, found["misses"])
    for name in ("edits_accepted", "unchanged_sources_refused"):
        assert all(row["share"] >= 0.9 for row in found[name].values()), found["misses"]


def test_broken_scenes_differ_from_what_was_asked(atlas):
    from unilip.files import generator

    data = Scenes(WORLD, atlas, "val", 5, 30, "tokenizer")
    seen_breaks = set()
    for i in range(30):
        scene, task, _ = data.draw(i)
        for name, breaker in BREAKS.items():
            broken = breaker(scene, task, WORLD, generator("test", i))
            if broken is not None:
                seen_breaks.add(name)
                assert broken != scene, name
    assert seen_breaks == set(BREAKS)


@pytest.mark.parametrize("decibel", [20.0, 24.0, 30.0])
def test_degrading_hits_the_decibels_asked_for(atlas, decibel):
    from unilip.pictures import picture_psnr

    picture = draw(TWO, atlas)
    assert picture_psnr(degrade(picture, decibel, np.random.default_rng(0)), picture) == pytest.approx(decibel, abs=1)
