"""The cache of what frozen parts make: the same losses as without, nothing stale, resumed, on Ray too."""

import io
import json

import pytest
import torch

from support import ShardWriter
from unilip.cli import main
from unilip.data.sources import open_source
from unilip.errors import ConfigError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.batches import iterate
from unilip.train.build import build
from unilip.train.cache import make_cache
from unilip.train.cached import ABOUT, FORMAT
from unilip.train.files import unpacked

TOLERANCE = dict(rtol=2e-6, atol=2e-6)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def place(tmp_path, picture, monkeypatch):
    """Two shards of captions, edits and conversations, one sample broken."""
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "indices"))
    writer = ShardWriter(tmp_path / "shards", "part", 5)
    for i in range(5):
        broken = i == 3
        image = b"broken" if broken else encoded(picture(40, 30, i))
        writer.write(
            f"c{i}", {"png": image, "txt": f"caption {'long ' * i}".encode(), "json": json.dumps(TALK).encode()}
        )
    for i in range(4):
        pair = {f"{part}.png": encoded(picture(30, 30, 50 + 2 * i + j)) for j, part in enumerate(("input", "output"))}
        writer.write(f"e{i}", {**pair, "txt": f"edit {'on ' * i}".encode()})
    writer.write("t", {"json": json.dumps(TALK).encode()})
    writer.close()
    return tmp_path / "shards"


def recipe_of(name, place, tiny_folder, *settings):
    return override(
        get_recipe(name),
        [
            "data.source=files",
            f"data.path={place}",
            f"init=all={tiny_folder}",
            "steps=8",
            "data.max_skipped=1",
            *settings,
        ],
    )


def losses(recipe, tmp_path):
    """The loss and gradient norm of each step, without an update between."""
    model, objective, batches = build(recipe, tmp_path)
    found = []
    for step, batch in enumerate(iterate(batches, 0)):
        model.zero_grad()
        loss, terms = objective.loss(batch, step)
        loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        found.append([float(loss.detach()), norm, *(float(v) for v in terms.values())])
        names = {*terms, *batch}
    return torch.tensor(found, dtype=torch.float64), names, batches


CASES = {
    "generation and edits": ("tiny/sft", ("data.edit_share=0.5",), ["latents", "features"]),
    "only the DiT": (
        "tiny/sft",
        ("data.edit_share=0.5", "trains=dit", "objective.drop_prompt=0.5"),
        ["latents", "conditions"],
    ),
    "few steps": ("tiny/few", ("data.edit_share=0.5",), ["latents", "conditions"]),
    "tokenizer, encoder frozen": ("tiny/recon", (), ["features"]),
    "tokenizer, distilled": ("tiny/recon_distill", ("objective.gan=0",), ["teacher"]),
    "answers": ("tiny/instruct", ("trains=mllm", "objective.contrastive=0", "objective.words=0"), ["features"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_without_a_cache(place, tiny_folder, tmp_path, case, monkeypatch):
    name, settings, wanted = CASES[case]
    recipe = recipe_of(name, place, tiny_folder, *settings)
    about = make_cache(recipe, tmp_path / "cache", tmp_path, progress=False)
    assert about["names"] == wanted and about["shards"] == 2 and about["unusable"] == 1
    plain, _, before = losses(recipe, tmp_path)
    cached = override(recipe, [f"data.cache={tmp_path / 'cache'}"])
    model, _, _ = build(cached, tmp_path)
    if "teacher" not in wanted:  # the frozen parts have nothing to do any more
        monkeypatch.setattr(type(model.encoder), "forward", lambda *a: pytest.fail("the encoder ran"))
    if "conditions" in wanted:
        monkeypatch.setattr(type(model.mllm), "forward", lambda *a: pytest.fail("the language model ran"))
    found, names, after = losses(cached, tmp_path)
    losses_of = [0, *range(2, found.shape[1])]
    torch.testing.assert_close(found[:, losses_of], plain[:, losses_of], **TOLERANCE)
    torch.testing.assert_close(found[:, 1], plain[:, 1], rtol=1e-3, atol=1e-6)  # gradients jump at kinks of the ReLUs
    assert set(wanted) - {"features"} <= names | {"features"}
    assert before.tally.skipped == after.tally.skipped and after.tally.skipped.total() > 0, "skips are the same, too"


def test_a_trained_run_is_the_same(place, tiny_folder, tmp_path):
    from unilip.train.loop import train

    recipe = recipe_of("tiny/sft", place, tiny_folder, "steps=3", "sample_every=2")
    make_cache(recipe, tmp_path / "cache", tmp_path, progress=False)
    logs = []
    for name, more in (("plain", []), ("cached", [f"data.cache={tmp_path / 'cache'}"])):
        train(override(recipe, [f"name=tiny/{name}", *more]), tmp_path, progress=False)
        lines = (tmp_path / "tiny" / name / "log.jsonl").read_text().splitlines()
        logs.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
        assert list((tmp_path / "tiny" / name / "samples").glob("*.png")), "with a sheet of pictures"
    torch.testing.assert_close(logs[0], logs[1], **TOLERANCE)


def test_half_precision_is_smaller_and_nearly_the_same(place, tiny_folder, tmp_path):
    recipe = recipe_of("tiny/sft", place, tiny_folder)
    for dtype in ("float32", "float16"):
        make_cache(recipe, tmp_path / dtype, tmp_path, dtype=dtype, progress=False)
    kinds = []
    for dtype in ("float32", "float16"):
        record = open_source(str(tmp_path / dtype)).read("edit", 1, 0)
        kinds.append({name: (a.dtype.name, a.shape) for name, a in unpacked(record.tensors).items()})
    assert {kind for kind, _ in kinds[1].values()} == {"float16"} and {kind for kind, _ in kinds[0].values()} == {
        "float32"
    }
    assert {n: s for n, (_, s) in kinds[0].items()} == {"features": (4, 64), "latents": (32, 2, 2)}
    plain, half = (losses(override(recipe, s), tmp_path)[0] for s in ([], [f"data.cache={tmp_path / 'float16'}"]))
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0.02)
    assert not torch.equal(half, plain)


def test_an_interrupted_cache_goes_on(place, tiny_folder, tmp_path):
    recipe = recipe_of("tiny/sft", place, tiny_folder)
    cache = tmp_path / "cache"
    assert make_cache(recipe, cache, tmp_path, progress=False)["shards"] == 2
    kept = (cache / "s00-000000.tar").stat().st_mtime_ns
    (cache / "s00-000001.tar").unlink()
    with pytest.raises(ConfigError, match="is not finished: 1 of 2 shards"):
        build(override(recipe, [f"data.cache={cache}"]), tmp_path)
    assert make_cache(recipe, cache, tmp_path, progress=False)["shards"] == 1
    assert (cache / "s00-000000.tar").stat().st_mtime_ns == kept
    build(override(recipe, [f"data.cache={cache}"]), tmp_path)


def test_a_cache_that_does_not_fit_is_refused(place, tiny_folder, tmp_path, fresh_model, picture):
    recipe = recipe_of("tiny/sft", place, tiny_folder)
    cache = tmp_path / "cache"
    make_cache(recipe, cache, tmp_path, progress=False)
    use = override(recipe, [f"data.cache={cache}"])

    def refused(changed, message):
        with pytest.raises(ConfigError, match=message):
            build(changed, tmp_path)

    refused(override(use, ["data.fit=pad"]), r"other settings: data.fit \(auto there, pad here\)")
    refused(override(use, ["trains=dit,encoder"]), "holds features, latents, which change while")
    fresh_model(seed=9).save_pretrained(tmp_path / "other")
    refused(override(use, [f"init=all={tmp_path / 'other'}"]), "other weights of encoder, latent_head")
    refused(override(use, ["config=image_size=84"]), "other weights of .*image size")
    refused(override(use, [f"data.cache={tmp_path / 'nothing'}"]), "is no cache")
    other = tmp_path / "more"
    other.mkdir()
    picture().save(other / "a.png")
    (other / "a.txt").write_text("more")
    refused(override(use, [f"data.path={place},{other}"]), "has nothing of .*more")
    with pytest.raises(ConfigError, match="differs in settings"):
        make_cache(override(recipe, ["data.fit=pad"]), cache, tmp_path, progress=False)
    about = json.loads((cache / ABOUT).read_text())
    (cache / ABOUT).write_text(json.dumps(about | {"format": 99}))
    refused(use, "has the format 99")
    for broken in ("[]", "null", json.dumps({"format": FORMAT})):
        (cache / ABOUT).write_text(broken)
        refused(use, "is no cache")
    (cache / ABOUT).write_text(json.dumps(about))
    writer = ShardWriter(place, "part", 5)
    writer.write("c0", {"png": encoded(picture()), "txt": b"one only"})
    writer.close()
    refused(use, "other samples lie there")


def test_nothing_to_cache_is_said(place, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="no cache helps"):
        make_cache(recipe_of("tiny/sft", place, tiny_folder, "trains=encoder,dit"), tmp_path / "c", tmp_path)
    with pytest.raises(ConfigError, match=r"a cache is made of data\.source=files"):
        make_cache(get_recipe("tiny/sft"), tmp_path / "c", tmp_path)
    with pytest.raises(ConfigError, match="allowed: float32, float16"):
        make_cache(recipe_of("tiny/sft", place, tiny_folder), tmp_path / "c", tmp_path, dtype="int8")


@pytest.mark.slow
def test_ray_makes_the_same_cache(place, tiny_folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "600")  # a busy machine starts it slowly
    recipe = recipe_of("tiny/sft", place, tiny_folder)
    make_cache(recipe, tmp_path / "alone", tmp_path, progress=False)
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        about = make_cache(recipe, tmp_path / "ray", tmp_path, ray=1, progress=False)
    finally:
        ray.shutdown()
    assert about["shards"] == 2 and about["unusable"] == 1
    for file in sorted((tmp_path / "alone").iterdir()):
        assert (tmp_path / "ray" / file.name).read_bytes() == file.read_bytes()


def test_the_command(place, tiny_folder, tmp_path, capsys):
    words = ["data", "cache", "tiny/sft", "--device", "cpu", "--runs", str(tmp_path), "--no-progress"]
    for setting in ("data.source=files", f"data.path={place}", f"init=all={tiny_folder}"):
        words += ["--set", setting]
    assert main(words) == 2 and "no --output" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "cache"), "--dtype", "float16", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["names"] == ["latents", "features"] and out["dtype"] == "float16" and out["unusable"] == 1
    assert main([*words, "--output", str(tmp_path / "cache"), "--json"]) == 2, "another dtype in the same folder"
    assert "differs in dtype" in capsys.readouterr().err
