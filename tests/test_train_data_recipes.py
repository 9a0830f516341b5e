"""The paper's six recipes take their first step on shards as BLIP3o and GPT-Image-Edit are published.

The models have the widths of the released sizes but one layer in each part, and narrow autoencoders.
"""

import dataclasses

import pytest
import webdataset
from diffusers import AutoencoderDC

from unilip.method.config import DecoderConfig
from unilip.method.text import Processor
from unilip.model import UniLIP
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import Flow, override
from unilip.sizes import preset
from unilip.train import build as building
from unilip.train.build import build, enable_checkpointing, trained_parameters

STAGES = ("recon", "recon_distill", "recon_448", "connector", "pretrain", "sft")
NARROW = (16, 16, 32, 32, 64, 64)


def shallow(size):
    """The configuration of a released size with one layer in each part."""
    config = preset(size)
    return config.replace(
        vision=dataclasses.replace(config.vision, num_layers=1),
        text=dataclasses.replace(config.text, num_layers=1, vocab_size=512),
        dit=dataclasses.replace(config.dit, num_layers=1),
        decoder=DecoderConfig(block_out_channels=NARROW, layers_per_block=(1,) * 6),
        connector_layers=1,
        latent_head_blocks=1,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory, picture):
    """Two shards of pictures with captions, one of edits, written by the webdataset library."""
    place = tmp_path_factory.mktemp("shards")
    for part in range(2):
        with webdataset.TarWriter(str(place / f"{part:06d}.tar")) as writer:
            for i in range(3):
                key = f"{part}{i:05d}"
                writer.write({"__key__": key, "jpg": picture(640, 480, i), "txt": f"a photo of scene {key}"})
    (place / "edits").mkdir()
    with webdataset.TarWriter(str(place / "edits" / "000000.tar")) as writer:
        for i in range(3):
            pair = {"input.jpg": picture(512, 512, i), "output.jpg": picture(512, 512, 9 + i)}
            writer.write({"__key__": f"{i:08d}", **pair, "txt": f"make it {i}"})
    return place


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A narrow diffusers AutoencoderDC in a folder."""
    folder = tmp_path_factory.mktemp("dcae")
    AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_out_channels=NARROW, decoder_block_out_channels=NARROW,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def first_steps(name, shards, autoencoder, tokenizer, folder, monkeypatch, *settings):
    """Build a recipe on the shards and take the loss and gradients of its first batch of each task: -> the terms."""
    size = name.split("/")[0]
    config = shallow(size)
    start = UniLIP.from_config(config, parts=("latent_head",))
    start.processor = Processor(tokenizer, config)
    start.save_pretrained(folder / "start")
    monkeypatch.setattr(building, "preset", shallow)
    monkeypatch.setenv("UNILIP_CACHE", str(folder / "indices"))
    recipe = get_recipe(name)
    flow = isinstance(recipe.objective, Flow)
    sources = [f"latent_head={folder / 'start'}"] if flow else []
    sources += [f"autoencoder={autoencoder}"] if name.endswith("connector") else []
    own = [] if flow else ["objective.perceptual_source=teacher"]  # lpips needs weights from elsewhere
    recipe = override(recipe, [
        f"data.path={shards}/{{000000..000001}}.tar:2,{shards}/edits", f"init={','.join(sources)}", "batch_size=1",
        "accumulate=1", "data.workers=0", "dtype=float32", *own, *settings,
    ])  # fmt: skip
    model, objective, batches = build(recipe, folder)
    if recipe.gradient_checkpointing or recipe.selective_checkpointing:
        enable_checkpointing(model, recipe.selective_checkpointing)
    trained = trained_parameters(recipe, model)
    assert all(p.requires_grad for p, _ in trained.values())
    tasks = {batches.is_edit(i): i for i in range(60, -1, -1)} if flow else {False: 0}
    assert len(tasks) == (2 if recipe.data.edit_share else 1)
    found = {}
    for index in tasks.values():
        model.zero_grad()
        loss, terms = objective.loss(batches[index], index)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p, _ in trained.values() if p.grad is not None)
        moved = {key.split(".")[0] for key, (p, _) in trained.items() if p.grad is not None and bool(p.grad.any())}
        assert {key.split(".")[0] for key in trained} == moved, "a gradient reaches each part that trains"
        second = objective.adversary_loss()
        if second is not None:
            second[0].backward()
            terms = terms | second[1]
        found |= terms
    assert not batches.tally.skipped
    return model, set(found)


TERMS = {
    "recon": {"pixel", "psnr", "perceptual"},
    "recon_distill": {"pixel", "psnr", "perceptual", "distill", "gan", "discriminator", "lecam"},
    "recon_448": {"pixel", "psnr", "perceptual", "distill", "gan", "discriminator", "lecam"},
    "connector": {"flow"},
    "pretrain": {"flow", "flow_edit"},
    "sft": {"flow", "flow_edit"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_first_steps_of_the_paper_s_recipes(stage, shards, autoencoder, tiny_tokenizer, tmp_path, monkeypatch):
    """1b, on pictures of 112 px, the adversary from the start."""
    early = [] if stage in ("connector", "pretrain", "sft") else ["objective.gan_start=0"]
    model, terms = first_steps(
        f"1b/{stage}", shards, autoencoder, tiny_tokenizer, tmp_path, monkeypatch, "data.image_size=112", *early
    )
    assert terms == TERMS[stage] and model.config.text.hidden_size == 896


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["1b", "3b"])
def test_first_steps_at_full_resolution(size, stage, shards, autoencoder, tiny_tokenizer, tmp_path, monkeypatch):
    model, terms = first_steps(f"{size}/{stage}", shards, autoencoder, tiny_tokenizer, tmp_path, monkeypatch)
    wanted = TERMS[stage] - ({"gan", "discriminator", "lecam"} if stage == "recon_distill" else set())
    assert terms == wanted, "the adversary of recon_distill comes at half-time"
    assert model.config.image_size == (224 if stage in ("recon", "recon_distill") else 448)
    widths = (model.config.vision.hidden_size, model.config.text.hidden_size, model.config.dit.hidden_size)
    assert widths == ((1024, 896, 1152) if size == "1b" else (1024, 1536, 2240)), "less deep, but as wide"
