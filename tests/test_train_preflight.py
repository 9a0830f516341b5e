"""The preflight: what is counted is what is there, what cannot fit is refused, and the remedy fits."""

import dataclasses

import pytest
import torch

from unilip.errors import ConfigError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.build import trained_parameters
from unilip.train.preflight import (
    GIB,
    Alive,
    Hardware,
    Step,
    estimate,
    hardware,
    measure,
    preflight,
    remedies,
)

STEP = Step(
    trained=10**9, frozen=2 * 10**9, largest_unit=10**8, outside_units=10**8, activations=(1e9, 2e9), operations=1e13
)


@pytest.fixture(scope="module")
def step() -> Step:
    return measure(get_recipe("tiny/sft"))


def test_what_is_alive_at_once_is_counted_by_hand():
    x = torch.ones(1000)
    with Alive() as alive:
        a = x * 2  # 4000 bytes
        b = a * 2  # 8000
        del a  # 4000
        c = b + 1  # 8000
        d = c.view(10, 100)  # no memory of its own
        del b, c, d
        e = x + 1
        e.add_(1)  # in place
    assert alive.peak == 8000 and alive.now == 4000


def test_sizes_are_those_of_the_model(step, fresh_model):
    recipe, model = get_recipe("tiny/sft"), fresh_model()
    trained = sum(p.numel() for p, _ in trained_parameters(recipe, model).values())
    assert step.trained == trained
    assert step.trained + step.frozen == sum(p.numel() for p in model.parameters())
    assert 0 < step.largest_unit < step.trained and step.activations[1] > 0 and step.operations > 0


def test_activations_are_those_of_a_real_step(step, fresh_model):
    """The same count on real tensors, with the loss of a real batch of the same shapes."""
    from unilip.train.objectives import make_objective
    from unilip.train.preflight import batch_of

    recipe, model = get_recipe("tiny/sft"), fresh_model()
    model.requires_grad_(False)
    named = trained_parameters(recipe, model)
    for parameter, _ in named.values():
        parameter.requires_grad_(True)
    objective = make_objective(recipe, model, {})
    batch = batch_of(recipe, model.config, 3, edits=True)
    batch["prompts"].image_slots[:, :4] = True
    with Alive() as alive:
        objective.loss(batch, 0)[0].backward()
    wanted = step.activations[0] + 3 * step.activations[1] + 4 * step.trained
    assert alive.peak == pytest.approx(wanted, rel=0.1)


@pytest.mark.slow
def test_recomputation_holds_less_and_computes_more(step):
    some = measure(override(get_recipe("tiny/sft"), ["selective_checkpointing=1"]))
    least = measure(override(get_recipe("tiny/sft"), ["gradient_checkpointing=1"]))
    assert least.activations[1] < some.activations[1] < step.activations[1]
    assert step.operations <= some.operations < least.operations


def test_an_adapter_trains_little():
    settings = ["adapter.rank=2", "trains=dit", "adapter.targets=to_q"]
    small = measure(override(get_recipe("tiny/sft"), settings))
    assert 0 < small.trained < 0.1 * small.frozen


@pytest.mark.slow
def test_tokenizer_stages_and_refusals():
    assert measure(get_recipe("tiny/recon_distill")).trained > 0
    with pytest.raises(ConfigError, match="for flow and tokenizer stages"):
        measure(get_recipe("tiny/clip"))


def test_arithmetic_by_hand():
    recipe = override(get_recipe("1b/sft"), ["batch_size=4", "accumulate=2", "ema=0.9", "dtype=float32", "steps=3600"])
    machine = Hardware("x", 64 * GIB, 2e14, 1e14)
    found = estimate(recipe, machine, STEP)
    assert found.memory == {
        "weights": 12e9, "gradients": 4e9, "optimizer": 8e9, "averages": 4e9, "activations": 1e9 + 4 * 2e9,
    }  # fmt: skip
    assert found.operations == 8e13 and found.seconds == pytest.approx(0.8 / 0.35) == pytest.approx(found.hours)
    shared = estimate(override(recipe, ["parallel=fsdp"]), dataclasses.replace(machine, count=2), STEP)
    assert shared.memory["weights"] == 6e9 and shared.memory["optimizer"] == 4e9
    assert shared.memory["gathered"] == 3e8 * 4 and shared.seconds == pytest.approx(found.seconds / 2)
    halved = estimate(override(recipe, ["weights_dtype=bfloat16", "dtype=bfloat16"]), machine, STEP)
    assert halved.memory["optimizer"] == 4e9 and halved.memory["weights"] == 10e9


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch):
    import unilip.train.preflight as module

    few = dataclasses.replace(STEP, activations=(1e9, 2e8))
    saved = dataclasses.replace(STEP, activations=(1e9, 3e8))
    monkeypatch.setattr(
        module, "measure",
        lambda recipe: few if recipe.gradient_checkpointing else saved if recipe.selective_checkpointing else STEP,
    )  # fmt: skip
    recipe = override(get_recipe("1b/sft"), ["selective_checkpointing=0", "batch_size=32", "accumulate=16"])
    with pytest.raises(ConfigError, match=r"needs about 8\d\.\d GiB .*would fit with: --set selective_check"):
        preflight(recipe, hardware("a100-40"))
    already = override(recipe, ["selective_checkpointing=1"])
    texts = [text for text, _ in remedies(already, hardware("a100-40"), STEP)]
    assert "--set selective_checkpointing=0 --set gradient_checkpointing=1" in texts
    compiled = [text for text, _ in remedies(override(recipe, ["compile=1"]), hardware("a100-40"), STEP)]
    assert not any("selective" in text for text in compiled)
    found = list(remedies(recipe, hardware("a100-40"), STEP))
    assert found and all(one.fits for _, one in found)
    assert any("batch_size=" in text for text, _ in found) and any("on 1 x" in text for text, _ in found)
    assert all(one.recipe.batch_size * one.recipe.accumulate == 512 for _, one in found)
    fits = preflight(recipe, hardware("h200"))
    assert fits.fits and any("in all" in line for line in fits.lines())


@pytest.mark.parametrize("text", ["h9000", "h100:0", "h100:x", ""])
def test_unknown_hardware_is_refused(text):
    with pytest.raises(ConfigError, match="There is no hardware"):
        hardware(text)


def test_hardware_by_name():
    assert hardware("H100:8").count == 8 and hardware("h100").memory == 80 * GIB
    assert hardware("here").memory > 0 and hardware("here").float32 > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1b/connector", "1b/sft", "3b/sft", "1b/recon_448"])
def test_the_papers_recipes(name):
    step = measure(get_recipe(name))
    assert step.trained + step.frozen > 5e8
    assert estimate(get_recipe(name), hardware("h100:16"), step).total > 0
