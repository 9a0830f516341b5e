"""Ablations: what the fields `condition` and `substitute_features` change, and recipes that differ in one thing."""

import dataclasses
import json

import pytest
import torch

from support import failures
from unilip.checkpoints.foreign import authors_configs
from unilip.errors import CheckpointError, ConfigError
from unilip.method.config import CONDITIONS, UniLIPConfig
from unilip.model import UniLIP
from unilip.recipes.catalog import TABLE, ablations, get_recipe
from unilip.recipes.record import leaves, override, plain
from unilip.sizes import preset
from unilip.train.build import build, build_model, make_batches, parse_init, recipe_config
from unilip.train.cached import digests
from unilip.train.loop import train
from unilip.train.objectives import contrast, make_objective, needed_parts

ALL = {recipe.name: recipe for recipe in ablations()}
each_condition = pytest.mark.parametrize("condition", CONDITIONS)


# --- the condition ----------------------------------------------------------------------------------------------------


def test_released_models_have_the_dual_condition():
    data = preset("tiny").to_dict()
    del data["condition"], data["substitute_features"]  # a config.json from before there were ablations
    config = UniLIPConfig.from_dict(data)
    assert (config.condition, config.substitute_features) == ("dual", True)
    with pytest.raises(ConfigError, match="allowed: dual, queries, hidden"):
        preset("tiny").replace(condition="both")
    with pytest.raises(ConfigError, match="substitute_features"):
        preset("tiny").replace(substitute_features="no")


@pytest.fixture
def prompts(tiny_model):
    processor = tiny_model.processor
    tokens = processor.tokenize([processor.edit_text(t) for t in ("add a star", "paint the red ball yellow")])
    features = torch.randn(2, tiny_model.config.num_image_tokens, 64, generator=torch.Generator().manual_seed(0))
    return tokens, features


@torch.no_grad()
@each_condition
def test_the_dit_sees_what_the_condition_says(fresh_model, prompts, condition):
    model, (tokens, features) = fresh_model(condition=condition), prompts
    before, mask = model.condition(tokens, features)
    asked, queries = tokens.input_ids.shape[1], model.config.num_queries
    assert before.shape[1] == mask.shape[1] == {"dual": asked + queries, "queries": queries, "hidden": asked}[condition]
    model.mllm.queries += 1
    after, _ = model.condition(tokens, features)
    assert torch.equal(before, after) == (condition == "hidden")
    other, _ = model.condition(tokens, features + 1)
    assert not torch.allclose(after, other)  # also the queries read the prompt and its picture


@torch.no_grad()
def test_substitution_is_what_brings_the_features_themselves(fresh_model, prompts):
    tokens, features = prompts
    with_, without = fresh_model(), fresh_model(substitute_features=False)
    assert not torch.allclose(with_.condition(tokens, features)[0], without.condition(tokens, features)[0])
    processor = with_.processor
    plain_prompt = processor.tokenize([processor.generate_text("a star")])
    assert torch.equal(with_.condition(plain_prompt)[0], without.condition(plain_prompt)[0])
    hidden, mask = without.mllm.read_with_queries(
        without.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask
    )
    torch.testing.assert_close(without.condition(tokens, features)[0], without.connector(hidden, mask))


@each_condition
def test_pictures_depend_on_their_prompt_alone(fresh_model, picture, condition):
    model = fresh_model(condition=condition)

    def draw(texts):
        generators = [torch.Generator().manual_seed(7) for _ in texts]
        return model.generate(texts, generator=generators, num_inference_steps=2, output_type="latent").images

    both, alone = draw(["a star", "three red balls on the left"]), draw(["a star"])
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1])
    edited = model.edit(picture(), "add a star", num_inference_steps=2, output_type="latent").images
    assert edited.shape == alone.shape and edited.isfinite().all()


@each_condition
def test_training_and_sampling_share_the_condition(fresh_model, condition):
    model = fresh_model(condition=condition)
    recipe = override(get_recipe("tiny/sft"), ["data.edit_share=1"])
    objective = make_objective(recipe, model, {})
    batch = make_batches(recipe, model.config, model.processor)[0]
    with torch.no_grad():
        ours, mask = objective.conditions(batch, objective.source_features(batch))
        theirs, other = model.condition(batch["prompts"], objective.source_features(batch))
    assert torch.equal(ours, theirs) and torch.equal(mask, other)
    loss, _ = objective.loss(batch, 0)
    loss.backward()
    reached = model.mllm.queries.grad is not None and bool(model.mllm.queries.grad.abs().sum() > 0)
    assert reached == (condition != "hidden")


def test_the_condition_is_saved_with_the_model(fresh_model, tmp_path):
    model = fresh_model(condition="queries", substitute_features=False)
    model.save_pretrained(tmp_path / "m")
    loaded = UniLIP.from_pretrained(tmp_path / "m").config
    assert (loaded.condition, loaded.substitute_features) == ("queries", False)


@pytest.mark.parametrize("change", [{"condition": "hidden"}, {"substitute_features": False}])
def test_the_authors_format_cannot_say_it(change):
    authors_configs(preset("1b"))
    with pytest.raises(CheckpointError, match="dual condition"):
        authors_configs(preset("1b").replace(**change))


def test_a_cache_of_conditions_belongs_to_its_condition(fresh_model):
    recipe, found = get_recipe("tiny/sft"), []
    for change in ({}, {"condition": "hidden"}, {"substitute_features": False}):
        model = fresh_model(**change)
        found.append(digests(["conditions"], model, make_objective(recipe, model, {})))
    assert found[0] != found[1] != found[2] != found[0]


def test_lessons_need_the_dual_condition(fresh_model):
    recipe = override(get_recipe("tiny/sft"), ["objective.bind=0.1"])
    with pytest.raises(ConfigError, match="needs a dual condition"):
        make_objective(recipe, fresh_model(condition="queries", num_queries=4), {})


# --- the recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", TABLE["ablation"]["sizes"])
def test_variants_differ_from_the_base_setting_in_what_they_say(size):
    def changed(name, from_):
        mine, other = plain(ALL[f"ablation/{size}/{name}"]), plain(ALL[f"ablation/{size}/{from_}"])
        names = {key for key in {*mine, *other} if mine.get(key) != other.get(key)}
        return names - {"name", "note", "measure_latents"}

    assert changed("recon_free", "recon_distill") == {"objective.distill"}
    assert changed("recon_frozen", "recon_free") == {"trains"}
    assert changed("recon_fixed_decoder", "recon_distill") == {"trains"}
    assert changed("recon_one_stage", "recon_distill") == {"init", "steps"}
    assert changed("recon_contrastive", "recon_free") == {"objective.contrastive", "init"}
    assert changed("gen_queries", "gen_dual") == {"config"}
    assert changed("gen_hidden", "gen_dual") == {"config", "trains"}  # there are no queries to train
    assert changed("gen_unsubstituted", "gen_dual") == {"config"}
    assert changed("gen_separate", "gen_shared") == {"init", "objective.target"}
    for name in ALL:
        if name.startswith(f"ablation/{size}/sweep_"):
            assert changed(name.split("/")[-1], "gen_dual") == {"config"}


def test_budgets_are_equal():
    assert failures(check_budget, ALL) == []


def check_budget(name):
    recipe, size = ALL[name], name.split("/")[1]
    first, second = ALL[f"ablation/{size}/recon"], ALL[f"ablation/{size}/recon_distill"]
    stage = recipe.name.split("/")[-1]
    if stage.startswith("recon_") or stage == "autoencoder":
        before = first.steps if any("/recon/" in text for text in recipe.init) else 0
        assert before + recipe.steps == first.steps + second.steps
    if stage.startswith(("gen_", "sweep_")):
        same = "gen_shared" if stage == "gen_separate" else "gen_dual" if stage != "gen_shared" else stage
        assert recipe.steps == ALL[f"ablation/{size}/{same}"].steps
    assert recipe.per_seed and recipe_config(recipe).name == size


def test_every_seed_has_its_folder_and_its_sources():
    recipe = get_recipe("ablation/pico/recon_distill")
    assert recipe.folder == "ablation/pico/recon_distill/seed0" and get_recipe("pico/clip").folder == "pico/clip"
    third = override(recipe, ["seed=3"])
    assert third.folder == "ablation/pico/recon_distill/seed3"
    assert [source for _, source in parse_init(third)] == ["ablation/pico/recon/seed3"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("config=condition:queries", "config changes condition:queries"),
        ("config=condition=both", "allowed: dual, queries, hidden"),
        ("config=layers=3", "config changes layers"),
        ("config=num_queries=many", r"num_queries \(int\)"),
        ("config=num_queries=true", r"num_queries \(int\)"),
    ],
)
def test_changes_of_the_config_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        recipe_config(override(get_recipe("ablation/tiny/gen_dual"), [setting]))


def test_changes_of_the_config_are_read():
    recipe = override(get_recipe("tiny/sft"), ["config=condition=hidden,num_queries=3,substitute_features=false"])
    config = recipe_config(recipe)
    assert (config.condition, config.num_queries, config.substitute_features) == ("hidden", 3, False)
    assert json.loads(json.dumps(plain(recipe)))["config"][1] == ["num_queries", 3]
    assert "config" in leaves(recipe)


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(fresh_model, tmp_path_factory):
    """A folder of runs with an untrained original model in the places that ablations start from."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("tiny/instruct", "tiny/sft"):
        fresh_model().save_pretrained(folder / name / "final")
    return folder


def test_what_is_missing_is_named_with_its_command(runs):
    with pytest.raises(ConfigError, match="train ablation/tiny/recon --set seed=4 first"):
        train(override(get_recipe("ablation/tiny/recon_free"), ["seed=4"]), runs, progress=False)


def test_two_encoders_and_contrast_from_their_recipes(runs):
    quick = ["steps=1", "seed=1"]
    for name in ("recon", "recon_contrastive", "autoencoder", "gen_separate"):
        final = train(override(get_recipe(f"ablation/tiny/{name}"), quick), runs, progress=False)
        assert final == runs / "ablation" / "tiny" / name / "seed1" / "final"
    model = UniLIP.from_pretrained(final)
    first = UniLIP.from_pretrained(runs / "tiny/instruct/final", parts=("encoder",))
    other = UniLIP.from_pretrained(runs / "ablation/tiny/autoencoder/seed1/final")
    assert torch.equal(model.encoder.projector[1].weight, first.encoder.projector[1].weight)
    assert torch.equal(model.latent_head.out[1].weight, other.latent_head.out[1].weight)
    assert model.config.latent_mean == other.config.latent_mean != 0.0  # it draws the autoencoder's latents
    recipe = override(get_recipe("ablation/tiny/gen_separate"), quick)
    built, objective, batches = build(recipe, runs)
    images = batches[0]["targets"]
    shared = make_objective(dataclasses.replace(recipe, objective=get_recipe("tiny/sft").objective), built, {})
    assert not torch.allclose(objective.clean_latents(images), shared.clean_latents(images))
    with pytest.raises(ConfigError, match="autoencoder=SOURCE"):
        make_objective(recipe, built, {})


def test_contrast_teaches_the_encoder(fresh_model):
    recipe = override(get_recipe("ablation/tiny/recon_contrastive"), ["batch_size=4"])
    model = fresh_model(parts=needed_parts(recipe.objective))
    model.mllm.requires_grad_(False)
    objective = make_objective(recipe, model, {})
    batch = make_batches(recipe, model.config, model.processor)[0]
    features = model.encoder(torch.randn(4, 3, 56, 56))
    loss, found = contrast(model, objective.heads, features, batch)
    assert loss > 0 and 0 <= found <= 1
    total, terms = objective.loss(batch, 0)
    expected = recipe.objective.pixel * terms["pixel"] + recipe.objective.contrastive * terms["contrastive"]
    torch.testing.assert_close(total, expected)
    total.backward()
    assert model.encoder.projector[1].weight.grad.abs().sum() > 0
    assert objective.heads["image"].weight.grad.abs().sum() > 0
    plainly = make_objective(override(recipe, ["objective.contrastive=0"]), model, {})
    assert "contrastive" not in plainly.loss({"images": batch["images"]}, 0)[1]


def test_queries_and_connector_are_new_where_a_sweep_changes_them(runs):
    wanted = {"sweep_num_queries_4": (4, 2), "sweep_connector_layers_4": (8, 4), "gen_dual": (8, 2)}
    kept = UniLIP.from_pretrained(runs / "tiny/sft/final")
    for name, (queries, layers) in wanted.items():
        recipe = get_recipe(f"ablation/tiny/{name}")
        model = build_model(recipe, runs, needed_parts(recipe.objective))
        assert model.mllm.queries.shape[1] == model.config.num_queries == queries
        assert len(model.connector.layers) == model.config.connector_layers == layers
        assert not torch.equal(model.mllm.queries[:, :4], kept.mllm.queries[:, :4])
        ours, theirs = (m.mllm.language_model.model.layers[0].mlp.up_proj.weight for m in (model, kept))
        assert torch.equal(ours, theirs)  # the language model is the same
