"""Drawing and editing: same seed same picture in any batch, every option has its effect, every mistake its message."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unilip import sampling
from unilip.errors import ConfigError, ImageError, PromptError, UniLIPError
from unilip.method.config import SamplingConfig
from unilip.model import ImageOutput, UniLIP
from unilip.sampling import draw_noise

PROMPTS = [
    "a cat",
    "three yellow stars above a blue house",
    "a dog",
    "one brown bird in the picture, with a red car and two green apples behind it",
    "the sea",
    "how many dogs",
    "blue",
    "a red apple on a table",
]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def steps_off(a: Image.Image, b: Image.Image) -> int:
    """How many of 256 steps two pictures differ at most."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@pytest.fixture(scope="module")
def draw(tiny_model):
    """Generate with few steps, seed 0, no bar: latents unless told otherwise."""

    def call(prompt="a cat", **options):
        quick = dict(num_inference_steps=4, generator=seeded(0)[0], output_type="latent", progress=False)
        return tiny_model.generate(prompt, **(quick | options)).images

    return call


@pytest.fixture(scope="module")
def edit(tiny_model):
    """Edit with few steps, seed 0, no bar: latents unless told otherwise."""

    def call(image, prompt="make it blue", **options):
        quick = dict(num_inference_steps=4, generator=seeded(0)[0], output_type="latent", progress=False)
        return tiny_model.edit(image, prompt, **(quick | options)).images

    return call


@pytest.fixture
def rows(tiny_model):
    """The number of rows of each call of the diffusion transformer."""
    counted = []
    first = tiny_model.dit.transformer.patch_embed["proj"]
    hook = first.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    yield counted
    hook.remove()


# --- same seed, same picture ------------------------------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_batch(draw):
    alone = [draw(prompt, generator=seeded(i)[0]) for i, prompt in enumerate(PROMPTS)]
    for size in (1, 2, 8):
        for start in range(0, 8, size):
            part = range(start, start + size)
            together = draw([PROMPTS[i] for i in part], generator=seeded(*part))
            assert together.shape == (size, 32, 2, 2)
            for latent, i in zip(together, part, strict=True):
                assert difference(latent[None], alone[i]) <= 1e-4


def test_the_pixels_do_not_depend_on_the_batch_either(draw):
    together = draw(PROMPTS, generator=seeded(*range(8)), output_type="pil")
    for i, prompt in enumerate(PROMPTS):
        assert steps_off(together[i], draw(prompt, generator=seeded(i)[0], output_type="pil")[0]) <= 1


def test_an_edit_does_not_depend_on_its_batch(edit, picture):
    sources = [picture(60, 50, i) for i in range(3)]
    together = edit(sources, PROMPTS[:3], generator=seeded(0, 1, 2))
    for i in range(3):
        assert difference(together[i : i + 1], edit(sources[i], PROMPTS[i], generator=seeded(i)[0])) <= 1e-4


def test_the_same_call_gives_the_same_picture(draw):
    assert torch.equal(draw(), draw())


def test_without_a_generator_every_call_differs(draw):
    assert difference(draw(generator=None), draw(generator=None)) > 0.1


def test_one_generator_serves_the_pictures_in_order(draw):
    together, generator = draw(["a cat", "a dog"]), seeded(0)[0]
    one_by_one = torch.cat([draw(prompt, generator=generator) for prompt in ("a cat", "a dog")])
    assert difference(together, one_by_one) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_pictures_are_ordered_prompt_by_prompt(guidance, draw):
    together = draw(PROMPTS[:2], num_images_per_prompt=3, generator=seeded(*range(6)), guidance_scale=guidance)
    assert together.shape[0] == 6
    for i, latent in enumerate(together):
        alone = draw(PROMPTS[i // 3], generator=seeded(i)[0], guidance_scale=guidance)
        assert difference(latent[None], alone) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_edits_are_ordered_source_by_source(guidance, edit, picture):
    sources = [picture(seed=i) for i in range(2)]
    options = dict(guidance_scale=guidance)
    together = edit(sources, PROMPTS[:2], num_images_per_prompt=2, generator=seeded(*range(4)), **options)
    for i, latent in enumerate(together):
        alone = edit(sources[i // 2], PROMPTS[i // 2], generator=seeded(i)[0], **options)
        assert difference(latent[None], alone) <= 1e-4


# --- every option counts ----------------------------------------------------------------------------------------------

OPTIONS = [
    {"negative_prompt": "a dog"},
    {"guidance_scale": 1.0},
    {"guidance_scale": 7.0},
    {"num_inference_steps": 5},
    {"solver": "euler"},
    {"solver": "unipc"},
    {"generator": 12},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_changes_the_picture(option, draw, edit, picture):
    if "generator" in option:
        option = {"generator": seeded(1)[0]}
    assert difference(draw(), draw(**option)) > 1e-4
    if "generator" in option:
        option = {"generator": seeded(1)[0]}
    assert difference(edit(picture()), edit(picture(), **option)) > 1e-4


@pytest.mark.parametrize(
    ("begun", "piece", "fits"),
    [
        ("", "a blue", True), ("a", " red", False), ("a blue", " star", False), ("a blue cactus in the", " top", True),
        ("a blue cactus on the left and a", " blue", False), ("a blue cactus and a", " yel", True),
        ("a blue cactus and a yel", " and", False), ("a blue cactus and a yellow star", " on a white background", True),
        ("a blue cactus and a yellow star", " on a pink", False), ("", "an", False),
        ("a blue cactus and", " an", False), ("A Blue cactus and a yellow star on the left", None, True),
        ("a blue cactus", None, False), ("a blue cactus and a yellow star", None, False),
    ],
)  # fmt: skip
def test_a_trained_plan_has_the_words_of_the_prompt_in_their_order_and_places(begun, piece, fits):
    class Pieces:
        """Token 1 is a piece of text; others are letters."""

        end_id = 0

        def decode(self, rows):
            return ["".join(piece if token == 1 else chr(token) for token in row) for row in rows]

    plan = sampling.TextStream(Pieces(), 99)
    for letter in begun:
        plan.take(ord(letter))
    assert sampling.may_follow(plan, 0 if piece is None else 1, "a blue cactus and a yellow star") is fits


def test_the_embedded_model_plans_pairs_that_it_never_met():
    model = UniLIP.from_pretrained("embedded")
    prompts = [
        "a banana and a sunflower",
        "a blue cactus and a yellow star",
        "a cat and an octopus on a pink background",
    ]
    prompts += ["a panda next to a fish", "Draw me a red star and a house!"]
    prompts += ["an image of a cat in front of a pink background", "a picture of an orange bell"]
    plans = model.generate(prompts, num_inference_steps=1, output_type="latent", progress=False).plans
    assert all(" in the " in plan and sampling.keeps(plan, prompt) for plan, prompt in zip(plans, prompts, strict=True))
    wide = model.generate(prompts, num_inference_steps=1, output_type="latent", progress=False, height=84, width=140)
    assert wide.plans == (), "what fits above each other in a square need not in another shape"
    said = "a dog below a bus on a blue background"  # places of its own are not written anew in the order of its words
    assert model.generate(said, num_inference_steps=1, output_type="latent", progress=False).plans == (said,)
    endless = ("a red ball", "a car 🚗")  # "of of of ..." to the limit; nothing fits behind the last word but one
    assert model.generate(endless, num_inference_steps=1, output_type="latent", progress=False).plans == endless


def test_a_plan_is_what_the_language_model_writes_and_what_is_drawn(fresh_model, monkeypatch):
    """The plan's picture is that of the plan as a prompt; "auto" plans where the config has the words for it."""
    model = fresh_model()
    quick = dict(num_inference_steps=2, output_type="latent", progress=False)
    plain = model.generate(PROMPTS[:2], generator=seeded(1, 2), **quick)
    assert plain.plans == ()
    planned = model.generate(PROMPTS[:2], generator=seeded(1, 2), plan=True, **quick)
    asked = model.ask(None, [sampling.REWRITE + prompt for prompt in PROMPTS[:2]], max_new_tokens=sampling.PLAN_TOKENS)
    assert planned.plans == tuple(words or prompt for words, prompt in zip(asked, PROMPTS, strict=False))
    again = model.generate(list(planned.plans), generator=seeded(1, 2), **quick)
    assert torch.equal(planned.images, again.images) and not torch.equal(planned.images, plain.images)
    own = model.config.replace(sampling=dataclasses.replace(model.config.sampling, plan="Place: "))
    model.config = own
    (written,) = model.generate("a cat", generator=3, plan=True, **quick).plans
    known = ("cat", *sampling.PLACES)  # the last word may be begun
    assert all(any(one.startswith(word) for one in known) for word in sampling.words_of(written))
    plans = ["a red cat in a tree", "a dog at the top", "a dog, a red cat"]
    monkeypatch.setattr(sampling, "write_out", lambda *_: plans)
    auto = model.generate(["A cat.", "a cat and a dog", "a red dog and a cat"], generator=3, **quick)
    assert auto.plans == ("a red cat in a tree", "a cat and a dog", "a red dog and a cat")  # nothing lost or swapped
    assert model.generate("a cat", generator=3, plan=False, **quick).plans == ()
    for wrong in ("yes", None, 1):
        with pytest.raises(UniLIPError, match="plan is"):
            model.generate("a cat", plan=wrong)


def test_prompts_and_sources_change_the_picture(draw, edit, picture):
    assert difference(draw("a cat"), draw("a dog")) > 1e-4
    assert difference(edit(picture(), "a cat"), edit(picture(), "a dog")) > 1e-4
    assert difference(edit(picture()), edit(picture(seed=1))) > 1e-4
    wide = picture(100, 50)
    assert difference(edit(wide, fit="pad"), edit(wide, fit="crop")) > 1e-4
    assert difference(edit(wide, fit="pad"), edit(wide, image_size=56)) > 1e-4


@pytest.mark.parametrize(
    "change", [{"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"flow_shift": 1.0}, {"solver": "euler"}]
)
def test_the_models_own_settings_are_its_defaults(change, fresh_model, draw):
    settings = {"num_inference_steps": 4, "guidance_scale": 4.5, "flow_shift": 3.0, "solver": "dpm++"} | change
    model = fresh_model(sampling=SamplingConfig(**settings))
    own = model.generate("a cat", generator=seeded(0)[0], output_type="latent", progress=False).images
    assert difference(own, draw()) > 1e-4
    if "flow_shift" not in change:
        assert difference(own, draw(**change)) == 0


@pytest.mark.parametrize("size", [28, 56, 112])
def test_sizes(size, draw, edit, picture):
    assert draw(image_size=size).shape == (1, 32, size // 28, size // 28)
    assert draw(image_size=size, output_type="pil")[0].size == (size, size)
    assert edit(picture(100, 50), image_size=size, output_type="pil")[0].size == (size, size)


def test_a_larger_edit_reads_more_of_its_source(tiny_model, edit, picture):
    seen = []
    hook = tiny_model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    edit(picture(200, 200), image_size=112)
    hook.remove()
    assert seen == [112]


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_above_one_doubles_the_rows(draw, rows):
    draw(PROMPTS[:3], guidance_scale=1.01)
    assert rows == [6] * 4


def test_guidance_up_to_one_makes_no_unconditional_pass(draw, rows):
    for guidance in (0.0, 0.5, 1.0):
        assert difference(draw(PROMPTS[:3], guidance_scale=guidance), draw(PROMPTS[:3], guidance_scale=1.0)) == 0
    assert rows == [3] * 24


def test_the_unconditional_prompt_is_read_once_for_a_call_with_the_prompts(tiny_model, draw):
    seen = []
    hook = tiny_model.connector.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    first = draw(PROMPTS[:3], num_images_per_prompt=2)
    again = draw(PROMPTS[:3], num_images_per_prompt=2)
    hook.remove()
    assert seen == [4, 4]  # and nothing is kept from call to call
    assert torch.equal(first, again)


def test_guidance_is_the_unconditional_prompt_plus_g_times_the_difference(tiny_model, draw):
    model, p = tiny_model, tiny_model.processor
    noise = draw_noise(1, (32, 2, 2), seeded(0)[0])
    with torch.no_grad():
        unconditional, conditional = (
            model.dit(noise, torch.tensor([1000]), *model.condition(p.tokenize([text])))
            for text in (p.generate_text(None), p.generate_text("a cat"))
        )
    result = draw(num_inference_steps=1, guidance_scale=3.0, solver="euler")
    assert difference(result, noise - (unconditional + 3 * (conditional - unconditional))) < 1e-5


def test_the_negative_prompt_replaces_the_unconditional_one(draw, edit, picture):
    assert difference(draw(negative_prompt="a cat"), draw(guidance_scale=1.0)) < 1e-4
    same = edit(picture(), "a cat", negative_prompt="a cat")
    assert difference(same, edit(picture(), "a cat", guidance_scale=1.0)) < 1e-4
    for none in ("", "  "):  # what programs send where a person typed nothing
        assert difference(draw(negative_prompt=none), draw()) == 0
        assert difference(edit(picture(), negative_prompt=none), edit(picture())) == 0


# --- callback and bar -------------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step(tiny_model, draw):
    seen = []

    def callback(model, step, timestep, values):
        assert model is tiny_model
        seen.append((step, int(timestep), tuple(values["latents"].shape), values["latents"].dtype))

    plain = draw(PROMPTS[:2])
    assert torch.equal(draw(PROMPTS[:2], callback_on_step_end=callback), plain)
    assert [s[0] for s in seen] == [0, 1, 2, 3]
    assert [s[1] for s in seen] == sorted((s[1] for s in seen), reverse=True)
    assert {s[2:] for s in seen} == {((2, 32, 2, 2), torch.float32)}


def test_the_callback_can_replace_the_latents(draw, edit, picture):
    def callback(model, step, timestep, values):
        return {"latents": torch.full_like(values["latents"], 0.5)} if step == 3 else {}

    assert (draw(callback_on_step_end=callback) == 0.5).all()
    assert (edit(picture(), callback_on_step_end=callback) == 0.5).all()
    early = draw(callback_on_step_end=lambda m, i, t, v: {"latents": v["latents"] + 1} if i == 0 else None)
    assert difference(early, draw()) > 1e-3


def test_the_callback_can_stop(draw, rows):
    class Stop(Exception):
        pass

    def callback(model, step, timestep, values):
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        draw(callback_on_step_end=callback)
    assert len(rows) == 2


def test_the_bar_is_shown_on_a_terminal_only(draw, capsys, monkeypatch):
    draw(progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    draw(progress=True)
    assert "0/4" in capsys.readouterr().err  # what follows is shown no oftener than ten times a second
    draw(progress=False)
    assert capsys.readouterr().err == ""


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ability", ["draw", "edit"])
def test_output_types(ability, request, tiny_model, picture):
    call = request.getfixturevalue(ability)
    first = ["a cat"] if ability == "draw" else [picture()]

    def get(output_type):
        return call(*first, output_type=output_type, num_images_per_prompt=2)

    latent, tensor, array, images = (get(kind) for kind in ("latent", "pt", "np", "pil"))
    assert (latent.shape, latent.dtype) == ((2, 32, 2, 2), torch.float32)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 56, 56), torch.float32)
    assert (array.shape, array.dtype) == ((2, 56, 56, 3), np.float32)
    assert [(image.size, image.mode) for image in images] == [((56, 56), "RGB")] * 2
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert not any(t.requires_grad for t in (latent, tensor))
    with torch.no_grad():
        assert torch.equal(tiny_model.from_latent(latent), tensor)
    assert np.array_equal(array, tensor.movedim(1, -1).numpy())
    for image, values in zip(images, array, strict=True):
        assert np.array_equal(np.asarray(image), (values * 255).round().astype(np.uint8))


def test_nothing_asked_nothing_drawn(tiny_model, picture):
    assert tiny_model.generate([]) == ImageOutput([])
    assert tiny_model.edit([], "blue") == tiny_model.edit(picture(), []) == ImageOutput([])


def test_drawing_leaves_the_global_randomness_alone(draw):
    state = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), state)


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_one_image_and_many_instructions(guidance, tiny_model, edit, picture):
    encoded = []
    hook = tiny_model.encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    together = edit(picture(), PROMPTS[:3], generator=seeded(0, 1, 2), guidance_scale=guidance)
    hook.remove()
    assert encoded == [1]  # the picture is read once
    for i in range(3):
        alone = edit(picture(), PROMPTS[i], generator=seeded(i)[0], guidance_scale=guidance)
        assert difference(together[i : i + 1], alone) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_many_images_and_one_instruction(guidance, edit, picture):
    sources = [picture(seed=i) for i in range(3)]
    together = edit(sources, generator=seeded(0, 1, 2), guidance_scale=guidance)
    for i in range(3):
        alone = edit(sources[i], generator=seeded(i)[0], guidance_scale=guidance)
        assert difference(together[i : i + 1], alone) <= 1e-4


def test_lists_of_one_are_as_good_as_no_list(edit, picture):
    assert difference(edit([picture()], ["blue"]), edit(picture(), "blue")) == 0
    assert difference(edit((picture(),), ("blue",)), edit(picture(), "blue")) == 0


@pytest.mark.parametrize(
    ("fit", "expected"), [("resize", [(56, 28), (28, 56)]), ("pad", [(56, 28), (28, 56)]), ("crop", [(56, 56)] * 2)]
)
def test_the_aspect_ratio_of_the_source(fit, expected, edit, picture):
    sources = [picture(100, 50), picture(50, 100)]
    options = dict(fit=fit, num_images_per_prompt=2, output_type="pil")
    images = edit(sources, keep_aspect=True, **options)
    assert [image.size for image in images] == [size for size in expected for _ in range(2)]
    square = {image.size for image in edit(sources, **options, image_size=56)}
    assert square == {(56, 56)} and (fit == "resize") == ({i.size for i in edit(sources, **options)} != square)


def test_sources_of_every_kind(edit, picture, tmp_path):
    image = picture(60, 40)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    expected = edit(image)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), array, torch.from_numpy(array).movedim(-1, 0)):
        assert difference(edit(source), expected) == 0


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_inference_steps": 0}, UniLIPError, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, UniLIPError, "between 1 and 1000"),
        ({"num_inference_steps": 2.5}, UniLIPError, "whole number"),
        ({"guidance_scale": -1}, UniLIPError, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, UniLIPError, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, UniLIPError, "guidance_scale is inf"),
        ({"solver": "heun"}, UniLIPError, r"heun.*dpm\+\+, euler, unipc"),
        ({"num_images_per_prompt": 0}, UniLIPError, "num_images_per_prompt is 0"),
        ({"output_type": "jpg"}, UniLIPError, "jpg.*pil, np, pt, latent"),
        ({"image_size": 57}, ConfigError, "image_size is 57.*28"),
        ({"image_size": 0}, ConfigError, "image_size is 0"),
        ({"negative_prompt": "<IMG_CONTEXT>"}, PromptError, "reserves"),
        ({"generator": []}, UniLIPError, "0 generators were given for 1 pictures"),
    ],
    ids=str,
)
def test_impossible_options(options, error, words, draw, edit, picture):
    for call in (lambda: draw(**options), lambda: edit(picture(), **options)):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize(
    "prompt", ["", "  ", None, [3], "<|im_end|>", ["a cat", ""], "0" * 600, "x" * 9000], ids=lambda p: str(p)[:20]
)
def test_impossible_prompts(prompt, draw, edit, picture):
    for call in (lambda: draw(prompt), lambda: edit(picture(), prompt)):
        with pytest.raises(PromptError):
            call()


def test_impossible_edits(edit, picture, tmp_path):
    for source in (tmp_path / "missing.png", None, [picture(), None], np.full((2, 2, 3), np.nan)):
        with pytest.raises(ImageError):
            edit(source)
    with pytest.raises(UniLIPError, match="2 images and 3 instructions"):
        edit([picture(), picture()], PROMPTS[:3])
    with pytest.raises(UniLIPError, match="keep_aspect needs"):
        edit(picture(), keep_aspect=True, output_type="pt")
    with pytest.raises(ImageError, match="squeeze"):
        edit(picture(), fit="squeeze")
    with pytest.raises(UniLIPError, match="3 generators were given for 2 pictures"):
        edit(picture(), PROMPTS[:2], generator=seeded(0, 1, 2))
