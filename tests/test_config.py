"""The configuration: it survives JSON, refuses what cannot work, and every field of it reaches the model."""

import dataclasses
import json

import pytest
import torch

from unilip.errors import ConfigError, UniLIPError
from unilip.method.config import DecoderConfig, DiTConfig, SamplingConfig, TextConfig, UniLIPConfig, VisionConfig
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.sizes import PRESETS, preset

CHILDREN = {
    "vision": VisionConfig,
    "text": TextConfig,
    "dit": DiTConfig,
    "decoder": DecoderConfig,
    "sampling": SamplingConfig,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = preset(name)
    assert config.name == name
    assert UniLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_statistics_per_channel_survive_json():
    config = preset("tiny").replace(latent_mean=(0.5,) * 32, latent_factor=tuple(float(i + 1) for i in range(32)))
    again = UniLIPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.latent_factor, tuple)


def test_the_released_sizes():
    one, three = preset("1b"), preset("3b")
    assert (one.text.hidden_size, one.dit.hidden_size, one.num_image_tokens, one.latent_factor) == (
        896,
        1152,
        256,
        10.6,
    )
    assert (three.text.hidden_size, three.dit.hidden_size, three.grid, three.latent_factor) == (1536, 2240, 16, 9.5)
    assert one.dit.interpolation_scale == three.dit.interpolation_scale == 1.0
    assert one.sampling == SamplingConfig(20, 4.5, 3.0, "dpm++")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"2b.*tiny, pico, nano, 1b, 3b"):
        preset("2b")


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").image_size = 112


@pytest.mark.parametrize("where", ["", *CHILDREN])
def test_unknown_fields_are_refused(where):
    data = preset("tiny").to_dict()
    (data[where] if where else data)["surprise"] = 1
    with pytest.raises(ConfigError, match="surprise"):
        UniLIPConfig.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {"name": 3},
        {"image_size": "56"},
        {"num_queries": 8.5},
        {"num_queries": True},
        {"num_queries": None},
        {"latent_factor": "10"},
        {"latent_factor": [1.0, "2"]},
        {"text": []},
        {"text": {"tie_embeddings": 1}},
        {"dit": {"interpolation_scale": "1"}},
        {"decoder": {"block_types": "ResBlock"}},
        {"decoder": {"qkv_multiscales": [[1.5]] * 6}},
        {"format": "another"},
    ],
    ids=str,
)
def test_ill_typed_fields_are_refused(data):
    with pytest.raises(ConfigError, match=next(iter(data))):
        UniLIPConfig.from_dict(data)


def test_whole_numbers_may_stand_for_floats():
    assert UniLIPConfig.from_dict({"latent_factor": 10, "dit": {"mlp_ratio": 2}}).latent_factor == 10.0


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((VisionConfig, {name: 0}) for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size")),
        *((VisionConfig, {name: 0}) for name in ("image_size", "patch_size", "norm_eps")),
        (VisionConfig, {"num_heads": 5}),
        (VisionConfig, {"image_size": 450}),
        (VisionConfig, {"patch_size": 16}),
        *((TextConfig, {name: -1}) for name in ("vocab_size", "hidden_size", "num_layers", "num_heads")),
        *((TextConfig, {name: -1}) for name in ("num_kv_heads", "intermediate_size", "rope_theta", "max_positions")),
        (TextConfig, {"norm_eps": 0.0}),
        (TextConfig, {"rope_theta": NAN}),
        (TextConfig, {"num_heads": 13}),
        (TextConfig, {"num_kv_heads": 4}),
        (TextConfig, {"hidden_size": 14 * 63}),
        *((DiTConfig, {name: 0}) for name in ("num_layers", "num_heads", "head_dim", "num_cross_heads")),
        *((DiTConfig, {name: 0}) for name in ("cross_head_dim", "caption_channels", "sample_size", "latent_channels")),
        (DiTConfig, {"mlp_ratio": INF}),
        (DiTConfig, {"interpolation_scale": 0.0}),
        (DiTConfig, {"num_cross_heads": 15}),
        (DiTConfig, {"num_heads": 3, "head_dim": 2, "num_cross_heads": 3, "cross_head_dim": 2}),
        (DecoderConfig, {"block_out_channels": (16, 32)}),
        (DecoderConfig, {"layers_per_block": (1,) * 5}),
        (DecoderConfig, {"layers_per_block": (1, 1, 1, 1, 1, -1)}),
        (DecoderConfig, {"block_types": ("ResBlock",) * 7}),
        (DecoderConfig, {"block_types": ("Surprise",) * 6}),
        (DecoderConfig, {"qkv_multiscales": ((),)}),
        (DecoderConfig, {"upsample_block_type": "nearest"}),
        (DecoderConfig, {"latent_channels": 48}),
        (DecoderConfig, {"block_out_channels": (128, 256, 512, 500, 1024, 1024)}),
        (DecoderConfig, {"block_out_channels": (16, 256, 512, 512, 1024, 1024)}),
        (DecoderConfig, {"attention_head_dim": 0}),
        (SamplingConfig, {"num_inference_steps": 0}),
        (SamplingConfig, {"num_inference_steps": 1001}),
        (SamplingConfig, {"num_inference_steps": 2.5}),
        (SamplingConfig, {"guidance_scale": -1.0}),
        (SamplingConfig, {"guidance_scale": NAN}),
        (SamplingConfig, {"flow_shift": 0.0}),
        (SamplingConfig, {"solver": "heun"}),
        *((UniLIPConfig, {name: 0}) for name in ("image_size", "num_queries", "connector_layers")),
        (UniLIPConfig, {"latent_head_blocks": 0}),
        (UniLIPConfig, {"image_size": 450}),
        (UniLIPConfig, {"connector_layers": 25}),
        (UniLIPConfig, {"num_queries": 32768}),
        (UniLIPConfig, {"dit": DiTConfig(latent_channels=16)}),
        (UniLIPConfig, {"latent_mean": (0.0,) * 31}),
        (UniLIPConfig, {"latent_factor": (1.0,) * 33}),
        (UniLIPConfig, {"latent_factor": 0.0}),
        (UniLIPConfig, {"latent_factor": (1.0,) * 31 + (0.0,)}),
        (UniLIPConfig, {"latent_mean": NAN}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_what_cannot_work_is_refused(kind, changes):
    kind()  # the defaults are fine
    with pytest.raises(ConfigError, match="|".join(changes)) as caught:
        kind(**changes)
    assert isinstance(caught.value, UniLIPError)


def test_replace_checks_again():
    config = preset("tiny")
    assert config.replace(image_size=112).grid == 4
    for bad in (57, 56.0, "56"):
        with pytest.raises(ConfigError, match="image_size"):
            config.replace(image_size=bad)


def test_the_remedy_is_a_size_that_works():
    with pytest.raises(ConfigError, match="for example 448"):
        UniLIPConfig(image_size=450)


# --- every field is read ----------------------------------------------------------------------------------------------


@torch.no_grad()
def computed(config: UniLIPConfig) -> list[float]:
    """All that a config decides: what the networks make of the same inputs, and how long a prompt may be."""
    model = UniLIP.from_config(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    features = model.encoder(pixels)
    latent = model.to_latent(features)
    ids = torch.arange(7)[None]
    tokens = Tokens(ids, torch.ones_like(ids), torch.zeros_like(ids).bool())
    condition, mask = model.condition(tokens)
    velocity = model.dit(latent, torch.tensor([500.0]), condition, mask)
    logits = model.mllm.logits(model.mllm(model.mllm.embed(ids), mask[:, :7]))
    outputs = (features, latent, model.from_latent(latent), condition, velocity, logits)
    weights = sum(p.numel() for p in model.parameters())
    return [*(float(x.double().abs().sum()) for x in outputs), weights, config.text.max_positions - config.num_queries]


CHANGES = {
    "vision": {
        "hidden_size": 64, "num_layers": 3, "num_heads": 2, "intermediate_size": 32, "image_size": 112,
        "layer_scale_init": 0.2, "norm_eps": 1e-5,
    },
    "text": {
        "vocab_size": 500, "hidden_size": 128, "num_layers": 5, "num_heads": 8, "num_kv_heads": 1,
        "intermediate_size": 64, "rope_theta": 1e4, "max_positions": 256, "norm_eps": 1e-5, "tie_embeddings": True,
    },
    "dit": {
        "num_layers": 3, "num_heads": 8, "head_dim": 32, "num_cross_heads": 4, "cross_head_dim": 16,
        "caption_channels": 40, "mlp_ratio": 3.0, "sample_size": 8, "latent_channels": 16, "interpolation_scale": None,
        "few_steps": (4,), "plain_blocks": True,
    },
    "decoder": {
        "block_out_channels": (16, 16, 16, 32, 32, 64), "layers_per_block": (0, 1, 1, 1, 1, 1),
        "block_types": ("ResBlock",) * 6, "qkv_multiscales": ((), (), (), (), (), (3,)), "attention_head_dim": 16,
        "latent_channels": 16, "upsample_block_type": "pixel_shuffle",
    },
}  # fmt: skip
# fields that only fit together
TOGETHER = {
    ("dit", "num_heads"): {"cross_head_dim": 64},
    ("dit", "head_dim"): {"cross_head_dim": 64},
    ("dit", "num_cross_heads"): {"cross_head_dim": 16},
    ("dit", "cross_head_dim"): {"num_cross_heads": 4},
}
ALONE = {("vision", "patch_size")}  # has one allowed value


def test_every_field_changes_what_is_computed():
    tiny, idle = preset("tiny"), []
    before = computed(tiny)
    for child, changed in CHANGES.items():
        for name in changed:
            changes = {name: changed[name], **TOGETHER.get((child, name), {})}
            parts = {child: dataclasses.replace(getattr(tiny, child), **changes)}
            if name == "latent_channels":
                parts = {c: dataclasses.replace(getattr(tiny, c), latent_channels=16) for c in ("dit", "decoder")}
            if computed(tiny.replace(**parts)) == before:
                idle.append(f"{child}.{name}")
    for changes in ({"num_queries": 4}, {"connector_layers": 1}, {"latent_head_blocks": 2}):
        if computed(tiny.replace(**changes)) == before:
            idle.append(str(changes))
    assert not idle


def test_no_field_is_forgotten_above():
    for child, kind in CHILDREN.items():
        if child != "sampling":  # tried in the tests of `generate`
            names = {field.name for field in dataclasses.fields(kind)}
            assert names == set(CHANGES[child]) | {name for owner, name in ALONE if owner == child}
