"""Recipes: every one is a whole, valid record; the paper's are the paper's; single values can be overridden."""

import dataclasses
import json
import math
import re
from functools import partial

import pytest
import torch

from support import failures
from unilip.errors import ConfigError
from unilip.model import PARTS, UniLIP
from unilip.recipes.catalog import SIZES, all_recipes, get_recipe
from unilip.recipes.record import (
    FREE_TO_CHANGE,
    Data,
    Flow,
    Optim,
    Recipe,
    Reconstruct,
    Shrink,
    Understand,
    leaves,
    override,
    plain,
    require_same,
)
from unilip.sizes import PRESETS, preset
from unilip.train.build import BESIDE, parse_init, trained_parameters
from unilip.train.objectives import needed_parts

RECIPES = all_recipes()
PUBLISHED = {
    "1b": ("OpenGVLab/InternVL3-1B-hf", "Efficient-Large-Model/Sana_600M_512px_diffusers"),
    "3b": ("OpenGVLab/InternVL3-2B-hf", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}
DCAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
EMBEDDED_STAGES = ("clip", "instruct", "recon", "recon_distill", "pretrain", "sft")
PAPER_STAGES = ("recon", "recon_distill", "recon_448", "connector", "pretrain", "sft")
each_paper_size = pytest.mark.parametrize("size", PUBLISHED)


@pytest.fixture(scope="module")
def shapes():
    """Whole models of every size, without memory."""
    with torch.device("meta"):
        return {size: UniLIP(preset(size)) for size in PRESETS}


def record(**changes) -> Recipe:
    values = dict(name="x/y", model="tiny", objective=Reconstruct(), trains=(("encoder", 1.0),), steps=2, batch_size=2)
    return Recipe(**(values | changes))


def test_every_size_has_its_stages():
    assert set(SIZES) == set(PRESETS)
    for size in SIZES:
        stages = [name.split("/")[1] for name in RECIPES if name.startswith(f"{size}/")]
        wanted = PAPER_STAGES if size in PUBLISHED else EMBEDDED_STAGES
        assert tuple(stage for stage in stages if stage in wanted) == wanted
        assert len(set(stages)) == len(stages)


def check_plain_record(name):
    recipe = get_recipe(name)
    assert recipe.name == name and (name.startswith("lora/") or recipe.model == name.split("/")[-2])
    assert json.loads(json.dumps(plain(recipe))) == plain(recipe)
    require_same(recipe, plain(recipe), "it")
    assert override(recipe, [f"{k}={v}" for k, v in leaves(recipe).items() if isinstance(v, (int, float))]) == recipe


def check_what_trains(name, shapes):
    """What trains exists and is reached."""
    recipe = override(get_recipe(name), ["adapter.rank=0"])  # an adapter stands beside what would train without it
    trained = trained_parameters(recipe, shapes[recipe.model])
    assert trained
    named = {part for parts, _ in parse_init(recipe) for part in parts}
    built = set(PARTS) if "all" in named else (named & set(PARTS)) | set(needed_parts(recipe.objective))
    assert {parameter.split(".")[0] for parameter in trained} <= built


def check_start(name):
    """A stage starts from earlier stages or published weights."""
    recipe = get_recipe(name)
    size = recipe.model
    earlier = [n for n, other in RECIPES.items() if other.model == size]
    earlier = [RECIPES[n].folder for n in earlier[: earlier.index(name)]]
    known = {*earlier, *PUBLISHED.get(size, ()), *([DCAE] if size in PUBLISHED else [])}
    known = {"embedded"} if name.startswith("lora/") else known
    sources = parse_init(recipe)
    assert {source for _, source in sources} <= known
    if earlier and size not in PUBLISHED:
        assert sources, "a later stage starts from something"
    held = {part for parts, _ in sources for part in parts}
    needed = set(needed_parts(recipe.objective)) - {part for part, _ in recipe.trains}
    fresh = needed - held - {"connector"}
    assert "all" in held or not fresh or name.endswith("/clip"), f"{fresh} are frozen and come from nowhere"


def test_every_recipe(shapes):
    assert failures(check_plain_record, RECIPES) == []
    assert failures(partial(check_what_trains, shapes=shapes), RECIPES) == []
    assert failures(check_start, RECIPES) == []


# The table of the specification, section 5: what the paper and the authors' code say of each stage.
ENCODER = {"encoder": 0.1, "latent_head": 1.0, "pixel_decoder": 1.0}
CONNECT = {"mllm.queries": 1.0, "connector": 1.0}  # the connector includes the projection to the DiT
TABLE = {
    "recon": dict(
        trains={"latent_head": 1.0, "pixel_decoder": 1.0}, image_size=224, steps=400_000, warm=10_000, decay=1e-4,
        ema=0.999, distill=0.0, gan=0.0, from_=("encoder=INTERNVL", "pixel_decoder=DCAE"), batch=(64, 4),
    ),
    "recon_distill": dict(
        trains=ENCODER, image_size=224, steps=400_000, warm=10_000, decay=1e-4, ema=0.999, distill=1.0, gan=0.1,
        gan_start=200_000, from_=("encoder,latent_head,pixel_decoder=SIZE/recon",), batch=(32, 4),
    ),
    "recon_448": dict(
        trains=ENCODER, image_size=448, steps=100_000, warm=10_000, decay=1e-4, ema=0.999, distill=1.0, gan=0.1,
        gan_start=0, batch=(32, 4),
        from_=("encoder,latent_head,pixel_decoder=SIZE/recon_distill", "teacher=INTERNVL"),
    ),
    "connector": dict(
        trains=CONNECT, image_size=448, steps=50_000, warm=150, decay=0.0, ema=0.0, target="dcae", edits=0.0,
        from_=("encoder,mllm=INTERNVL", "dit=SANA", "autoencoder=DCAE"), batch=(32, 16),
    ),
    "pretrain": dict(
        trains=CONNECT | {"dit": 1.0}, image_size=448, steps=200_000, warm=600, decay=0.0, ema=0.0, target="unilip",
        edits=10 * 1.5 / (10 * 1.5 + 38), batch=(32, 16),
        from_=("encoder,latent_head,pixel_decoder=SIZE/recon_448", "mllm,connector,dit=SIZE/connector"),
    ),
    "sft": dict(
        trains=CONNECT | {"dit": 1.0}, image_size=448, steps=30_000, warm=90, decay=0.0, ema=0.0, target="unilip",
        edits=3 * 46 / (3 * 46 + 45 + 60), from_=("all=SIZE/pretrain",), batch=(32, 16),
    ),
}  # fmt: skip


@each_paper_size
@pytest.mark.parametrize("stage", TABLE)
def test_paper_numbers(size, stage):
    row, recipe = TABLE[stage], get_recipe(f"{size}/{stage}")
    internvl, sana = PUBLISHED[size]
    names = {"INTERNVL": internvl, "SANA": sana, "DCAE": DCAE, "SIZE": size}
    wanted = tuple(text for text in row["from_"])
    for short, long in names.items():
        wanted = tuple(text.replace(short, long) for text in wanted)
    assert recipe.init == wanted
    assert dict(recipe.trains) == row["trains"]
    assert recipe.dtype == "bfloat16" and recipe.data.image_size == row["image_size"]
    assert (recipe.steps, recipe.ema, recipe.optim.weight_decay) == (row["steps"], row["ema"], row["decay"])
    optim = recipe.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.grad_clip) == (1e-4, 0.9, 0.999, 1.0)
    assert optim.lr * optim.final == pytest.approx(1e-5)
    assert optim.warmup * recipe.steps == pytest.approx(row["warm"])
    assert (recipe.batch_size, recipe.accumulate) == row["batch"]
    if isinstance(recipe.objective, Reconstruct):
        loss = recipe.objective
        assert (loss.pixel, loss.perceptual, loss.perceptual_source) == (1.0, 1.1, "lpips")
        assert (loss.distill, loss.gan, loss.lecam) == (row["distill"], row["gan"], 0.001)
        assert loss.gan_start == row.get("gan_start", 0)
    else:
        assert recipe.batch_size * recipe.accumulate == 512
        assert (recipe.objective.target, recipe.objective.drop_prompt) == (row["target"], 0.1)
        assert recipe.data.edit_share == pytest.approx(row["edits"], abs=0.005)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean nano/recon_distill"):
        get_recipe("nano/recon_distil")


# --- overriding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps=1_000", 1000),
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("gradient_checkpointing=true", True),
        ("gradient_checkpointing=No", False),
        ("dtype=bfloat16", "bfloat16"),
        ("data.path= /a b/c=d ", "/a b/c=d"),
        ("note=", ""),
        ("trains=encoder:0.1,latent_head", (("encoder", 0.1), ("latent_head", 1.0))),
        ("init=", ()),
        ("init=all=/some/folder", ("all=/some/folder",)),
        ("init=encoder,mllm=nano/clip,dit=a/b", ("encoder,mllm=nano/clip", "dit=a/b")),
        ("objective.gan_start=7", 7),
        ("data.workers=3", 3),
    ],
)
def test_override_reads_every_kind_of_value(setting, value):
    recipe = override(get_recipe("tiny/recon_distill"), [setting])
    found = leaves(recipe)[setting.split("=")[0]]
    assert found == value and type(found) is type(value)
    assert type(leaves(recipe)["optim.lr"]) is float


def test_override_applies_all_settings_at_once():
    settings = ["data.source=files", "data.path=/x", "optim.lr=2", "optim.lr=3"]  # the first alone would be invalid
    recipe = override(get_recipe("tiny/recon"), settings)
    assert (recipe.data.source, recipe.data.path, recipe.optim.lr) == ("files", "/x", 3.0)
    assert get_recipe("tiny/recon").data.source == "emoji"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lr", "optim.lr"),
        ("optim.learning_rate", "optim"),
        ("objective.distil", "objective.distill"),
        ("step", "steps"),
    ],
)
def test_unknown_setting_names_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"no setting '{name}'. Did you mean {near}"):
        override(get_recipe("tiny/recon"), [f"{name}=1"])


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("steps", "NAME=VALUE"),
        ("steps=many", "int"),
        ("steps=1.5", "int"),
        ("steps=0", "at least 1"),
        ("accumulate=0", "at least 1"),
        ("optim.lr=fast", "float"),
        ("optim.lr=nan", "float"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.grad_clip=0", "greater than 0"),
        ("optim.warmup=1", "below 1"),
        ("optim.beta2=1", "below 1"),
        ("optim.final=2", "between 0 and 1"),
        ("optim.weight_decay=-1", "at least 0"),
        ("ema=1", "below 1"),
        ("dtype=float16", "allowed: float32, bfloat16"),
        ("weights_dtype=bfloat16", "set dtype=bfloat16 as well"),
        ("gradient_checkpointing=perhaps", "bool"),
        ("trains=", "one of them above 0"),
        ("trains=encoder:-1", "at least 0"),
        ("trains=encoder:x", "tuple"),
        ("objective.distill=-1", "at least 0"),
        ("objective.perceptual_source=vgg", "allowed: teacher"),
        ("data.source=web", "allowed: emoji, files"),
        ("data.source=files", "data.path is empty"),
        ("data.image_size=100", "multiple of 28"),
        ("data.edit_share=0.5", "no edits"),
        ("data.text_share=0.5", "next_token"),
        ("data.workers=-1", "at least 0"),
        ("data.fit=stretch", "allowed: auto"),
        ("data.max_skipped=2", "share between"),
        ("data.window=0", "at least 1"),
        ("data.lanes=3", "must divide"),
        ("data.cache=x", "for data.source=files"),
        ("gradient_checkpointing=1 selective_checkpointing=1", "set one of them"),
        ("compile=1 selective_checkpointing=1", "set one of them"),
        ("name=../../elsewhere", "folder"),
    ],
)
def test_bad_values_are_refused(setting, word):
    recipe = dataclasses.replace(get_recipe("tiny/recon"), data=Data(world="tiny"))
    with pytest.raises(ConfigError, match=word):
        override(recipe, setting.split())


def test_records_check_themselves():
    for wrong in (
        lambda: record(objective=Flow()),
        lambda: record(checks=("loss <= .",)),
        lambda: record(checks=("loss <= 1.2.3",)),
        lambda: record(measure_latents=True, objective=Flow(), trains=(("dit", 1.0),)),
        lambda: Understand(contrastive=0, words=0, next_token=0),
        lambda: Understand(turns=0),
        lambda: Flow(target="vae"),
        lambda: Flow(noises=0),
        lambda: Flow(drop_prompt=1.5),
        lambda: Reconstruct(augment=1.5),
        lambda: Reconstruct(augment=0.5, contrastive=1),
        lambda: Shrink(augment=0.5),
        lambda: override(
            get_recipe("tiny/recon"), ["objective.augment=0.5", "data.source=files", "data.path=x", "data.cache=y"]
        ),
        lambda: Data(edit_share=-0.1),
        lambda: Data(source="files", path="x", edits="add"),
        lambda: Optim(lr=math.inf),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="features a cache holds"):
        cached = ["objective.augment=0.5", "data.source=files", "data.path=x", "data.cache=y"]
        override(get_recipe("tiny/recon"), cached)


@pytest.mark.parametrize("init", ["encoder", "encoder=", "enkoder=x", "all,encoder=x", "encoder,teacher=x"])
def test_init_must_name_parts_and_a_source(init):
    with pytest.raises(ConfigError, match="PART,PART=SOURCE"):
        parse_init(record(init=(init,)))
    assert BESIDE == ("autoencoder", "teacher")


def test_changed_settings_are_told_but_for_those_free_to_change():
    recipe = get_recipe("tiny/sft")
    free = override(recipe, ["save_every=9", "data.workers=2", "note=x", "keep=1", "log_every=3", "sample_every=4"])
    require_same(free, plain(recipe), "it")
    assert set(FREE_TO_CHANGE) <= set(leaves(recipe))
    other = override(recipe, ["optim.lr=1", "objective.noises=3"])
    told = "it was made with other settings: objective.noises (1 -> 3), optim.lr (0.0001 -> 1.0). Restart"
    with pytest.raises(ConfigError, match=re.escape(told)):
        require_same(other, plain(recipe), "it")
    earlier = {k: v for k, v in plain(recipe).items() if k not in ("optim.lr", "data.world")}
    with pytest.raises(ConfigError, match=re.escape("settings: data.world (nano -> tiny). Restart")):
        require_same(recipe, earlier, "it")  # a new setting had its default before
