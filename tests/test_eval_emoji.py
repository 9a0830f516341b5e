"""The evaluation in the emoji world with an untrained tiny model: its folder, its pages, and going on with it.

In: the tiny model and world. Out: results, compared between runs, and what a perfect and a broken model would get.
"""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unilip.chat import joined
from unilip.emoji import score as emoji
from unilip.emoji.art import Atlas
from unilip.emoji.dataset import Edits, pixels
from unilip.emoji.edits import sample_chain
from unilip.emoji.questions import KINDS
from unilip.emoji.report import write_report
from unilip.emoji.score import (
    PARTS,
    Bench,
    accepts,
    evaluate,
    measure_features,
    normalise,
)
from unilip.emoji.world import Scene, World
from unilip.errors import UniLIPError
from unilip.eval.compare import load_runs, make_tables
from unilip.files import generator
from unilip.pictures import picture_psnr, picture_ssim

WORLD = World.tiny()
SMALL = dict(count=1, seeds=1, steps=1, progress=False)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return folder, evaluate(tiny_model, folder, **SMALL)


# --- measures -------------------------------------------------------------------------------------------------------


def test_psnr():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert picture_psnr(black, black) == 100.0
    assert picture_psnr(black, white) == pytest.approx(0.0)
    half = black.copy()
    half[:2] = 255
    where = np.zeros((4, 4), bool)
    where[:2] = True
    assert picture_psnr(black, half, ~where) == 100.0
    assert picture_psnr(black, half) == pytest.approx(10 * np.log10(2), abs=1e-4)


def test_ssim_is_that_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    theirs = skimage.structural_similarity(
        a / 255.0, b / 255.0, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert picture_ssim(a, b) == pytest.approx(theirs, abs=1e-6)
    assert picture_ssim(a, a) == pytest.approx(1.0)


def test_feature_distance():
    features = torch.randn(4, 8)
    assert measure_features(features, 3 * features) == pytest.approx(0.0, abs=1e-6)
    assert measure_features(features, -features) == pytest.approx(2.0, abs=1e-6)


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_compared_in_what_counts():
    assert normalise("  Two   Cats. ") == "two cats"
    assert accepts("A cat.", ("a cat", "cat")) and accepts("the cat", ("a cat",))
    assert not accepts("two cats", ("a cat", "cat")) and not accepts("", ("a cat",))


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_writes_all_it_promises(finished):
    folder, results = finished
    for name in ("results.json", "results.md", "index.html", "items.jsonl", "run.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "results.json").read_text()) == results
    assert "emoji-joint" not in results, "which the model has not learned"
    for part in PARTS[:-1]:
        assert 0 <= results[f"emoji-{part}"]["right"] <= 1
    assert set(results["emoji-vqa"]["groups"]) == set(KINDS) - {"style"}
    assert {"two, seen", "two, unseen", "single, seen"} <= set(results["emoji-gen"]["groups"])
    assert "no guidance" in results["emoji-gen"]
    assert "swapped prompts" not in results["emoji-gen"], "with one prompt a group there is none to swap it with"
    assert (
        "as captions" in results["emoji-gen"]["as people write"]
        and "as people write" not in results["emoji-gen"]["groups"]
    )
    assert set(results["emoji-riddle"]["groups"]) == {"riddles met in training", "riddles never met in training"}
    row = results["emoji-recon"]["groups"]["held-out scenes"]
    assert row["psnr"] < 30 and -1 <= row["ssim"] <= 1 and row["feature_distance"] > 0
    assert set(results["emoji-edit"]["groups"]) >= {f"{kind}, seen" for kind in WORLD.edits}
    assert list(results["emoji-shapes"]["groups"]) == [
        f"{what}, {size}" for size in ("56x84", "84x56") for what in ("pictures", "edits")
    ]
    chain = results["emoji-chain"]["groups"]
    assert list(chain) == [
        "1 in a row", "3 in a row", "5 in a row", "3 in a row, from the original", "5 in a row, from the original",
    ]  # fmt: skip
    assert all(row["psnr_outside"] > 0 and row["psnr_outside_reconstruction"] > 0 for row in chain.values())
    for line in (folder / "items.jsonl").read_text().splitlines():
        assert (folder / json.loads(line)["picture"]).is_file()
    page = (folder / "index.html").read_text()
    assert page.count("<figure>") > 10 and "http" not in page
    assert "| group |" in (folder / "results.md").read_text()


def test_the_pages_hold_hostile_words_as_words(finished, tmp_path):
    _, results = finished
    bad, quoted = "<script>alert('1')</script>", '"><img src=x onerror=a>'
    record = {"group": bad, "ok": False, "index": 0, "text": quoted, "reason": bad, "picture": f"{quoted}.png"}
    write_report(tmp_path, results | {"model": bad, "device": bad}, {"gen": [record, record | {"ok": True}]})
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") == 6
    assert page.index('class="right"') < page.index('class="wrong"') and page.count("<figure>") == 2


def test_a_comparison_tells_the_same_shares(finished):
    folder, results = finished
    shares = {run.summary["task"]: run.summary["scores"][""]["right"]["value"] for run in load_runs([folder])}
    parts = [f"emoji-{part}" for part in PARTS if part != "joint"]
    assert shares == {part: pytest.approx(results[part]["right"], abs=1e-4) for part in parts}


def test_a_comparison_leaves_out_what_an_earlier_run_asked_besides(tiny_model, tmp_path):
    def shares(folder):
        return {run.column: (run.summary["scores"][""]["right"]["items"], len(run.rows)) for run in load_runs([folder])}

    few = {**SMALL, "parts": ("vqa", "riddle")}
    evaluate(tiny_model, tmp_path / "fresh", **few)
    evaluate(tiny_model, tmp_path / "used", **{**few, "count": 2, "seeds": 2})
    evaluate(tiny_model, tmp_path / "used", **{**SMALL, "parts": ("joint", "gen"), "count": 2})
    assert {column.split()[0] for column in shares(tmp_path / "used")} == {"emoji-gen", "emoji-joint"}
    evaluate(tiny_model, tmp_path / "used", **few)
    assert shares(tmp_path / "used") == shares(tmp_path / "fresh")
    lines = (tmp_path / "used" / "items.jsonl").read_text().splitlines()
    (tmp_path / "used" / "items.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UniLIPError, match=r"is not what results\.json was made of"):
        load_runs([tmp_path / "used"])


def test_pictures_judged_by_other_art_are_in_another_table(finished, tmp_path):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "results.json").write_text(json.dumps(results | {"atlas": "another"}))
    tables = make_tables(load_runs([folder, tmp_path / "other"]))
    assert len(tables) == 2 * len([part for part in PARTS if f"emoji-{part}" in results])


def test_a_finished_run_draws_nothing_again(finished, tiny_model, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(Bench, "perform", lambda *_: pytest.fail("an item was made again"))
    again = evaluate(tiny_model, folder, **SMALL)
    assert {**again, "date": ""} == {**results, "date": ""}


def test_an_interrupted_run_goes_on_to_the_same_results(finished, tiny_model, tmp_path, monkeypatch):
    _, results = finished
    perform, calls = Bench.perform, []

    def fail_later(self, items):
        calls.append(len(items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return perform(self, items)

    parts = ("recon", "gen")
    monkeypatch.setattr(Bench, "perform", fail_later)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, tmp_path, parts=parts, batch_size=5, **SMALL)
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    assert lines
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + '\n{"key": "half a li')
    monkeypatch.setattr(Bench, "perform", perform)
    again = evaluate(tiny_model, tmp_path, parts=parts, batch_size=7, **SMALL)
    assert again["emoji-gen"] == results["emoji-gen"]
    assert again["emoji-recon"]["groups"]["held-out scenes"]["psnr"] == pytest.approx(
        results["emoji-recon"]["groups"]["held-out scenes"]["psnr"], abs=0.01
    )


def test_more_items_keep_those_that_are_there(tiny_model, tmp_path):
    def lines(folder, part, count):
        evaluate(tiny_model, folder, parts=(part,), **{**SMALL, "count": count})
        return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]

    before, after = (lines(tmp_path / "vqa", "vqa", count) for count in (1, 2))
    assert [row for row in after if row["key"] in {row["key"] for row in before}] == before and len(after) > len(before)
    # a key is another prompt's where there are more prompts before it: it is drawn, too
    (_, grown), fresh = [lines(tmp_path / "grown", "riddle", n) for n in (1, 2)], lines(tmp_path / "new", "riddle", 2)
    told = [sorted((row["key"], row["group"], row["text"]) for row in rows) for rows in (grown, fresh)]
    assert told[0] == told[1] and len(told[0]) == 4


def test_another_run_in_the_same_folder_is_refused(finished, tiny_model, fresh_model, tmp_path):
    folder, _ = finished
    with pytest.raises(UniLIPError, match="steps"):
        evaluate(tiny_model, folder, **{**SMALL, "steps": 2})
    with pytest.raises(UniLIPError, match="model"):
        evaluate(fresh_model(seed=1), folder, **SMALL)
    retold = copy.deepcopy(tiny_model)
    retold.processor.tokenizer.files["tokenizer_config.json"] = b"{}"
    with pytest.raises(UniLIPError, match="another run: tokenizer"):
        evaluate(retold, folder, **SMALL)
    evaluate(tiny_model, tmp_path, parts=("riddle",), preset="fast", **SMALL)
    with pytest.raises(UniLIPError, match=r"preset \(fast there, None here\)"):
        evaluate(tiny_model, tmp_path, parts=("riddle",), **SMALL)


def test_what_cannot_be_is_refused(tiny_model, tmp_path, fresh_model):
    with pytest.raises(UniLIPError, match="allowed: recon, vqa"):
        evaluate(tiny_model, tmp_path, parts=("geneval",), **SMALL)
    with pytest.raises(UniLIPError, match="112"):
        evaluate(tiny_model, tmp_path, World.pico(), Atlas.synthetic(World.pico()), **SMALL)
    with pytest.raises(UniLIPError, match="at least 1"):
        evaluate(tiny_model, tmp_path, **{**SMALL, "count": 0})
    with pytest.raises(UniLIPError, match="needs"):
        evaluate(fresh_model(parts=("encoder", "latent_head", "pixel_decoder")), tmp_path, parts=("gen",), **SMALL)
    with pytest.raises(UniLIPError, match="84"):
        evaluate(fresh_model(image_size=84), tmp_path, **SMALL)


def test_a_tokenizer_alone_is_measured_in_what_it_can(fresh_model, tmp_path):
    results = evaluate(fresh_model(parts=("encoder", "latent_head", "pixel_decoder")), tmp_path, **SMALL)
    assert "emoji-recon" in results and "emoji-gen" not in results


# --- models that are right or wrong ---------------------------------------------------------------------------------


class Painter:
    """Stands in for a model: reads the prompt's scene off the bench's plan and draws it, or something else."""

    def __init__(self, model, bench, wrong: bool = False):
        self.config, self.parts, self.encoder, self.device = model.config, model.parts, model.encoder, model.device
        self.features = model.features
        self.bench, self.wrong = bench, wrong
        self.scenes = {item.data["prompt"]: item.data["scene"] for item in bench.plan("gen")}
        self.edits = {}
        for item in bench.plan("edit"):
            entry = Edits(
                WORLD, bench.atlas, "val", emoji.DATA_SEED, bench.count, (item.data["kind"],), item.data["seen"]
            )
            pair = entry[item.index]
            self.edits[pair["source"].tobytes(), pair["instruction"]] = pair["target"]
        for i in range(bench.count):
            row = sample_chain(WORLD, generator("chain", emoji.DATA_SEED, i), emoji.DEPTHS[-1])
            shown = [pixels(scene, bench.atlas, WORLD) for scene in (row[0].source, *(edit.target for edit in row))]
            for depth, edit in enumerate(row):
                self.edits[shown[depth].tobytes(), edit.instruction] = shown[depth + 1]
                told = joined([edit.instruction for edit in row[: depth + 1]])
                self.edits[shown[0].tobytes(), told] = shown[depth + 1]

        for i in range(bench.count):
            pair = Edits(WORLD, bench.atlas, "val", emoji.DATA_SEED, bench.count).joint(i)
            self.edits[pair["source"].tobytes(), pair["instruction"]] = pair["target"]
        for item in bench.plan("shapes"):
            world = WORLD.shaped(item.data["size"])
            if "scene" in item.data:
                self.scenes[item.data["prompt"], item.data["size"]] = item.data["scene"]
            else:
                source, target = (
                    pixels(scene, bench.atlas, world) for scene in (item.data["edit"].source, item.data["edit"].target)
                )
                self.edits[source.tobytes(), item.data["edit"].instruction] = target

    def generate(self, prompts, width=None, height=None, **_):
        if width:
            shown = [self.scenes[p, (width, height)] for p in prompts]
            shown = [Scene(scene.background, ()) for scene in shown] if self.wrong else shown
            world = WORLD.shaped((width, height))
            return SimpleNamespace(images=[pixels(scene, self.bench.atlas, world) for scene in shown])
        names = [name for name in self.scenes if isinstance(name, str)]
        shown = [names[(names.index(p) + self.wrong) % len(names)] for p in prompts]
        return SimpleNamespace(images=[pixels(self.scenes[p], self.bench.atlas, WORLD) for p in shown])

    def edit(self, sources, prompts, joint=False, **_):
        sources = sources[:1] if joint else sources
        return SimpleNamespace(
            images=[s if self.wrong else self.edits[s.tobytes(), p] for s, p in zip(sources, prompts, strict=True)]
        )

    def reconstruct(self, pictures, **_):
        return SimpleNamespace(images=[np.zeros_like(p) if self.wrong else p for p in pictures])


@pytest.mark.parametrize("wrong", [False, True])
def test_a_perfect_model_is_right_and_a_deaf_one_is_wrong(tiny_model, wrong):
    bench = Bench(tiny_model, WORLD, Atlas.synthetic(WORLD), count=1 if wrong else 2, seeds=1)
    bench.model = Painter(tiny_model, bench, wrong)
    for part in ("recon", "gen", "edit", "chain", "shapes", "joint"):
        items = bench.plan(part)
        records = [
            {**record, "key": item.key, "group": item.group, "index": item.index, "mode": item.mode}
            for batch in emoji._batches(items, 100)
            for item, (record, _) in zip(batch, bench.perform(batch), strict=True)
        ]
        found = emoji.summarise(part, records, WORLD)
        if wrong:
            assert found["right"] <= 0.1, (part, found)
        else:
            assert found["right"] >= 0.95, (part, [r["reason"] for r in records if not r["ok"]])
            if part == "gen":
                assert found["swapped prompts"] <= 0.1
                assert found[emoji.WRITTEN]["right"] >= 0.9 and found[emoji.WRITTEN]["as captions"] >= 0.9
            if part in ("edit", "chain", "shapes"):
                assert all(row.get("psnr_outside", 100) == 100 for row in found["groups"].values())


def test_noise_belongs_to_the_picture_not_to_the_batch(tiny_model):
    bench = Bench(tiny_model, WORLD, Atlas.synthetic(WORLD), count=1, seeds=2, steps=1)
    items = [item for item in bench.plan("gen") if not item.mode][:3]
    together = bench._draw(items)
    alone = [bench._draw([item])[0] for item in items]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 1  # another seed


def test_scenes_survive_the_items_file():
    scene = Scene("white", ())
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_as_people_write_is_the_same_wish_with_the_same_noise(tiny_model, monkeypatch):
    bench = Bench(tiny_model, WORLD, Atlas.synthetic(WORLD), count=2, seeds=1)
    items = [item for item in bench.plan("gen") if item.group == emoji.WRITTEN]
    assert len(items) == 2 * len([g for g in bench._generation_groups() if g.endswith(", seen")])
    forms = [form("a red car on a pink background") for form in emoji.FORMS]
    assert len(set(forms)) == len(forms) and all("red" in form.lower() for form in forms)
    drawn = []
    monkeypatch.setattr(emoji, "noise_generator", lambda *parts: drawn.append(parts))
    monkeypatch.setattr(type(bench.model), "generate", lambda *_, **__: SimpleNamespace(images=[]))
    bench._draw(items)
    assert [parts[0] for parts in drawn] == [item.data["noise"] for item in items]
    assert all(item.data["prompt"] != item.data["noise"] for item in items[:3])
