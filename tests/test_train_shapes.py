"""Aspect buckets: batches of several shapes in one run, its order, resuming, ten steps of two kinds of stage."""

import pytest
import torch
from safetensors.torch import load_file

from support import ShardWriter
from unilip.errors import ConfigError, DataError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.build import make_batches
from unilip.train.loop import train

SHAPES = "84x56,56x56,28x84"
SIZES = [(84, 56), (56, 56), (28, 84)]


@pytest.fixture
def place(tmp_path, picture, monkeypatch):
    from test_train_data import encoded

    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "cache"))
    writer = ShardWriter(tmp_path / "data", "part", 8)
    for i in range(6):
        writer.write(f"c{i}", {"png": encoded(picture(90, 60, i)), "txt": b"a star"})
        pair = {f"{part}.png": encoded(picture(60, 90, 9 * i + j)) for j, part in enumerate(("input", "output"))}
        writer.write(f"e{i}", {**pair, "txt": b"make it red"})
    writer.close()
    return tmp_path / "data"


def recipe(place, name, *settings):
    small = ["data.source=files", f"data.path={place}", f"data.shapes={SHAPES}", "batch_size=2", "data.workers=0"]
    return override(get_recipe(name), [*small, *settings])


def size_of(batch, name="targets"):
    return batch[name].shape[-1], batch[name].shape[-2]


def test_a_step_has_one_shape_and_a_run_all_of_them(place, tiny_model):
    given = recipe(place, "tiny/sft", "accumulate=2", "data.edit_share=0.5", "objective.drop_prompt=0.2")
    batches, again = (make_batches(given, tiny_model.config, tiny_model.processor) for _ in range(2))
    found = []
    for step in range(24):
        first, second = batches[2 * step], batches[2 * step + 1]
        assert size_of(first) == size_of(second)
        found.append(size_of(first))
        for batch in (first, second):
            slots = batch["prompts"].image_slots.sum(1).tolist()
            edits = "sources" in batch
            assert not edits or size_of(batch, "sources") == size_of(batch)
            assert slots == [found[-1][0] * found[-1][1] // 784 * edits] * 2
    assert set(found) == set(SIZES)
    for step in (23, 7):  # whatever was read before: as a run that resumes does
        assert torch.equal(again[2 * step]["targets"], batches[2 * step]["targets"])
    other = make_batches(override(given, ["seed=1"]), tiny_model.config, tiny_model.processor)
    assert [size_of(other[2 * step]) for step in range(24)] != found


@pytest.mark.parametrize("name", ["tiny/sft", "tiny/recon"])
def test_ten_steps_and_resuming(name, place, tiny_folder, tmp_path):
    parts = {"tiny/sft": "encoder,latent_head,pixel_decoder,mllm,connector,dit", "tiny/recon": "encoder"}[name]
    settings = [f"init={parts}={tiny_folder}", "steps=10", "sample_every=5", "log_every=1", "save_every=4"]
    settings += ["data.edit_share=0.5"] if name == "tiny/sft" else []
    whole = train(recipe(place, name, *settings, "name=a/whole"), tmp_path, progress=False)
    train(recipe(place, name, *settings, "name=a/parts"), tmp_path, progress=False, stop_after=4)
    parts = train(recipe(place, name, *settings, "name=a/parts"), tmp_path, progress=False)
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files
    for file in files:
        tensors, others = load_file(whole / file), load_file(parts / file)
        assert all(tensor.isfinite().all() and torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_the_emoji_world_in_shapes(tiny_model):
    given = override(get_recipe("tiny/shapes"), ["accumulate=2", "batch_size=3"])
    batches, again = (make_batches(given, tiny_model.config, tiny_model.processor) for _ in range(2))
    found = {}
    for step in range(16):
        first, second = batches[2 * step], batches[2 * step + 1]
        assert size_of(first) == size_of(second)
        edits = "sources" in first
        assert not edits or size_of(first, "sources") == size_of(first)
        assert (
            first["prompts"].image_slots.sum(1).tolist() == [size_of(first)[0] * size_of(first)[1] // 784 * edits] * 3
        )
        found.setdefault((size_of(first), edits), step)
    assert {size for size, _ in found} == {(56, 84), (56, 56), (84, 56)} and len(found) > 4
    for step in sorted(found.values(), reverse=True):  # whatever was read before
        assert torch.equal(again[2 * step]["targets"], batches[2 * step]["targets"])
    plain = make_batches(get_recipe("tiny/sft"), tiny_model.config, tiny_model.processor)
    square = make_batches(
        override(get_recipe("tiny/sft"), ["data.shapes=56x56"]), tiny_model.config, tiny_model.processor
    )
    for index in range(4):  # a square among shapes is the same square
        assert torch.equal(plain[index]["targets"], square[index]["targets"])
    with pytest.raises(DataError, match="84x28"):
        make_batches(override(given, ["data.shapes=84x28"]), tiny_model.config, tiny_model.processor)


def test_shapes_that_cannot_be_are_refused(place):
    cases = {
        "tiny/sft data.shapes=90x56": "write 84x56", "tiny/sft data.shapes=56by56": "no size",
        "tiny/sft data.shapes=0x56": "between 28", "tiny/sft data.cache=x": "data.cache",
        "tiny/sft data.source=emoji objective.bind=0.1": "objective.bind=0",
        "tiny/sft data.image_size=56": "data.image_size", "tiny/clip": "read as a square",
        "tiny/sft objective.target=dcae": "objective.target=unilip",
    }  # fmt: skip
    for words, message in cases.items():
        name, *settings = words.split()
        with pytest.raises(ConfigError, match=message):
            recipe(place, name, *settings)
