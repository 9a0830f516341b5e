"""A smaller pixel decoder: trained to draw what the full one draws, chosen when a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unilip import cli
from unilip.checkpoints.read import SMALL
from unilip.errors import CheckpointError, ConfigError, UniLIPError
from unilip.model import UniLIP
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.sizes import preset, small_decoder
from unilip.train.build import build
from unilip.train.loop import train


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the recipe on the tiny model."""
    runs = tmp_path_factory.mktemp("small")
    init = f"init=encoder,latent_head={tiny_folder},teacher={tiny_folder}"
    settings = [init, "steps=60", "optim.lr=3e-3", "save_every=60", "sample_every=60", "batch_size=4"]
    return train(override(get_recipe("tiny/small_decoder"), settings), runs, progress=False)


def test_it_comes_to_draw_what_the_full_one_draws(trained: Path, tiny_folder: Path) -> None:
    lines = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert {"pixel", "psnr", "perceptual", "states"} <= set(lines[0])
    early, late = (np.mean([line["pixel"] for line in part]) for part in (lines[:5], lines[-5:]))
    assert late < 0.5 * early
    assert list((trained.parent / "samples").glob("decoders_*.png"))
    full, small = UniLIP.from_pretrained(tiny_folder), UniLIP.from_pretrained(trained)
    for part in ("encoder", "latent_head"):
        weights = full.get_submodule(part).state_dict()
        assert all(torch.equal(small.get_submodule(part).state_dict()[name], value) for name, value in weights.items())
    sizes = [sum(p.numel() for p in model.pixel_decoder.parameters()) for model in (full, small)]
    assert small.config.decoder == small_decoder(full.config.decoder) and sizes[1] < sizes[0]


def test_every_size_has_a_decoder_of_a_fraction_of_the_work() -> None:
    for size in ("pico", "nano", "1b", "3b"):
        full = preset(size)
        with torch.device("meta"):
            models = [
                UniLIP(full.replace(decoder=d), parts=("pixel_decoder",))
                for d in (full.decoder, small_decoder(full.decoder))
            ]
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        assert counts[1] < 0.3 * counts[0], size


def test_it_is_chosen_when_a_model_is_loaded(
    trained: Path, tiny_folder: Path, tmp_path: Path, picture: Callable[..., Image.Image], capsys: Any
) -> None:
    """By its folder, as the one beside the weights, in low memory, by the command line; saved, it is the model's."""
    source, config = picture(), UniLIP.from_pretrained(trained).config.decoder
    expected = UniLIP.from_pretrained(trained).reconstruct(source)[0].tobytes()
    assert expected != UniLIP.from_pretrained(tiny_folder).reconstruct(source)[0].tobytes()
    model = UniLIP.from_pretrained(tiny_folder, decoder=trained)
    assert model.config.decoder == config and model.reconstruct(source)[0].tobytes() == expected
    latents = (
        UniLIP.from_pretrained(tiny_folder).generate("a dog", generator=1, output_type="latent", progress=False).images
    )
    assert torch.equal(model.generate("a dog", generator=1, output_type="latent", progress=False).images, latents)
    with pytest.raises(CheckpointError, match=r"has no small decoder.*SIZE/small_decoder"):
        UniLIP.from_pretrained(tiny_folder, decoder="small")
    model.save_pretrained(tmp_path / "own")
    assert UniLIP.from_pretrained(tmp_path / "own").reconstruct(source)[0].tobytes() == expected
    UniLIP.from_pretrained(tiny_folder).save_pretrained(tmp_path / "both")
    (tmp_path / "both" / SMALL).symlink_to(trained)
    beside = UniLIP.from_pretrained(tmp_path / "both", decoder="small", low_memory=True)
    assert beside.reconstruct(source)[0].tobytes() == expected
    source.save(tmp_path / "picture.png")
    words = ["reconstruct", str(tmp_path / "picture.png"), "--device", "cpu", "--output", str(tmp_path / "again.png")]
    assert cli.main([*words, "--model", str(tmp_path / "both"), "--decoder", "small"]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == expected
    assert cli.main([*words, "--model", str(tiny_folder), "--decoder", "small", "--force"]) == 2
    assert "small_decoder" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(
    trained: Path, tiny_folder: Path, fresh_model: Any, tmp_path: Path
) -> None:
    fresh_model(latent_factor=2.0).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other latents"):
        UniLIP.from_pretrained(tmp_path / "other", decoder=trained)
    with pytest.raises(UniLIPError, match="parts leaves pixel_decoder out"):
        UniLIP.from_pretrained(tiny_folder, decoder=trained, parts=("encoder",))
    fresh_model(parts=("encoder",)).save_pretrained(tmp_path / "blind")
    with pytest.raises(CheckpointError, match="has no pixel_decoder"):
        UniLIP.from_pretrained(tiny_folder, decoder=tmp_path / "blind")
    with pytest.raises(CheckpointError, match="give"):
        UniLIP.from_pretrained(tiny_folder, decoder=3)  # type: ignore[arg-type]
    recipe = get_recipe("tiny/small_decoder")
    for setting in ("objective.gan=1", "objective.distill=1", "objective.states=-1", "trains=encoder,pixel_decoder"):
        with pytest.raises(ConfigError):
            override(recipe, [setting])
    with pytest.raises(ConfigError, match="init teacher"):
        build(override(recipe, [f"init=encoder,latent_head={tiny_folder}"]), tmp_path)
