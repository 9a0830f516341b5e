"""Few-step weights: they start as exactly the model that was; the preset turbo, what it refuses; their adapters."""

import copy
import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from method_support import apart
from support import failures
from unilip import cli
from unilip.adapters import read_adapter
from unilip.errors import CheckpointError, ConfigError, UniLIPError
from unilip.fast.loop import Settings
from unilip.fewstep import add_embedder, few_config
from unilip.info import describe
from unilip.method.config import DiTConfig, UniLIPConfig
from unilip.model import UniLIP
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.sizes import preset
from unilip.train.adapters import add_adapter
from unilip.train.build import build_model, recipe_config, trained_parameters
from unilip.train.loop import train

STEPS = (4, 2, 1)
Build = Callable[..., UniLIP]


@pytest.fixture
def few_model(fresh_model: Build) -> UniLIP:
    """A tiny model with few-step weights that do something."""
    model = fresh_model()
    add_embedder(model.dit)
    model.config = few_config(model.config, STEPS)
    embedder: Any = model.dit.transformer.time_embed_2
    with torch.no_grad():
        for parameter in embedder.parameters():
            parameter.mul_(20)
    return model


def draw(model: UniLIP, prompt: Any = "a red star", seed: Any = 3, **settings: Any) -> Tensor:
    images: Tensor = model.generate(prompt, generator=seed, output_type="latent", progress=False, **settings).images
    return images


# --- the model ----------------------------------------------------------------------------------------------------


def test_a_jump_to_its_own_start_is_the_velocity_that_was_and_others_are_not(
    few_model: UniLIP, tiny_model: UniLIP
) -> None:
    latent, mask = torch.randn(3, 32, 2, 2), torch.ones(3, 5)
    condition, times = torch.randn(3, 5, 48), torch.tensor([1000.0, 437.5, 1.0])
    with torch.no_grad():
        plain = tiny_model.dit(latent, times, condition, mask)
        assert torch.equal(few_model.dit(latent, times, condition, mask), plain)
        assert torch.equal(few_model.dit(latent, times, condition, mask, times), plain)
        assert torch.equal(few_model.dit.modulate(times, times), tiny_model.dit.modulate(times))
        assert apart(few_model.dit(latent, times, condition, mask, times / 2), plain) > 1e-3
        embedder: Any = few_model.dit.transformer.time_embed_2
        for parameter in embedder.parameters():
            parameter.zero_()
        assert torch.equal(few_model.dit(latent, times, condition, mask, times / 2), plain)
    with pytest.raises(UniLIPError, match="no few-step weights"):
        tiny_model.dit(latent, times, condition, mask, times)


def test_many_steps_of_few_step_weights_are_those_of_the_model_that_was(few_model: UniLIP, tiny_model: UniLIP) -> None:
    for settings in ({}, {"preset": "fast"}, {"solver": "unipc", "num_inference_steps": 5}):
        assert torch.equal(draw(few_model, guidance_scale=4.5, **settings), draw(tiny_model, **settings))
    assert torch.equal(draw(few_model), draw(tiny_model, guidance_scale=1.0))  # by default no guidance on top


def test_configs_and_weights_belong_together(few_model: UniLIP, tiny_folder: Any, tmp_path: Any) -> None:
    few_model.save_pretrained(tmp_path / "few")
    again = UniLIP.from_pretrained(tmp_path / "few")
    assert again.config == few_model.config and torch.equal(
        draw(again, preset="turbo"), draw(few_model, preset="turbo")
    )
    assert describe(tmp_path / "few")["few_steps"].startswith("4, 2, 1")
    assert describe(tiny_folder)["few_steps"].startswith("none")
    assert "few_steps" not in (tiny_folder / "config.json").read_text()
    for config, weights in ((tiny_folder, tmp_path / "few"), (tmp_path / "few", tiny_folder)):
        mixed = tmp_path / f"mixed{config.name}"
        mixed.mkdir()
        (mixed / "config.json").write_bytes((config / "config.json").read_bytes())
        (mixed / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"^[^\n]*time_embed_2[^\n]*dit.few_steps[^\n]*$"):
            UniLIP.from_pretrained(mixed)


def test_the_config_says_in_how_many_steps() -> None:
    assert UniLIPConfig.from_dict(few_config(preset("tiny"), STEPS).to_dict()).dit.few_steps == STEPS
    wrong: list[Any] = [(0,), (4, -1), (4, 4), (1001,)]
    assert len(failures(lambda steps: DiTConfig(few_steps=steps), wrong)) == len(wrong)
    with pytest.raises(ConfigError, match="few_steps"):
        UniLIPConfig.from_dict({"dit": {"few_steps": 4}})


# --- sampling -----------------------------------------------------------------------------------------------------


def plainly(model: UniLIP, tokens: Any, noise: Tensor, steps: int, features: Tensor | None = None) -> Tensor:
    """The jumps as they are written down, by the plain transformer."""
    condition, mask = model.condition(tokens, features)
    x, even = noise.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for s, r in pairwise(2 * even / (1 + even)):  # bent by a shift of 2
        times = (1000 * level.float().expand(len(x)) for level in (s, r))
        x = x - (s - r) * model.dit(x.float(), next(times), condition, mask, next(times))
    return x.float()


@torch.no_grad()
def test_turbo_jumps(few_model: UniLIP, picture: Callable[..., Any]) -> None:
    """In every number of steps, generation and edits, in batches, by seeds, under callbacks, compiled."""
    processor, wrong = few_model.processor, list[str]()
    assert processor is not None
    prompts = ["a red star", "two long green trains"]
    noise = torch.stack([torch.randn(32, 2, 2, generator=torch.Generator().manual_seed(n)) for n in (3, 4)])
    pixels = few_model.encode([picture(seed=0), picture(seed=1)])
    texts = {"generate": processor.generate_text, "edit": processor.edit_text}
    for task, write in texts.items():
        features = pixels if task == "edit" else None
        for steps in STEPS:
            tokens = processor.tokenize([write(prompt) for prompt in prompts])
            expected = plainly(few_model, tokens, noise, steps, features)
            settings: dict[str, Any] = dict(preset="turbo", num_inference_steps=steps, output_type="latent")

            def run(chosen: slice = slice(None), task: str = task, given: Any = settings, **more: Any) -> Tensor:
                images = [picture(seed=0), picture(seed=1)][chosen]
                call = few_model.generate if task == "generate" else lambda *a, **k: few_model.edit(images, *a, **k)
                found: Tensor = call(prompts[chosen], generator=[3, 4][chosen], progress=False, **given, **more).images
                return found

            for what, found, wanted in (
                ("together", run(), expected),
                ("again", run(), run()),
                ("alone", run(slice(1, 2)), expected[1:]),
                ("watched", run(callback_on_step_end=lambda *_: None), expected),
                ("replaced", run(callback_on_step_end=lambda *given: {"latents": given[3]["latents"] * 1}), expected),
            ):
                if not apart(found, wanted) < 2e-6 * wanted.abs().max():  # latents of one jump reach 15
                    wrong.append(f"{task} in {steps} steps {what}: {apart(found, wanted):.1e}")
    assert not wrong, "\n".join(wrong)
    assert torch.equal(draw(few_model, preset="turbo"), draw(few_model, preset="turbo", num_inference_steps=4))
    assert apart(draw(few_model, preset="turbo", seed=4), draw(few_model, preset="turbo")) > 0.1
    told: list[tuple[int, int]] = []
    draw(few_model, preset="turbo", callback_on_step_end=lambda _, i, t, __: told.append((i, int(t))))
    assert told == [(0, 1000), (1, 857), (2, 666), (3, 400)]
    before = draw(few_model, preset="turbo")
    few_model.compile(backend="eager")
    assert apart(draw(few_model, preset="turbo"), before) < 1e-5


def test_turbo_from_everywhere(few_model: UniLIP, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline, the command line and the server's queue draw the same picture, and refuse the same."""
    from unilip.pipeline import UniLIPPipeline
    from unilip.serve.engine import Engine, Generate

    few_model.save_pretrained(tmp_path / "few")
    settings: dict[str, Any] = dict(preset="turbo", generator=7)
    expected = few_model.generate("a red star", progress=False, **settings)[0]
    assert UniLIPPipeline(few_model)("a red star", **settings).images[0].tobytes() == expected.tobytes()
    words = ["generate", "a red star", "--model", str(tmp_path / "few"), "--preset", "turbo", "--seed", "7"]
    assert cli.main([*words, "--output", str(tmp_path / "one.png"), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["num_inference_steps"] == 4
    assert Image.open(tmp_path / "one.png").convert("RGB").tobytes() == expected.tobytes()
    assert cli.main([*words, "--steps", "3", "--output", str(tmp_path / "two.png"), "--device", "cpu"]) == 2
    assert "4, 2, 1" in capsys.readouterr().err and not (tmp_path / "two.png").exists()
    with Engine(few_model) as engine:
        done = engine.submit(Generate("a red star", seed=7, preset="turbo")).result()
        assert done.images[0].tobytes() == expected.tobytes() and done.settings["preset"] == "turbo"
        for job in (Generate("a", preset="turbo", guidance_scale=3.0), Generate("a", preset="turbo", steps=5)):
            with pytest.raises(UniLIPError, match="with the preset turbo"):
                engine.submit(job)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"num_inference_steps": 3}, "num_inference_steps is 3.*4, 2, 1"),
    "guidance": ({"guidance_scale": 4.5}, "guidance_scale is 4.5.*learned what guidance would do"),
    "solver": ({"solver": "dpm++"}, "jumps without one"),
    "negative prompt": ({"negative_prompt": "a cat"}, "needs guidance"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_turbo_has_no_use_for_is_refused(few_model: UniLIP, picture: Callable[..., Any], what: str) -> None:
    given, said = REFUSED[what]
    with pytest.raises(UniLIPError, match=said):
        draw(few_model, preset="turbo", **given)
    with pytest.raises(UniLIPError, match=said):
        few_model.edit(picture(), "make it blue", preset="turbo", **given)


# --- training, and adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny/few", "tiny/few_lora"])
def test_a_run_makes_few_step_weights_and_resumes_bit_for_bit(
    fresh_model: Build, tmp_path: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, before = fresh_model(), draw(fresh_model())
    base.save_pretrained(tmp_path / "base")
    settings = [f"init=all={tmp_path / 'base'}", "steps=3", "save_every=1", "sample_every=3", "data.edit_share=0.5"]

    def run(folder: str, stop: int | None = None) -> Any:
        return train(
            override(get_recipe(name), [*settings, f"name=x/{folder}"]), tmp_path, progress=False, stop_after=stop
        )

    whole = run("whole")
    run("parts", 1)
    parts = run("parts")
    files = [file.name for file in whole.glob("*.safetensors")]
    assert files and all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)
    assert list((tmp_path / "x" / "whole" / "samples").glob("*.png"))
    if name == "tiny/few":
        model = UniLIP.from_pretrained(whole)
        assert model.config.dit.few_steps == STEPS and model.config.sampling.guidance_scale == 1
        assert draw(model, preset="turbo").isfinite().all()
        return
    names = [layer for layer in read_adapter(whole).tensors if "time_embed" in layer]
    assert len(names) == 6, "three layers of each time embedder"
    assert describe(whole)["few_steps"] == [4, 2, 1]
    weights = set(base.state_dict())
    base.load_adapter(whole, "quick")
    turbo = draw(base, preset="turbo")
    assert turbo.isfinite().all() and base.config.sampling.guidance_scale == 1
    base.set_adapters({})
    assert torch.equal(draw(base), before)
    with pytest.raises(UniLIPError, match="few-step weights"):
        draw(base, preset="turbo")
    base.set_adapters({"quick": 1.0})
    assert torch.equal(draw(base, preset="turbo"), turbo)
    merged: Any = copy.deepcopy(base)
    base.unload_adapters()
    assert set(base.state_dict()) == weights and base.config == preset("tiny") and torch.equal(draw(base), before)
    two = copy.deepcopy(merged)
    two.load_adapter(whole, "twin", 0.0)
    two.unload_adapters(["quick"])
    assert two.config == preset("tiny") and torch.equal(draw(two), before)
    idle = copy.deepcopy(merged)
    idle.set_adapters({"quick": 0.0})
    idle.merge_adapters()
    assert set(idle.state_dict()) == weights and idle.config == preset("tiny")
    merged.merge_adapters()
    merged.save_pretrained(tmp_path / "merged")
    assert apart(draw(UniLIP.from_pretrained(tmp_path / "merged"), preset="turbo"), turbo) < 1e-5
    broken = fresh_model()
    monkeypatch.setattr("unilip.adapters.put_in", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(UniLIPError, match="could not be put"):
        broken.load_adapter(whole)
    assert set(broken.state_dict()) == weights and broken.config == preset("tiny")
    monkeypatch.undo()
    from unilip.serve.engine import Engine, Generate

    with Engine(fresh_model(), adapters={"quick": (whole, 1.0)}) as engine:
        jumped = engine.submit(Generate("a star", preset="turbo", adapters=(("quick", 1.0),))).result(60)
        assert jumped.settings["num_inference_steps"] == 4 and jumped.settings["guidance_scale"] == 1
        with pytest.raises(UniLIPError, match="few-step weights"):
            engine.submit(Generate("a star", preset="turbo"))


@pytest.mark.parametrize("name", ["tiny/sft", "tiny/few", "tiny/few_lora"])
def test_where_jumps_go_trains_only_with_jumps(few_model: UniLIP, name: str) -> None:
    """Else its layers would get no gradient, and an adapter of them would say that it teaches jumps."""
    for more in ([], ["adapter.rank=2"]):
        recipe = override(get_recipe(name), ["trains=dit", *more])
        model = copy.deepcopy(few_model)
        if recipe.adapter.rank:
            add_adapter(recipe, model)
        found = [parameter for parameter in trained_parameters(recipe, model) if ".time_embed_2." in parameter]
        assert bool(found) == (name != "tiny/sft")


def test_guidance_stays_where_only_jumps_were_learned(tiny_folder: Any, tmp_path: Any) -> None:
    """RCGM teaches the guided velocity, too, so that many steps need no guidance; a path teaches jumps alone."""
    for path, guidance in ((0, 1.0), (8, preset("tiny").sampling.guidance_scale)):
        recipe = override(get_recipe("tiny/few"), [f"init=all={tiny_folder}", f"objective.path={path}"])
        for config in (build_model(recipe, tmp_path, ()).config, recipe_config(recipe)):
            assert config.dit.few_steps == STEPS and config.sampling.guidance_scale == guidance
    assert guidance > 1


SETTINGS = {
    "ema=0": "averaged weights", "objective.steps=4,4": "objective.steps", "objective.steps=0": "objective.steps",
    "objective.stride=0.5": "stride", "objective.rollouts=0": "rollouts", "objective.guidance=-1": "guidance",
    "objective.path=6": "a multiple of every number", "objective.path=-4": "path", "objective.repa=0.5": "not for few",
    "trains=connector": "trains dit",
}  # fmt: skip


def test_recipes_that_make_no_sense_are_refused() -> None:
    def refuses(setting: str) -> None:
        with pytest.raises(ConfigError, match=SETTINGS[setting]):
            override(get_recipe("tiny/few"), [setting])

    assert failures(refuses, SETTINGS) == []


def test_a_model_without_few_step_weights_names_the_recipe(tiny_model: UniLIP) -> None:
    with pytest.raises(UniLIPError, match=r"few-step weights.*recipe SIZE/few"):
        draw(tiny_model, preset="turbo")
    own = dataclasses.replace(preset("tiny").dit, few_steps=(2,))
    assert Settings.of(preset("tiny").replace(dit=own), "turbo").num_inference_steps == 2
