"""Every recipe by name, SIZE/STAGE: the embedded models' stages, the paper's six, and the ablations of its claims.

The stages of one size are functions of that size's numbers; a new size is a few lines.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from unilip.errors import ConfigError
from unilip.recipes.ablations import ablations
from unilip.recipes.record import (
    CONNECT,
    GENERATE,
    TOKENIZER,
    WHOLE_TOKENIZER,
    Adapter,
    Data,
    FewSteps,
    Flow,
    Optim,
    Recipe,
    Reconstruct,
    Shrink,
    Understand,
)

Fields = dict[str, Any]


def pico() -> list[Recipe]:
    """The CPU edition: 112 px, one style, about forty concepts; hours on two cores."""
    data = Data(world="pico")
    common: Fields = dict(model="pico", data=data, dtype="bfloat16", sample_every=500, save_every=100)
    optim = Optim(lr=1e-3, weight_decay=0.01, grad_clip=1.0, final=0.02)
    bound = ("bind_concept >= 0.97", "bind_colour >= 0.9", "bind_place >= 0.9")
    return [
        Recipe(
            name="pico/clip", objective=Understand(contrastive=0.0, local=0.2, turns=1), trains=(("encoder", 1.0),),
            steps=1000, batch_size=128, optim=optim, checks=("local_concept >= 0.9", "local_place >= 0.9"), **common,
            note="the caption's words from the whole, and what lies on each token from that token",
        ),
        Recipe(
            name="pico/instruct",
            objective=Understand(contrastive=0.0, words=0.0, next_token=1.0, bind=1.0, ground=0.5, turns=4),
            trains=(("mllm", 1.0),), steps=4000, batch_size=32, optim=optim, init=("encoder=pico/clip",), checks=bound,
            **(common | {"data": dataclasses.replace(data, text_share=0.75)}),
            note="answers, what words mean, and captions written out; the tokenizer's stages can run beside it",
        ),
        Recipe(
            name="pico/recon", objective=Reconstruct(perceptual=0.0), trains=TOKENIZER[1:], steps=400, batch_size=16,
            optim=dataclasses.replace(optim, final=0.5), init=("encoder=pico/clip",), **common,
        ),
        Recipe(
            name="pico/recon_distill", objective=Reconstruct(perceptual=0.0, distill=0.1), trains=TOKENIZER, steps=6000,
            batch_size=16, optim=optim, init=(f"{WHOLE_TOKENIZER}=pico/recon",),
            ema=0.995, measure_latents=True, **common,
        ),
        Recipe(
            name="pico/pretrain", objective=Flow(noises=8, bind=0.05, lesson_steps=600, repa=0.5), trains=GENERATE,
            steps=6000, batch_size=32, optim=optim,
            init=(f"{WHOLE_TOKENIZER}=pico/recon_distill", "mllm=pico/instruct"), ema=0.998,
            checks=bound, **(common | {"data": dataclasses.replace(data, edit_share=0.3)}),
            note="connector and pretrain in one: a DiT from nothing has no latents of its own to connect to first",
        ),
        Recipe(
            name="pico/sft", objective=Flow(noises=8, bind=0.05), trains=GENERATE, steps=6000, batch_size=32,
            optim=dataclasses.replace(optim, lr=7e-4), ema=0.998, init=("all=pico/pretrain",),
            **(common | {"data": dataclasses.replace(data, edit_share=0.6)}),
        ),
        *few(
            "pico", FewSteps(guidance=2.5, edit_guidance=2.5, noises=6), steps=6000, batch_size=16,
            optim=dataclasses.replace(optim, lr=5e-4, final=0.1),
            **(common | {"data": dataclasses.replace(data, edit_share=0.5)}),
        ),
        shrink("pico", Shrink(), steps=4000, batch_size=16, optim=optim, **common),
    ]  # fmt: skip


def nano() -> list[Recipe]:
    """The embedded model proper: 224 px, all concepts; about half an hour of one H100."""
    data = Data(world="nano", workers=14)
    common: Fields = dict(model="nano", data=data, dtype="bfloat16", sample_every=500, save_every=500, log_every=50)
    optim = Optim(lr=8e-4, weight_decay=0.01, final=0.02)
    return [
        Recipe(
            name="nano/clip", objective=Understand(contrastive=0.0, local=0.2, turns=1), trains=(("encoder", 1.0),),
            steps=3000, batch_size=512, optim=optim, **common,
        ),
        Recipe(
            name="nano/instruct",
            objective=Understand(
                contrastive=0.25, words=0.25, next_token=1.0, local=0.2, bind=1.0, ground=0.5, turns=4
            ),
            trains=(("encoder", 0.5), ("mllm", 1.0)), steps=6000, batch_size=256, optim=optim,
            init=("encoder=nano/clip",), **(common | {"data": dataclasses.replace(data, text_share=0.5)}),
        ),
        Recipe(
            name="nano/recon", objective=Reconstruct(perceptual=0.0), trains=TOKENIZER[1:], steps=800, batch_size=128,
            optim=dataclasses.replace(optim, lr=1e-3, final=0.5), init=("encoder=nano/instruct",), **common,
        ),
        Recipe(
            name="nano/recon_distill", objective=Reconstruct(perceptual=0.02, distill=0.05), trains=TOKENIZER,
            steps=12000, batch_size=128, optim=optim, init=(f"{WHOLE_TOKENIZER}=nano/recon",), ema=0.999,
            measure_latents=True, **common,
        ),
        Recipe(
            name="nano/pretrain", objective=Flow(noises=4, bind=0.05, lesson_steps=1000, repa=0.5), trains=GENERATE,
            steps=12000, batch_size=256,
            init=(f"{WHOLE_TOKENIZER}=nano/recon_distill", "mllm=nano/instruct"), ema=0.999, optim=optim,
            **(common | {"data": dataclasses.replace(data, edit_share=0.3)}),
            note="connector and pretrain in one: a DiT from nothing has no latents of its own to connect to first",
        ),
        Recipe(
            name="nano/sft", objective=Flow(noises=4, bind=0.05), trains=GENERATE, steps=6000, batch_size=256,
            optim=dataclasses.replace(optim, lr=4e-4), init=("all=nano/pretrain",), ema=0.999,
            **(common | {"data": dataclasses.replace(data, edit_share=0.6)}),
        ),
        *few(
            "nano", FewSteps(guidance=3.0, edit_guidance=3.0), steps=15000, batch_size=128,
            optim=dataclasses.replace(optim, lr=2e-4, final=0.1),
            **(common | {"data": dataclasses.replace(data, edit_share=0.5)}),
        ),
        shrink("nano", Shrink(), steps=8000, batch_size=128, optim=optim, **common),
    ]  # fmt: skip


def tiny() -> list[Recipe]:
    """Every stage in seconds, on drawn shapes instead of art: what the tests run."""
    data = Data(world="tiny", path="synthetic")
    common: Fields = dict(model="tiny", data=data, batch_size=2, steps=4, log_every=1, sample_every=2, save_every=2)
    return [
        Recipe(
            name="tiny/clip", objective=Understand(local=0.2, turns=1), trains=(("encoder", 1.0), ("mllm", 1.0)),
            **common,
        ),
        Recipe(
            name="tiny/instruct", objective=Understand(next_token=1.0, bind=1.0, ground=0.5),
            trains=(("encoder", 0.5), ("mllm", 1.0)), init=("encoder,mllm=tiny/clip",),
            **(common | {"data": dataclasses.replace(data, text_share=0.5)}),
        ),
        Recipe(
            name="tiny/recon", objective=Reconstruct(perceptual=0.1), trains=TOKENIZER[1:],
            init=("encoder=tiny/instruct",), **common,
        ),
        Recipe(
            name="tiny/recon_distill", objective=Reconstruct(perceptual=0.1, distill=0.1, gan=0.1, gan_start=2),
            trains=TOKENIZER, init=(f"{WHOLE_TOKENIZER}=tiny/recon",), ema=0.9, measure_latents=True, **common,
        ),
        Recipe(
            name="tiny/pretrain", objective=Flow(noises=2), trains=GENERATE, ema=0.9,
            init=(f"{WHOLE_TOKENIZER}=tiny/recon_distill", "mllm=tiny/instruct"), **common,
        ),
        Recipe(
            name="tiny/sft", objective=Flow(), trains=GENERATE, init=("all=tiny/pretrain",), ema=0.9,
            **(common | {"data": dataclasses.replace(data, edit_share=0.5)}),
        ),
        *few("tiny", FewSteps(noises=2), **(common | {"data": dataclasses.replace(data, edit_share=0.5)})),
        shrink("tiny", Shrink(), **common),
    ]  # fmt: skip


def shrink(size: str, objective: Shrink, **settings: Any) -> Recipe:
    """A pixel decoder of half the widths for the finished model."""
    return Recipe(
        name=f"{size}/small_decoder", note="a decoder of about a tenth of the work: --decoder",
        trains=(("pixel_decoder", 1.0),), init=(f"encoder,latent_head={size}/sft", f"teacher={size}/sft"), ema=0.999,
        objective=objective, **settings,
    )  # fmt: skip


def few(size: str, objective: FewSteps, **settings: Any) -> list[Recipe]:
    """The finished model made to draw in four steps or fewer, and the same as an adapter of it."""
    common: Fields = dict(trains=(("dit", 1.0),), init=(f"all={size}/sft",), ema=0.99, objective=objective)
    return [
        Recipe(name=f"{size}/few", note="four steps or fewer, without guidance: preset turbo", **(common | settings)),
        Recipe(
            name=f"{size}/few_lora", note="an adapter of the finished model that lets it draw in few steps",
            adapter=Adapter(rank=4 if size == "tiny" else 64), **(common | settings),
        ),
    ]  # fmt: skip


def paper(size: str, internvl: str, sana: str) -> list[Recipe]:
    """The paper's six stages at a released size (section 4.1 and the authors' settings).

    One process runs a recipe, so `accumulate` makes up the authors' global batch: 512 for the flow stages (16 GPUs x
    32), four GPUs' batches for the tokenizer's. The data are files (`--set data.path=...`); starting points are
    looked for under their published names and can be local folders (`--set init=...`).
    """
    dcae = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    pixels = Data(source="files", path="data/images", image_size=224, workers=8)
    pairs = Data(source="files", path="data/pairs", image_size=448, workers=8)
    # Shares that follow from how often the authors repeat their edits: 10 x 1.5 M pairs beside 38 M captioned pictures;
    # 3 x 46 k pairs (ShareGPT-4o-Image) beside its 45 k pictures and the 60 k of BLIP3o-60k.
    with_edits = dataclasses.replace(pairs, edit_share=0.28)
    curated = dataclasses.replace(pairs, edit_share=0.57)
    common: Fields = dict(model=size, dtype="bfloat16", log_every=50, sample_every=2500, save_every=2500)
    tokenizer: Fields = common | dict(ema=0.999, accumulate=4)
    generator: Fields = common | dict(batch_size=32, accumulate=16)
    slow_encoder = (("encoder", 0.1), *TOKENIZER[1:])
    recon = Optim(lr=1e-4, weight_decay=1e-4, warmup=10_000 / 400_000, final=0.1)
    flow = Optim(lr=1e-4, weight_decay=0.0, warmup=0.003, final=0.1)
    adversarial = Reconstruct(distill=1.0, gan=0.1, gan_start=200_000, perceptual_source="lpips")
    return [
        Recipe(
            name=f"{size}/recon", objective=Reconstruct(perceptual_source="lpips"), trains=TOKENIZER[1:], steps=400_000,
            batch_size=64, optim=recon, data=pixels, init=(f"encoder={internvl}", f"pixel_decoder={dcae}"),
            note="the frozen encoder's pictures: what a CLIP encoder alone keeps", **tokenizer,
        ),
        Recipe(
            name=f"{size}/recon_distill", objective=adversarial, trains=slow_encoder, steps=400_000, batch_size=32,
            optim=recon, data=pixels, init=(f"{WHOLE_TOKENIZER}={size}/recon",),
            note="the encoder learns to keep detail, held to its original by distillation", **tokenizer,
        ),
        Recipe(
            name=f"{size}/recon_448", objective=dataclasses.replace(adversarial, gan_start=0), trains=slow_encoder,
            steps=100_000, batch_size=32, optim=dataclasses.replace(recon, warmup=10_000 / 100_000),
            data=dataclasses.replace(pixels, image_size=448), gradient_checkpointing=True,
            init=(f"{WHOLE_TOKENIZER}={size}/recon_distill", f"teacher={internvl}"),
            note="full resolution; the teacher is still the original", **tokenizer,
        ),
        Recipe(
            name=f"{size}/connector", objective=Flow(target="dcae"), trains=CONNECT, steps=50_000, optim=flow,
            data=pairs, init=(f"encoder,mllm={internvl}", f"dit={sana}", f"autoencoder={dcae}"), **generator,
            note="the frozen DiT knows only its own autoencoder's latents, so these are the target here",
        ),
        Recipe(
            name=f"{size}/pretrain", objective=Flow(), trains=GENERATE, steps=200_000, optim=flow, data=with_edits,
            selective_checkpointing=True,
            init=(f"{WHOLE_TOKENIZER}={size}/recon_448", f"mllm,connector,dit={size}/connector"),
            note="the DiT learns the tokenizer's own latents; generation and edits", **generator,
        ),
        Recipe(
            name=f"{size}/sft", objective=Flow(), trains=GENERATE, steps=30_000, optim=flow, data=curated,
            selective_checkpointing=True, init=(f"all={size}/pretrain",), note="curated pictures and edits",
            **generator,
        ),
        *few(
            size, FewSteps(), steps=40_000, optim=dataclasses.replace(flow, final=1.0), data=curated,
            selective_checkpointing=True, **(generator | {"batch_size": 16, "accumulate": 8}),
        ),
        shrink(
            size, Shrink(perceptual=1.1, perceptual_source="lpips"), steps=100_000, batch_size=32,
            optim=dataclasses.replace(recon, warmup=0.01), data=dataclasses.replace(pixels, image_size=448),
            gradient_checkpointing=True, **(common | {"accumulate": 4}),
        ),
    ]  # fmt: skip


SIZES: dict[str, Callable[[], list[Recipe]]] = {
    "tiny": tiny,
    "pico": pico,
    "nano": nano,
    "1b": lambda: paper("1b", "OpenGVLab/InternVL3-1B-hf", "Efficient-Large-Model/Sana_600M_512px_diffusers"),
    "3b": lambda: paper("3b", "OpenGVLab/InternVL3-2B-hf", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}


def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by name, in the order in which stages follow each other; the ablations come last."""
    return {recipe.name: recipe for recipe in (*(r for make in SIZES.values() for r in make()), *ablations())}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name, SIZE/STAGE or ablation/SIZE/VARIANT.

    Raises:
        ConfigError: there is none of that name; the message has the nearest one.
    """
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"There is no recipe {name!r}.{hint} `unilip train --list` shows all of them.")
    return recipes[name]
