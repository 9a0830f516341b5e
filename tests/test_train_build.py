"""Recipe -> model: where parts start, that they fit each other, what trains and at which rate."""

import dataclasses
import shutil

import pytest
import torch
from diffusers import SanaTransformer2DModel

from unilip.errors import CheckpointError, ConfigError, UniLIPError
from unilip.model import UniLIP
from unilip.recipes.record import Data, Flow, Optim, Recipe, Reconstruct, override
from unilip.sizes import preset
from unilip.train.build import build, build_model, locate, make_optimizer, trained_parameters, world_processor
from unilip.train.objectives import needed_parts

TOKENIZER = ("encoder", "latent_head", "pixel_decoder")


def recipe(*init, objective=None, trains=(("dit", 1.0),), **changes):
    return Recipe(
        name="tiny/mine", model="tiny", objective=objective or Flow(), trains=trains, steps=4, batch_size=2, init=init,
        data=Data(world="tiny", path="synthetic"), **changes,
    )  # fmt: skip


def assembled(recipe, runs):
    return build_model(recipe, runs, needed_parts(recipe.objective))


def equal(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, fresh_model):
    """Two different models: `one` whole, `two` a tokenizer with its own latent scale."""
    place = tmp_path_factory.mktemp("sources")
    fresh_model(seed=1).save_pretrained(place / "one")
    fresh_model(seed=2, parts=TOKENIZER, latent_mean=0.5, latent_factor=2.0).save_pretrained(place / "two")
    return place


@pytest.fixture(scope="module")
def one(folders):
    return UniLIP.from_pretrained(folders / "one")


@pytest.fixture(scope="module")
def two(folders):
    return UniLIP.from_pretrained(folders / "two")


# --- where parts start ------------------------------------------------------------------------------------------------


def test_parts_of_several_sources_with_what_belongs_to_them(folders, one, two, tmp_path):
    model = assembled(recipe(f"all={folders / 'one'}", f"latent_head,encoder={folders / 'two'}"), tmp_path)
    assert model.parts == one.parts and not model.training
    for name in model.parts:
        source = two if name in ("latent_head", "encoder") else one
        assert equal(getattr(model, name), getattr(source, name)), name
    assert (model.config.latent_mean, model.config.latent_factor) == (0.5, 2.0), "the scale belongs to the latent head"
    assert model.processor.tokenizer.vocabulary == one.processor.tokenizer.vocabulary
    swapped = assembled(recipe(f"all={folders / 'one'}", f"pixel_decoder={folders / 'two'}"), tmp_path)
    assert swapped.config.latent_factor == one.config.latent_factor, "a pixel decoder alone does not bring the scale"


def test_fresh_parts_depend_on_the_seed_alone(folders, tmp_path):
    init = f"encoder,latent_head,pixel_decoder,mllm={folders / 'one'}"
    made = [assembled(recipe(init, seed=seed), tmp_path) for seed in (0, 0, 1)]
    assert equal(made[0].dit, made[1].dit) and not equal(made[0].dit, made[2].dit)
    llm, connector = made[0].mllm.language_model.model, made[0].connector
    for layer, source in zip(connector.layers, llm.layers[-len(connector.layers) :], strict=True):
        assert equal(layer, source), "a fresh connector copies the end of the LLM that was loaded"


def test_the_order_of_parameters_does_not_depend_on_their_sources(folders, one, tmp_path):
    """Optimizer states are kept by position."""
    names = [
        [name for name, _ in assembled(recipe(*init), tmp_path).named_parameters()]
        for init in ((f"all={folders / 'one'}",), (f"mllm,pixel_decoder={folders / 'one'}",))
    ]
    assert names[0] == names[1] == [name for name, _ in one.named_parameters()]


def test_queries_may_come_from_elsewhere_than_their_llm(folders, one, fresh_model, tmp_path):
    fresh_model(seed=4, parts=("mllm",)).save_pretrained(tmp_path / "llm")
    llm = UniLIP.from_pretrained(tmp_path / "llm").mllm
    model = assembled(recipe(f"queries={folders / 'one'}", f"mllm={tmp_path / 'llm'}"), tmp_path)
    assert equal(model.mllm.language_model, llm.language_model) and not equal(model.mllm.language_model, one.mllm)
    assert torch.equal(model.mllm.queries, one.mllm.queries) and not torch.equal(llm.queries, one.mllm.queries)
    fresh_model(num_queries=3, parts=("mllm",)).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"no place for queries of the shape \(1, 3, 64\)"):
        assembled(recipe(f"queries={tmp_path / 'three'}", f"mllm={tmp_path / 'llm'}"), tmp_path)


def test_a_stage_that_has_not_finished_is_no_source(tmp_path):
    with pytest.raises(ConfigError, match="starts from tiny/clip, which has not finished"):
        assembled(recipe("encoder=tiny/clip"), tmp_path)
    (tmp_path / "my" / "run").mkdir(parents=True)
    with pytest.raises(ConfigError, match="my/run, which has not finished"):
        locate("my/run", tmp_path)
    (tmp_path / "my" / "run" / "final").mkdir()
    assert locate("my/run", tmp_path) == str(tmp_path / "my" / "run" / "final")
    assert locate("owner/name", tmp_path) == "owner/name"


def test_the_embedded_model_is_a_source(tmp_path, folders, one, monkeypatch):
    monkeypatch.setattr("unilip.checkpoints.hub.embedded", lambda: folders / "one")
    assert equal(assembled(recipe("all=embedded"), tmp_path), one)


def test_missing_and_unfitting_sources_are_refused(folders, tmp_path, fresh_model):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        assembled(recipe(f"all={tmp_path / 'nowhere'}"), tmp_path)
    with pytest.raises(UniLIPError, match="has no dit; it holds: encoder"):
        assembled(recipe(f"dit={folders / 'two'}"), tmp_path)
    text = dataclasses.replace(preset("tiny").text, hidden_size=32)
    UniLIP.from_config(preset("tiny").replace(text=text), parts=("mllm",)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        CheckpointError, match=r"tiny/mine, put together from .*encoder\.projector\.\d.* of another shape"
    ):
        assembled(recipe(f"encoder={folders / 'one'}", f"mllm={tmp_path / 'narrow'}"), tmp_path)


def test_an_llm_without_queries_gets_new_ones(tmp_path):
    """InternVL3 has none; they are as many as the recipe's model has, and differ from each other."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    tiny = preset("tiny")
    text = dict(
        model_type="qwen2", vocab_size=400, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=[56, 56],
        patch_size=[14, 14], attention_bias=True, use_mean_pooling=True,
    )  # fmt: skip
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=390, tie_word_embeddings=True)
    InternVLForConditionalGeneration(config).save_pretrained(tmp_path / "internvl")
    mine = recipe(f"encoder,mllm={tmp_path / 'internvl'}", trains=(("mllm.queries", 1.0), ("connector", 1.0)))
    made = [assembled(dataclasses.replace(mine, seed=seed), tmp_path) for seed in (0, 0, 1)]
    queries = [model.mllm.queries.detach() for model in made]
    assert queries[0].shape == (1, tiny.num_queries, 64) and 0.01 < queries[0].std() < 0.03
    assert torch.equal(queries[0], queries[1]) and not torch.equal(queries[0], queries[2])
    assert made[0].config.text.tie_embeddings and not tiny.text.tie_embeddings, "the child config comes along"
    model = made[0]
    model.save_pretrained(tmp_path / "whole")
    assert equal(UniLIP.from_pretrained(tmp_path / "whole"), model)


def test_a_diffusion_transformer_brings_its_position_embedding(folders, tmp_path):
    """Plain SANA was made without one: building it with one would be another network, silently."""
    dit = preset("tiny").dit
    SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=4, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=48,
        mlp_ratio=2.5, sample_size=16, interpolation_scale=None,
    ).save_pretrained(tmp_path / "sana")  # fmt: skip
    model = assembled(recipe(f"all={folders / 'one'}", f"dit={tmp_path / 'sana'}"), tmp_path)
    assert dit.interpolation_scale is not None and model.config.dit.interpolation_scale is None
    kept = assembled(recipe(f"all={folders / 'one'}"), tmp_path)
    assert kept.config.dit == dit


def test_the_image_size_of_a_recipe_is_that_of_model_and_prompts(folders, tmp_path):
    mine = recipe(f"all={folders / 'one'}")
    model = assembled(dataclasses.replace(mine, data=dataclasses.replace(mine.data, image_size=84)), tmp_path)
    assert model.config.image_size == model.processor.image_size == 84 and model.processor.num_image_tokens == 9


def test_a_tokenizer_without_text_is_enough_for_pixels(tmp_path, picture):
    UniLIP.from_config(preset("tiny"), parts=TOKENIZER).save_pretrained(tmp_path / "bare")
    for i in range(2):
        picture(seed=i).save(tmp_path / f"{i}.png")
    mine = recipe(
        f"all={tmp_path / 'bare'}", objective=Reconstruct(perceptual=0.0), trains=(("pixel_decoder", 1.0),)
    )  # fmt: skip
    mine = override(mine, ["data.source=files", f"data.path={tmp_path}"])
    model, objective, batches = build(mine, tmp_path)
    assert model.processor is None and objective.loss(batches[0], 0)[0] > 0


def test_the_tokenizer_of_a_world_is_trained_once_and_whole(tmp_path, monkeypatch):
    import unilip.emoji.tokenizer as tokenizers

    train, times = tokenizers.train_tokenizer, []
    monkeypatch.setattr(tokenizers, "train_tokenizer", lambda *a: times.append(a) or train(*a, sentences=300))
    first = world_processor("tiny", preset("tiny"), tmp_path / "tokenizer")
    again = world_processor("tiny", preset("tiny"), tmp_path / "tokenizer")
    assert len(times) == 1 and first.tokenizer.vocabulary == again.tokenizer.vocabulary
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    other = world_processor("pico", preset("pico"), tmp_path / "tokenizer")
    assert len(times) == 2 and other.tokenizer.vocabulary != first.tokenizer.vocabulary

    def meanwhile(world, size, folder):  # two trainings that were started in the same second
        shutil.copytree(tmp_path / "tokenizer", tmp_path / "other", dirs_exist_ok=True)
        return train(world, size, folder, sentences=300)

    monkeypatch.setattr(tokenizers, "train_tokenizer", meanwhile)
    other = world_processor("tiny", preset("tiny"), tmp_path / "other")
    assert other.tokenizer.vocabulary == first.tokenizer.vocabulary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tokenizer"]


# --- what trains ------------------------------------------------------------------------------------------------------


def test_the_longest_prefix_decides(tiny_model):
    trains = (("encoder", 0.1), ("encoder.projector", 2.0), ("encoder.vision_tower.embeddings", 0.0), ("dit", 1.0))
    found = trained_parameters(recipe(trains=trains), tiny_model)
    factors = {name: factor for name, (_, factor) in found.items()}
    assert factors["encoder.projector.1.weight"] == 2.0
    assert not any(name.startswith("encoder.vision_tower.embeddings") for name in factors)
    assert {f for n, f in factors.items() if n.startswith("encoder.vision_tower.encoder")} == {0.1}
    assert {n.split(".")[0] for n in factors} == {"encoder", "dit"}


@pytest.mark.parametrize("prefix", ["enc", "encoder.projecto", "encoder.nothing"])
def test_prefixes_are_whole_names(prefix, tiny_model):
    with pytest.raises(ConfigError, match=f"trains {prefix}, which names nothing"):
        trained_parameters(recipe(trains=(("dit", 1.0), (prefix, 1.0))), tiny_model)


def test_build_freezes_what_does_not_train(folders, tmp_path):
    model, _, _ = build(recipe(f"all={folders / 'one'}", trains=(("mllm.queries", 1.0), ("dit", 1.0))), tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "mllm.queries" in trained and {name.split(".")[0] for name in trained} == {"mllm", "dit"}
    assert sum(name.startswith("mllm") for name in trained) == 1


def test_optimizer_groups_by_factor_and_decay():
    weight, bias, slow = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (3, 3)))
    optim = Optim(lr=0.5, weight_decay=0.25, beta1=0.8, beta2=0.9)
    groups = make_optimizer(optim, [(weight, 1.0), (bias, 1.0), (slow, 0.1)]).param_groups
    assert [(g["factor"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1.0, 0.25, 1),
        (1.0, 0.0, 1),
        (0.1, 0.25, 1),
    ]
    assert all(g["betas"] == (0.8, 0.9) for g in groups) and groups[2]["params"][0] is slow
