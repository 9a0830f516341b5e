"""The pipeline object: what programs written for diffusers do with it, against the model called directly."""

import inspect
import io

import numpy as np
import pytest
import torch
from PIL import Image

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

    def in_place(given, step, timestep, tensors):
        tensors["latents"] *= 0.5
        return tensors

    def anew(given, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5}

    made = [
        pipe("stars", num_inference_steps=3, output_type="latent", generator=0, callback_on_step_end=callback).images
        for callback in (in_place, anew)
    ]
    torch.testing.assert_close(*made, atol=1e-4, rtol=0)


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
        assert pipe.num_timesteps == 5

    pipe("stars", num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipe.interrupt
    pipe("stars", num_inference_steps=1)
    assert not pipe.interrupt


def test_an_interrupt_stops_pictures_of_every_shape_and_what_it_returns_is_checked(pipe, picture):
    def stopping(result):
        def callback(pipe, step, timestep, tensors):
            pipe._interrupt = True
            return result

        return {"num_inference_steps": 3, "generator": 0, "callback_on_step_end": callback}

    sources = [picture(112, 28), picture(), picture(112, 28)]
    assert [image.size for image in pipe("blue", image=sources, **stopping(None))] == [one.size for one in sources]
    assert same(pipe("stars", **stopping({"latents": None})).images, pipe("stars", **stopping({})).images)
    for wrong in ([1], torch.zeros(1), {"latents": torch.zeros(1, 32, 1, 2)}):
        with pytest.raises(UniLIPError, match="callback_on_step_end returned"):
            pipe("stars", **stopping(wrong))


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
    for name in ("enable_cpu_offload", "enable_tiling", "load_adapter", "unload_adapters"):
        monkeypatch.setattr(type(tiny_model), name, lambda self, *given, name=name: called.append((name, *given)))
    pipe = UniLIPPipeline(tiny_model)
    pipe.enable_model_cpu_offload()
    pipe.enable_model_cpu_offload(gpu_id=1)
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    pipe.disable_vae_tiling()
    pipe.load_lora_weights("mine", adapter_name="red")
    pipe.unload_lora_weights()
    assert called == [
        ("enable_cpu_offload", "cuda"), ("enable_cpu_offload", "cuda:1"), ("enable_cpu_offload", "cpu"),
        ("enable_tiling",), ("enable_tiling",), ("enable_tiling", 1),
        ("load_adapter", "mine", "red"), ("unload_adapters",),
    ]  # fmt: skip
    assert repr(pipe).startswith("UniLIPPipeline(tiny: encoder, ")


def test_pictures_of_any_shape(pipe):
    settings = dict(num_inference_steps=1, generator=3, output_type="np")
    made = pipe("stars", width=84, height=56, **settings).images
    assert made.shape == (1, 56, 84, 3)
    assert (made == pipe.model.generate("stars", width=84, height=56, **settings).images).all()
    wide = Image.new("RGB", (120, 60), "red")
    assert pipe("stars", wide, **settings).images.shape == (1, 28, 56, 3)
    assert pipe("stars", wide, width=56, height=56, **settings).images.shape == (1, 56, 56, 3)


def test_loras_by_the_names_of_diffusers(tiny_folder, tmp_path):
    from unilip.adapters import library

    peft, plain = library(), {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt", "generator": 0}
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(
            UniLIPPipeline.from_pretrained(tiny_folder).model,
            peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False),
        )
        wrapped.save_pretrained(tmp_path / name)
    pipe = UniLIPPipeline.from_pretrained(tiny_folder)

    def draw():
        return pipe("stars", **plain).images

    bare = draw()
    pipe.load_lora_weights(tmp_path / "red", adapter_name="red")
    pipe.load_lora_weights(tmp_path / "blue", adapter_name="blue")
    both = draw()
    assert pipe.get_list_adapters() == {"model": ["blue", "red"]} and pipe.get_active_adapters() == ["blue", "red"]
    pipe.set_adapters("red", 0.5)
    assert pipe.get_active_adapters() == ["red"]
    red = draw()
    pipe.disable_lora()
    pipe.disable_lora()
    assert torch.equal(draw(), bare) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    assert torch.equal(draw(), red)
    pipe.disable_lora()
    pipe.load_lora_weights(tmp_path / "blue", adapter_name="third")
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["red", "third"]
    with pytest.raises(UniLIPError, match="There is no adapter r; loaded: blue, red, third"):
        pipe.model.unload_adapters(["r"])
    pipe.model.unload_adapters("third")
    assert torch.equal(draw(), red) and pipe.get_list_adapters() == {"model": ["blue", "red"]}
    pipe.set_adapters(["red", "blue"])
    assert torch.equal(draw(), both)
    with pytest.raises(UniLIPError, match="1 weights were given for 2 adapters"):
        pipe.set_adapters(["red", "blue"], [0.5])
    with pytest.raises(UniLIPError, match="load the model anew"):
        pipe.unfuse_lora()
    pipe.set_adapters("red")
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.get_list_adapters() == {}
    torch.testing.assert_close(draw(), red, atol=1e-4, rtol=0)
    assert not torch.equal(red, bare) and not torch.equal(red, both)


def test_the_progress_bar_takes_the_arguments_of_tqdm(pipe):
    shown = []
    for options in ({}, {"disable": True}, {"disable": False, "desc": "stars"}, {"disable": False, "leave": True}):
        file = io.StringIO()
        pipe.set_progress_bar_config(**options, file=file)
        pipe("stars", num_inference_steps=2)
        shown.append((file.getvalue() != "", "stars: " in file.getvalue(), file.getvalue().endswith("step/s]\n")))
    assert shown == [(False,) * 3, (False,) * 3, (True, True, False), (True, False, True)]
    with pytest.raises(UniLIPError, match="no argument of a progress bar 'discription'; allowed: iterable, desc"):
        pipe.set_progress_bar_config(discription="stars")
    pipe.set_progress_bar_config(disable=True)


def test_latents_are_the_noise_and_negative_prompts_go_one_by_one(pipe, tiny_model):
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    z, grid = tiny_model.config.dit.latent_channels, tiny_model.config.image_size // 28
    noise = torch.randn(2, z, grid, grid, generator=seeded(5))
    given = pipe("stars", num_images_per_prompt=2, latents=noise, **settings).images
    assert torch.equal(given, pipe("stars", num_images_per_prompt=2, generator=seeded(5), **settings).images)
    picture = torch.rand(2, 3, 56, 56)
    for image in (None, picture):
        several = pipe(["stars", "a cat"], image, negative_prompt=["a dog", ""], latents=noise, **settings).images
        for row, (prompt, negative) in enumerate((("stars", "a dog"), ("a cat", None))):
            own = None if image is None else image[row]
            alone = pipe(prompt, own, negative_prompt=negative, latents=noise[row : row + 1], **settings).images[0]
            assert (several[row] - alone).abs().max() < 1e-3, (row, image is None)
        others = pipe(["stars", "a cat"], image, negative_prompt=["", "a dog"], latents=noise, **settings).images
        assert (several - others).abs().amax((1, 2, 3)).min() > 1e-3
    for wrong, message in (
        ({"latents": noise}, r"latents are \[2, .*noise for these pictures is \[1"),
        ({"latents": noise[:1] * float("nan")}, "none infinite or NaN"),
        ({"latents": "noise"}, "latents is str"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts were given for 1 prompts"),
        ({"negative_prompt": [3]}, "negative prompt must be a string"),
    ):
        with pytest.raises(UniLIPError, match=message):
            pipe("stars", **settings, **wrong)


def test_what_it_gives_it_takes(pipe):
    settings = {"num_inference_steps": 1, "generator": 3, "num_images_per_prompt": 2}
    for kind in ("pil", "np", "pt"):
        made = pipe("stars", output_type=kind, **settings)
        for given in (made, made.images, [made[0], made[1]]):
            again = pipe("make it red", given, num_inference_steps=1, num_images_per_prompt=None)
            assert len(again) == len(again.images) == 2 and again[0].size == (56, 56), kind
        assert len(pipe("make it red", made[0], num_inference_steps=1)) == 1


def test_loading_takes_the_words_of_diffusers(tiny_folder, caplog):
    for options, dtype in (
        ({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16", "device_map": {"": "cpu"}}, torch.bfloat16),
        ({"device_map": "cpu", "token": None, "revision": None, "variant": None, "cache_dir": "x"}, torch.float32),
        ({"device_map": "balanced", "local_files_only": True}, torch.float32),
    ):  # fmt: skip
        assert UniLIPPipeline.from_pretrained(tiny_folder, **options).dtype == dtype
    assert caplog.text == ""
    UniLIPPipeline.from_pretrained(tiny_folder, low_cpu_mem_usage=True, use_safetensors=True, revision="main")
    assert "change nothing here: low_cpu_mem_usage, use_safetensors" in caplog.text
    assert "revision main is ignored" in caplog.text
    for options, message in (
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "give one of the two"),
        ({"device": "cpu", "device_map": "cpu"}, "give one of the two"),
        ({"device_map": {"dit": "cpu", "mllm": "cuda:1"}}, "stays together"),
        ({"device_map": "sequential"}, "no device 'sequential'"),
        ({"custom_pipeline": "x"}, "no option for loading 'custom_pipeline'; allowed: revision"),
        ({"variant": "fp16"}, r"expected one of model\.fp16\.safetensors"),
    ):
        with pytest.raises(UniLIPError, match=message):
            UniLIPPipeline.from_pretrained(tiny_folder, **options)


@pytest.mark.hosts
def test_what_it_saves_and_uploads_diffusers_loads(pipe, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    uploaded = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **o: uploaded.append(sorted(p.name for p in o["folder_path"].iterdir())) or "address",
    )
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    theirs = pipe
    for round in range(2):  # the second time from what diffusers loaded
        theirs.save_pretrained(tmp_path / str(round))
        theirs = DiffusionPipeline.from_pretrained(tmp_path / str(round), trust_remote_code=True)
        made = theirs("stars", generator=seeded(2), **settings).images
        assert torch.equal(made, pipe("stars", generator=seeded(2), **settings).images)
        assert theirs.push_to_hub("me/mine", private=True) == "address"
    assert uploaded == [["README.md", "model", "model_index.json", "pipeline.py", "tokenizer"]] * 2
    assert "trust_remote_code" in (tmp_path / "1" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "  "}, "is empty"),
        ({"prompt": "stars", "height": 56, "width": 0}, "width is 0; it must be between 28"),
        ({"prompt": "stars", "height": 57.5}, "height is 57.5"),
        ({"prompt": "stars", "output_type": "jpg"}, "allowed: pil, np, pt, latent"),
        ({"prompt": "stars", "image": "nowhere.png"}, "no image file nowhere.png"),
        ({"prompt": "stars", "joint": True}, "needs its pictures"),
    ],
    ids=str,
)
def test_bad_input_is_explained(pipe, settings, message):
    with pytest.raises(UniLIPError, match=message):
        pipe(**settings)


def test_the_arguments_are_those_of_diffusers():
    from diffusers import SanaPipeline

    ours = set(inspect.signature(UniLIPPipeline.__call__).parameters)
    assert ours - set(inspect.signature(SanaPipeline.__call__).parameters) == {"image", "fit", "joint", "preset"}
