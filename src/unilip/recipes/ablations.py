"""The paper's claims as recipes, `unilip train ablation/SIZE/VARIANT`: one base setting, and what differs.

In: the numbers of a size (`Base`). Out: recipes of equal budgets. Every seed has a folder of its own,
runs/ablation/SIZE/VARIANT/seedN, and stands on the earlier stage of the same seed. `unilip eval claims` measures what
has been trained.

`recon_*` teach a tokenizer, all from the same short first stage; `gen_*` and `sweep_*` teach generation and edits. At
pico a diffusion transformer from nothing learns too little in minutes, so there queries and connector are new and the
rest goes on from `pico/sft`, which was trained with the dual condition; the variants that need other latents
(`gen_separate` and `gen_shared` beside it) start from nothing at every size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from unilip.recipes.record import GENERATE, TOKENIZER, WHOLE_TOKENIZER, Data, Flow, Optim, Recipe, Reconstruct
from unilip.sizes import preset

SWEEPS: dict[str, tuple[int, ...]] = {"num_queries": (1, 4, 16, 64), "connector_layers": (1, 2, 4)}


@dataclass(frozen=True)
class Base:
    """What the ablations of one size share.

    `encoder` and `llm` are the recipes whose results are the original encoder and its language model, `tokenizer` and
    `generator` those that generation starts from (no `generator`: the transformer starts from nothing). `first` and
    `second` are the steps of the tokenizer's two stages, `flow` those of generation, `whole` those of generation from
    nothing.
    """

    size: str
    encoder: str
    llm: str
    tokenizer: str
    generator: str
    first: int
    second: int
    flow: int
    whole: int
    recon_batch: int
    flow_batch: int
    recon_optim: Optim
    flow_optim: Optim
    distill: float
    common: dict[str, Any]
    perceptual: float = 0.0
    contrast: float = 0.05
    ema: float = 0.99
    noises: int = 4
    flow_dtype: str = ""  # where it is another than the tokenizer's


def pico() -> Base:
    """Minutes for each on one core."""
    optim = Optim(lr=1e-3, weight_decay=0.01, final=0.02)
    return Base(
        size="pico", encoder="pico/clip", llm="pico/instruct", tokenizer="pico/recon_distill",
        generator="pico/sft", first=100, second=400, flow=800, whole=1500, recon_batch=16, flow_batch=16,
        recon_optim=dataclasses.replace(optim, lr=1.5e-3), flow_optim=optim, distill=0.1,
        flow_dtype="bfloat16",
        common=dict(model="pico", data=Data(world="pico"), sample_every=300, save_every=50, keep=1, log_every=10),
    )  # fmt: skip


def nano() -> Base:
    """Minutes for each on one large GPU; nothing starts from a finished generator."""
    optim = Optim(lr=8e-4, weight_decay=0.01, final=0.02)
    return Base(
        size="nano", encoder="nano/instruct", llm="nano/instruct", tokenizer="nano/recon_distill", generator="",
        first=800, second=3000, flow=4000, whole=4000, recon_batch=128, flow_batch=256, recon_optim=optim,
        flow_optim=optim, distill=0.05, perceptual=0.02, ema=0.998,
        common=dict(
            model="nano", data=Data(world="nano", workers=14), dtype="bfloat16", sample_every=500, save_every=500,
            log_every=50,
        ),
    )  # fmt: skip


def tiny() -> Base:
    """Seconds for each, on drawn shapes: what the tests run."""
    return Base(
        size="tiny", encoder="tiny/instruct", llm="tiny/instruct", tokenizer="tiny/recon_distill",
        generator="tiny/sft", first=2, second=2, flow=2, whole=2, recon_batch=2, flow_batch=2, recon_optim=Optim(),
        flow_optim=Optim(), distill=0.1, ema=0.9, noises=1,
        common=dict(
            model="tiny", data=Data(world="tiny", path="synthetic"), log_every=1, sample_every=2, save_every=2,
        ),
    )  # fmt: skip


def variant(base: Base, name: str, note: str, **changes: Any) -> Recipe:
    """Make the recipe of one variant; `changes` are fields of the recipe."""
    fields: dict[str, Any] = {**base.common, "name": f"ablation/{base.size}/{name}", "per_seed": True, "note": note}
    return Recipe(**(fields | changes))


def tokenizers(base: Base) -> list[Recipe]:
    """Claims 1 and 2: what keeps the features while pictures become exact; two stages together are as long as one."""
    first = f"{WHOLE_TOKENIZER}=ablation/{base.size}/recon/seed{{seed}}"
    original = f"teacher={base.encoder}"
    pixels = Reconstruct(perceptual=base.perceptual)
    distilled = dataclasses.replace(pixels, distill=base.distill)

    def second(name: str, note: str, objective: Reconstruct, trains: Any = TOKENIZER, **changes: Any) -> Recipe:
        fields: dict[str, Any] = dict(
            objective=objective, trains=trains, steps=base.second, batch_size=base.recon_batch, optim=base.recon_optim,
            ema=base.ema, init=(first,),
        )  # fmt: skip
        return variant(base, name, note, **(fields | changes))

    return [
        second(
            "recon", "stage 1, shared: the encoder is frozen", pixels, TOKENIZER[1:], steps=base.first, ema=0.0,
            optim=dataclasses.replace(base.recon_optim, final=0.5), init=(f"encoder={base.encoder}",),
        ),
        second("recon_frozen", "stage 1 goes on: what can be had from the frozen encoder", pixels, TOKENIZER[1:]),
        second("recon_free", "unfrozen without distillation", pixels),
        second("recon_distill", "the paper's: two stages with distillation", distilled, measure_latents=True),
        second(
            "recon_one_stage", "unfrozen with distillation from the start", distilled,
            steps=base.first + base.second, init=(f"encoder={base.encoder}",),
        ),
        second(
            "recon_fixed_decoder", "stage 2 with the pixel decoder frozen", distilled, TOKENIZER[:2],
        ),
        second(
            "recon_contrastive", "the contrastive loss in place of distillation",
            dataclasses.replace(pixels, contrastive=base.contrast), init=(first, f"mllm={base.encoder}"),
        ),
        second(
            "autoencoder", "an encoder that was never taught to understand, for two encoders", pixels,
            steps=base.first + base.second, init=(original,), measure_latents=True,
        ),
    ]  # fmt: skip


def generators(base: Base) -> list[Recipe]:
    """Claims 3 to 6: what the condition consists of, in the same latent space."""
    if base.generator:
        init: tuple[str, ...] = (f"{WHOLE_TOKENIZER},mllm,dit={base.generator}",)
    else:
        init = (f"{WHOLE_TOKENIZER}={base.tokenizer}", f"mllm={base.llm}")
    data = dataclasses.replace(base.common["data"], edit_share=0.5)
    usual = preset(base.size)

    def flow(name: str, note: str, config: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        fields: dict[str, Any] = dict(
            objective=Flow(noises=base.noises), trains=GENERATE, steps=base.flow, batch_size=base.flow_batch,
            optim=base.flow_optim, ema=base.ema, init=init, data=data,
            config=tuple({"num_queries": usual.num_queries, **(config or {})}.items()),
        )  # fmt: skip
        fields |= {"dtype": base.flow_dtype} if base.flow_dtype else {}
        return variant(base, name, note, **(fields | changes))

    nothing = (f"mllm={base.llm}",)
    return [
        flow("gen_dual", "the paper's: hidden states of prompt and queries; the other variants differ in one thing"),
        flow("gen_queries", "the queries' hidden states only", {"condition": "queries"}),
        flow(
            "gen_hidden", "the prompt's hidden states only", {"condition": "hidden"},
            trains=(("connector", 1.0), ("dit", 1.0)),
        ),
        flow("gen_unsubstituted", "edits without the encoder's own features", {"substitute_features": False}),
        flow(
            "gen_shared", "one encoder for all, the transformer from nothing", steps=base.whole,
            init=(f"{WHOLE_TOKENIZER}=ablation/{base.size}/recon_distill/seed{{seed}}", *nothing),
        ),
        flow(
            "gen_separate", "two encoders: CLIP's understands, an autoencoder's latents are drawn", steps=base.whole,
            objective=Flow(noises=base.noises, target="separate"),
            init=(
                f"encoder={base.encoder}", f"latent_head,pixel_decoder=ablation/{base.size}/autoencoder/seed{{seed}}",
                *nothing, f"autoencoder=ablation/{base.size}/autoencoder/seed{{seed}}",
            ),
        ),
        *(
            flow(f"sweep_{field}_{value}", f"{field} {value}", {field: value})
            for field, values in SWEEPS.items()
            for value in values
            if value != getattr(usual, field)  # that is gen_dual
        ),
    ]  # fmt: skip


def ablations() -> list[Recipe]:
    """Return every ablation of every size."""
    return [recipe for make in (tiny, pico, nano) for part in (tokenizers, generators) for recipe in part(make())]
