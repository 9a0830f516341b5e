"""The pipeline object: what programs written for diffusers do with it, against the model called directly."""

import inspect

import numpy as np
import pytest
import torch

from unilip.errors import UniLIPError
from unilip.model import ImageOutput
from unilip.pipeline import UniLIPPipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return UniLIPPipeline(tiny_model)


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_a_prompt_draws_what_the_model_draws(pipe, tiny_model):
    made = pipe("stars", num_inference_steps=3, guidance_scale=2.0, generator=seeded(), num_images_per_prompt=2)
    alone = tiny_model.generate(
        "stars", num_inference_steps=3, guidance_scale=2.0, generator=seeded(), num_images_per_prompt=2
    )
    assert isinstance(made, ImageOutput)
    assert same(made.images, alone.images)


def test_an_image_is_edited(pipe, tiny_model, picture):
    made = pipe("make it red", picture(80, 40), num_inference_steps=2, generator=seeded(1), fit="pad").images
    alone = tiny_model.edit(picture(80, 40), "make it red", num_inference_steps=2, generator=seeded(1), fit="pad")
    stretched = pipe("make it red", picture(80, 40), num_inference_steps=2, generator=seeded(1)).images
    assert same(made, alone.images)
    assert not same(made, stretched)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 3},
        {"guidance_scale": 6.0},
        {"generator": 1},
        {"negative_prompt": "a dog"},
        {"height": 84},
        {"width": 84},
    ],
    ids=str,
)
def test_every_setting_changes_the_picture(pipe, change):
    plain = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": 0}

    def draw(settings):
        return pipe("stars", **(settings | {"generator": seeded(settings["generator"])})).images

    assert same(draw(plain), draw(plain))
    assert not same(draw(plain), draw(plain | change))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(pipe, tiny_model, kind, stop):
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = stop and step == 1

    made = pipe("stars", num_inference_steps=3, output_type=kind, generator=seeded(), callback_on_step_end=callback)
    alone = tiny_model.generate("stars", num_inference_steps=3, output_type=kind, generator=seeded()).images
    assert type(made.images) is type(alone)
    if kind == "pil":
        assert [image.size for image in made.images] == [image.size for image in alone]
    else:
        assert made.images.shape == alone.shape
        assert made.images.dtype == alone.dtype
    assert same(made.images, alone) is not stop


def test_return_dict_false_gives_a_tuple(pipe):
    made = pipe("stars", num_inference_steps=1, generator=seeded(), return_dict=False)
    assert isinstance(made, tuple)
    assert same(made[0], pipe("stars", num_inference_steps=1, generator=seeded()).images)


def test_the_callback_gets_the_pipeline_and_may_replace_latents(pipe):
    seen = []

    def callback(given, step, timestep, tensors):
        seen.append((given is pipe, step, float(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = pipe("stars", num_inference_steps=3, output_type="latent", callback_on_step_end=callback).images
    assert [entry[1] for entry in seen] == [0, 1, 2]
    assert all(entry[0] and entry[3] == ["latents"] for entry in seen)
    assert seen[0][2] > seen[-1][2]
    assert made.abs().max() == 0


def test_the_callback_gets_only_the_tensors_it_names(pipe):
    seen = []
    pipe(
        "stars", num_inference_steps=1, callback_on_step_end_tensor_inputs=(),
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors),
    )  # fmt: skip
    assert seen == [{}]
    with pytest.raises(UniLIPError, match=r"prompt_embeds; allowed: latents"):
        pipe("stars", callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_an_interrupt_leaves_out_the_rest_and_lasts_for_one_call(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1

    pipe("stars", num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipe.interrupt
    pipe("stars", num_inference_steps=1)
    assert not pipe.interrupt


def test_from_pretrained_to_and_save(tiny_folder, tmp_path):
    pipe = UniLIPPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    before = pipe.to(torch.float32)
    assert before is pipe and pipe.dtype == torch.float32 and pipe.device.type == "cpu"
    pipe.save_pretrained(tmp_path / "again")
    again = UniLIPPipeline.from_pretrained(tmp_path / "again")
    assert again.config == pipe.config
    assert set(again.components) == {"encoder", "latent_head", "pixel_decoder", "mllm", "connector", "dit"}
    assert again.components["dit"] is again.model.dit
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(
        pipe("stars", generator=seeded(), **settings).images, again("stars", generator=seeded(), **settings).images
    )


def test_the_names_of_diffusers_reach_the_model(monkeypatch, tiny_model):
    called = []
    for name in ("enable_cpu_offload", "load_adapter", "unload_adapters"):
        monkeypatch.setattr(type(tiny_model), name, lambda self, *given, name=name: called.append((name, *given)))
    pipe = UniLIPPipeline(tiny_model)
    pipe.enable_model_cpu_offload()
    pipe.load_lora_weights("mine", adapter_name="red")
    pipe.unload_lora_weights()
    assert called == [("enable_cpu_offload", "cuda"), ("load_adapter", "mine", "red"), ("unload_adapters",)]


def test_the_progress_bar_can_be_switched_off(pipe, monkeypatch):
    shown = []
    generate = type(pipe.model).generate
    monkeypatch.setattr(
        type(pipe.model), "generate", lambda self, *a, **k: (shown.append(k["progress"]), generate(self, *a, **k))[1]
    )
    pipe("stars", num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    pipe("stars", num_inference_steps=1)
    pipe.set_progress_bar_config(disable=False)
    assert shown == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "  "}, "is empty"),
        ({"prompt": "stars", "height": 56, "width": 84}, "84x56 px; this model draws squares"),
        ({"prompt": "stars", "height": 57}, "28"),
        ({"prompt": "stars", "output_type": "jpg"}, "allowed: pil, np, pt, latent"),
        ({"prompt": "stars", "image": "nowhere.png"}, "no image file nowhere.png"),
    ],
    ids=str,
)
def test_bad_input_is_explained(pipe, settings, message):
    with pytest.raises(UniLIPError, match=message):
        pipe(**settings)


def test_the_arguments_are_those_of_diffusers():
    from diffusers import SanaPipeline

    ours = set(inspect.signature(UniLIPPipeline.__call__).parameters)
    assert ours - set(inspect.signature(SanaPipeline.__call__).parameters) == {"image", "fit"}
