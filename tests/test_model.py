"""The parts and how they are joined: encoder, conditions, diffusion transformer, tokenizer; making a model."""

import random
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from unilip.errors import ConfigError, ImageError, UniLIPError
from unilip.method.connector import copy_from_llm
from unilip.method.encoder import merge_patches
from unilip.method.mllm import fill_slots
from unilip.method.qwen2 import positions, visible
from unilip.method.text import Processor
from unilip.model import PARTS, UniLIP
from unilip.pictures import to_pixels
from unilip.sizes import preset

TOKENIZER_PARTS = ("encoder", "latent_head", "pixel_decoder")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


# --- encoder ----------------------------------------------------------------------------------------------------------


def test_a_token_is_two_by_two_patches_in_reading_order():
    height, width = 4, 6
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    patches = torch.stack([rows, columns], -1).reshape(1, height * width, 2)
    tokens = merge_patches(patches, height, width)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 0].tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert tokens[0, 1].tolist() == [0, 2, 0, 3, 1, 2, 1, 3]
    assert tokens[0, 3].tolist() == [2, 0, 2, 1, 3, 0, 3, 1]


def test_the_encoder_takes_any_multiple_of_28_and_no_other_size(tiny_model):
    for height, width in ((56, 56), (112, 112), (28, 84)):
        features = tiny_model.encoder(torch.randn(2, 3, height, width))
        assert features.shape == (2, height * width // 784, 64)
        assert features.isfinite().all()
    for height, width in ((57, 56), (56, 42), (14, 14)):
        with pytest.raises(ImageError, match=f"{width}x{height}.*28"):
            tiny_model.encoder(torch.zeros(1, 3, height, width))


def test_a_picture_is_encoded_alike_alone_and_in_a_batch(tiny_model):
    pixels = torch.randn(5, 3, 56, 56)
    assert difference(tiny_model.encoder(pixels)[3:4], tiny_model.encoder(pixels[3:4])) < 1e-5


# --- language model ---------------------------------------------------------------------------------------------------


def test_positions_count_valid_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    assert (positions(mask) * mask).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 2]]
    assert positions(mask).min() >= 0


def test_slots_are_filled_in_order():
    slots = torch.tensor([[False, True, True], [True, False, True]])
    features = torch.arange(1.0, 9.0).view(2, 2, 2)  # two pictures of two tokens
    filled = fill_slots(torch.zeros(2, 3, 2), slots, features)
    assert filled.tolist() == [[[0, 0], [1, 2], [3, 4]], [[5, 6], [0, 0], [7, 8]]]


def test_the_language_model_is_causal(tiny_model):
    embeddings, mask = torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.long)
    changed = embeddings.clone()
    changed[:, 5] += 1
    before, after = tiny_model.mllm(embeddings, mask), tiny_model.mllm(changed, mask)
    assert difference(before[:, :5], after[:, :5]) < 1e-6
    assert difference(before[:, 5:], after[:, 5:]) > 1e-2


# --- conditions -------------------------------------------------------------------------------------------------------


def valid(model: UniLIP, texts: list[str], features: Tensor | None = None, side: str = "left") -> list[Tensor]:
    """The condition of each prompt, valid positions only."""
    tokens = model.processor.tokenize(texts, side)
    condition, mask = model.condition(tokens, features)
    assert condition.shape == (len(texts), tokens.input_ids.shape[1] + 8, 48)
    return [row[m.bool()] for row, m in zip(condition, mask, strict=True)]


@pytest.fixture
def mixed(tiny_model):
    """Prompts with and without a picture, of many lengths, and the features of the pictures."""
    p = tiny_model.processor
    texts = [
        p.generate_text("a cat"),
        p.edit_text("blue"),
        p.generate_text(None),
        p.edit_text("turn the sky into a very long description of a sunset over the sea"),
        p.generate_text("three yellow stars above a blue house, with two dogs and one cat in front of it"),
    ]
    return texts, torch.randn(2, 4, 64)


def test_a_batch_of_prompts_is_its_prompts_one_by_one_padded_on_either_side(tiny_model, mixed):
    texts, features = mixed
    pictures = [None, features[:1], None, features[1:], None]
    alone = [valid(tiny_model, [text], picture)[0] for text, picture in zip(texts, pictures, strict=True)]
    for side in ("left", "right"):
        for condition, own in zip(valid(tiny_model, texts, features, side), alone, strict=True):
            assert difference(condition, own) < 1e-5


def test_prompts_and_pictures_matter(tiny_model, mixed):
    texts, features = mixed
    edit, other = (valid(tiny_model, texts[1:2], f[:1])[0] for f in (features, features + 1))
    assert difference(edit, other) > 1e-2
    a, b = valid(tiny_model, [tiny_model.processor.generate_text(t) for t in ("a cat", "a dog")])
    assert difference(a[-8:], b[-8:]) > 1e-3


def test_the_connector_looks_back_from_the_last_query_and_the_language_model_does_not(fresh_model):
    model = fresh_model()
    tokens = model.processor.tokenize([model.processor.generate_text("a cat")])
    hidden = []
    hook = model.connector.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    before, _ = model.condition(tokens)
    model.mllm.queries[0, -1] += 1
    after, _ = model.condition(tokens)
    hook.remove()
    assert difference(hidden[0][:, :-1], hidden[1][:, :-1]) < 1e-6
    assert difference(hidden[0][:, -1], hidden[1][:, -1]) > 1e-2
    assert difference(before[:, 0], after[:, 0]) > 1e-5


def test_padding_is_hidden_from_the_connector(tiny_model):
    hidden, mask = torch.randn(1, 6, 64), torch.tensor([[0, 1, 1, 0, 1, 1]])
    changed = hidden.clone()
    changed[:, [0, 3]] += 1
    valid_rows = mask[0].bool()
    before, after = tiny_model.connector(hidden, mask), tiny_model.connector(changed, mask)
    assert difference(before[:, valid_rows], after[:, valid_rows]) < 1e-6
    seen = visible(mask, False)[0, 0]
    assert torch.equal(seen, mask.bool() | torch.eye(6, dtype=torch.bool))  # padding sees itself: no row is empty


def test_hidden_states_at_the_picture_become_its_features(tiny_model):
    hidden, features = torch.randn(2, 7, 64), torch.randn(1, 2, 64)
    slots = torch.zeros(2, 4, dtype=torch.bool)  # shorter than hidden: the queries have no slots
    slots[1, 1:3] = True
    replaced = fill_slots(hidden, slots, features)
    assert torch.equal(replaced[1, 1:3], features[0])
    replaced[1, 1:3] = hidden[1, 1:3]
    assert torch.equal(replaced, hidden)


def test_an_edit_sees_the_features_at_both_ends_of_the_language_model(tiny_model):
    processor, features = tiny_model.processor, torch.randn(1, 4, 64)
    tokens = processor.tokenize([processor.edit_text("blue")])
    states = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        for module in (tiny_model.mllm.language_model.model, tiny_model.connector)
    ]
    tiny_model.condition(tokens, features)
    for hook in hooks:
        hook.remove()
    length = tokens.input_ids.shape[1]
    for state in states:
        assert torch.equal(state[:, :length][tokens.image_slots], features[0])
    assert torch.equal(states[0][:, length:], tiny_model.mllm.queries)


# --- diffusion transformer --------------------------------------------------------------------------------------------


def test_positions_and_the_padding_mask_matter_to_the_dit(tiny_model):
    latent, condition, timestep = torch.randn(1, 32, 2, 2), torch.randn(1, 9, 48), torch.tensor([500])
    mask = torch.ones(1, 9, dtype=torch.long)
    full = tiny_model.dit(latent, timestep, condition, mask)
    mask[:, :4] = 0
    part = tiny_model.dit(latent, timestep, condition, mask)
    assert difference(full, part) > 1e-3
    assert difference(part, tiny_model.dit(latent, timestep, condition[:, 4:], mask[:, 4:])) < 1e-5
    turned = tiny_model.dit(latent.flip(-1), timestep, condition, mask).flip(-1)
    assert difference(part, turned) > 1e-3


def test_recomputing_in_the_backward_pass_changes_no_gradient(fresh_model):
    from unilip.train.build import enable_checkpointing

    model, latent, mask = fresh_model(), torch.randn(2, 32, 2, 2), torch.ones(2, 9, dtype=torch.long)
    ways = {
        "dit": lambda: model.dit(latent, torch.tensor([10, 700]), torch.ones(2, 9, 48), mask),
        "connector": lambda: model.connector(torch.ones(2, 9, 64), mask),
        "mllm": lambda: model.mllm(torch.ones(2, 9, 64), mask),
        "encoder": lambda: model.encoder(torch.ones(2, 3, 56, 56)),
        "pixel_decoder": lambda: model.pixel_decoder(latent),
    }
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            enable_checkpointing(model)
        for name, run in ways.items():
            model.zero_grad()
            with torch.enable_grad():
                run().square().mean().backward()
            own = [p.grad.flatten() for p in getattr(model, name).parameters() if p.grad is not None]
            gradients.append(torch.cat(own))
    for name, kept, recomputed in zip(ways, gradients[: len(ways)], gradients[len(ways) :], strict=True):
        assert kept.abs().max() > 0, name
        assert difference(kept, recomputed) < 1e-6, name


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_latents_and_pixels_have_their_sizes(tiny_model):
    features = tiny_model.encoder(torch.randn(2, 3, 56, 112))
    latent = tiny_model.to_latent(features, height=2)
    assert latent.shape == (2, 32, 2, 4)
    assert tiny_model.pixel_decoder.decode(latent).shape == (2, 3, 64, 128)
    assert tiny_model.pixel_decoder(latent).shape == (2, 3, 56, 112)
    pixels = tiny_model.from_latent(latent)
    assert pixels.shape == (2, 3, 56, 112)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(tiny_model.to_latent(features[:, :4]), tiny_model.to_latent(features[:, :4], height=2))


def test_latents_keep_the_order_of_the_tokens(tiny_model):
    features = torch.randn(1, 6, 64)
    latent = tiny_model.to_latent(features, height=2)  # 2x3
    changed = features.clone()
    changed[0, 4] += torch.randn(64)
    moved = (tiny_model.to_latent(changed, height=2) - latent).abs().amax(1)[0] > 1e-5
    assert moved.tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_statistics_of_the_latents(per_channel, fresh_model):
    mean = tuple(i / 10 for i in range(32)) if per_channel else 0.25
    factor = tuple(1 + i / 4 for i in range(32)) if per_channel else 3.0
    plain, scaled = fresh_model(latent_mean=0.0, latent_factor=1.0), fresh_model(latent_mean=mean, latent_factor=factor)
    features = plain.encoder(torch.randn(2, 3, 56, 56))
    shape = (-1, 1, 1)
    raw = plain.to_latent(features)
    expected = (raw - torch.tensor(mean).view(shape)) * torch.tensor(factor).view(shape)
    assert torch.equal(raw, plain.latent_head(features))
    assert difference(scaled.to_latent(features), expected) < 1e-5
    assert difference(scaled.from_latent(scaled.to_latent(features)), plain.from_latent(raw)) < 1e-4


# --- making a model ---------------------------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = UniLIP.from_config(preset("tiny"), seed=3).state_dict()
    torch.manual_seed(2)
    again, other = (UniLIP.from_config(preset("tiny"), seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sum(not torch.equal(first[name], other[name]) for name in first) > len(first) / 3


def test_making_a_model_leaves_the_global_randomness_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    UniLIP.from_config(preset("tiny"), seed=3)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.gpu
def test_making_a_model_leaves_the_randomness_of_the_gpu_alone():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    UniLIP.from_config(preset("tiny"), seed=3)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_fresh_model_is_ready(tiny_model):
    assert not tiny_model.training
    assert all(p.isfinite().all() for p in tiny_model.parameters())
    assert tiny_model.mllm.queries.std().item() == pytest.approx(0.02, rel=0.2)
    assert tiny_model.encoder.vision_tower.embeddings.cls_token.abs().max() > 0
    assert (tiny_model.device.type, tiny_model.dtype) == ("cpu", torch.float32)


def test_the_connector_starts_as_the_end_of_the_language_model(fresh_model):
    model = fresh_model()
    theirs = model.mllm.language_model.model
    for ours, source in zip(model.connector.layers, theirs.layers[-2:], strict=True):
        for name, value in source.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
            value += 1  # a copy, not the same weights
    theirs.norm.weight += 1
    assert not torch.equal(model.connector.norm.weight, theirs.norm.weight)
    copy_from_llm(model.connector, model.mllm)
    assert torch.equal(model.connector.norm.weight, theirs.norm.weight)
    assert torch.equal(model.connector.layers[1].mlp.up_proj.weight, theirs.layers[3].mlp.up_proj.weight)


def test_a_tiny_model_is_made_in_no_time():
    UniLIP.from_config(preset("tiny"))
    start = time.process_time()
    UniLIP.from_config(preset("tiny"))
    assert time.process_time() - start < 1


def test_training_mode_changes_no_result(fresh_model, picture):
    model = fresh_model()
    text, features = model.processor.edit_text("blue"), model.encoder(to_pixels([picture()]))
    before = valid(model, [text], features)[0], model.to_latent(features)
    model.train()
    assert torch.equal(model.encoder(to_pixels([picture()])), features)
    assert torch.equal(valid(model, [text], features)[0], before[0])
    assert torch.equal(model.to_latent(features), before[1])


# --- some parts only --------------------------------------------------------------------------------------------------


def test_a_tokenizer_reconstructs_and_says_what_the_rest_needs(fresh_model, tiny_model, picture):
    model = fresh_model(parts=TOKENIZER_PARTS)
    assert model.parts == TOKENIZER_PARTS
    assert not hasattr(model, "mllm")
    image = model.reconstruct(picture()).images[0]
    assert image.size == (56, 56)
    for call in (
        lambda: model.generate("a cat"),
        lambda: model.generate([]),
        lambda: model.edit(picture(), "blue"),
        lambda: model.ask(picture(), "What?"),
        lambda: model.condition(tiny_model.processor.tokenize(["a"])),
    ):
        with pytest.raises(UniLIPError, match=r"needs .*mllm.*encoder, latent_head, pixel_decoder only"):
            call()


def test_an_encoder_and_a_language_model_answer(fresh_model, picture):
    model = fresh_model(parts=("mllm", "encoder"))
    assert model.parts == ("encoder", "mllm")  # in the order of the road
    assert isinstance(model.ask(picture(), "What?", max_new_tokens=3), str)
    with pytest.raises(UniLIPError, match="needs latent_head, pixel_decoder"):
        model.reconstruct(picture())


def test_latents_need_no_pixel_decoder(fresh_model, picture):
    model = fresh_model(parts=tuple(p for p in PARTS if p not in ("pixel_decoder", "latent_head")))
    options = dict(num_inference_steps=1, progress=False)
    assert model.generate("a cat", output_type="latent", **options).images.shape == (1, 32, 2, 2)
    assert model.edit(picture(), "blue", output_type="latent", **options).images.shape == (1, 32, 2, 2)
    for call in (lambda: model.generate("a cat", **options), lambda: model.edit(picture(), "blue", **options)):
        with pytest.raises(UniLIPError, match="needs pixel_decoder"):
            call()
    with pytest.raises(UniLIPError, match="needs latent_head"):
        model.reconstruct(picture(), output_type="latent")


def test_unknown_parts_are_refused():
    with pytest.raises(UniLIPError, match=r"vae.*encoder, latent_head"):
        UniLIP.from_config(preset("tiny"), parts=("encoder", "vae"))


def test_a_model_without_a_tokenizer_says_so(picture):
    model = UniLIP.from_config(preset("tiny"))
    assert model.reconstruct(picture()).images[0].size == (56, 56)
    for call in (lambda: model.generate("a"), lambda: model.edit(picture(), "a"), lambda: model.ask(None, "a")):
        with pytest.raises(UniLIPError, match="no tokenizer"):
            call()


# --- reconstruct ------------------------------------------------------------------------------------------------------


def test_reconstruct_at_any_multiple_of_28(tiny_model, picture):
    for size in (None, 28, 56, 112):
        images = tiny_model.reconstruct([picture(40, 30), picture(30, 40, 1)], image_size=size).images
        assert [image.size for image in images] == [(size or 56,) * 2] * 2
        assert not np.array_equal(*map(np.asarray, images))
    for size in (0, -28, 50, 57):
        with pytest.raises(ConfigError, match="image_size"):
            tiny_model.reconstruct(picture(), image_size=size)


def test_reconstruct_is_encode_then_decode(tiny_model, picture):
    pixels = to_pixels([picture()])
    latent = tiny_model.to_latent(tiny_model.features(pixels))
    assert torch.equal(tiny_model.reconstruct(picture(), output_type="latent").images, latent)
    assert torch.equal(tiny_model.reconstruct(picture(), output_type="pt").images, tiny_model.from_latent(latent))
    array = tiny_model.reconstruct(picture(), output_type="np").images
    assert array.shape == (1, 56, 56, 3)
    assert array.dtype == np.float32
    image = np.asarray(tiny_model.reconstruct(picture()).images[0])
    assert np.array_equal(image, (array[0] * 255).round().astype(np.uint8))


@pytest.mark.parametrize(("fit", "expected"), [("resize", (56, 28)), ("pad", (56, 28)), ("crop", (56, 56))])
def test_reconstruct_at_the_aspect_ratio_of_the_source(fit, expected, tiny_model, picture):
    assert tiny_model.reconstruct(picture(100, 50), fit=fit, keep_aspect=True).images[0].size == expected
    assert tiny_model.reconstruct(picture(100, 50), fit=fit, image_size=56).images[0].size == (56, 56)


def test_the_fit_matters_to_a_reconstruction(tiny_model, picture):
    images = [
        tiny_model.reconstruct(picture(100, 50), fit=fit, output_type="pt", image_size=56).images
        for fit in ("resize", "pad", "crop")
    ]
    assert min(difference(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_reconstruct_errors(tiny_model, picture):
    assert tiny_model.reconstruct([]).images == []
    for options, words in (
        ({"output_type": "jpg"}, "jpg.*pil, np, pt, latent"),
        ({"fit": "squeeze"}, "squeeze"),
        ({"keep_aspect": True, "output_type": "pt"}, "keep_aspect"),
    ):
        with pytest.raises(UniLIPError, match=words):
            tiny_model.reconstruct(picture(), **options)
    with pytest.raises(ImageError):
        tiny_model.reconstruct(None)


# --- precision and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_on_the_cpu(dtype, tiny_model, fresh_model, picture):
    model = fresh_model().to(dtype)
    assert model.dtype == dtype
    options = dict(num_inference_steps=3, output_type="pt", progress=False)
    for name, call in {
        "generate": lambda m, g: m.generate(["a cat", "a much longer prompt"], generator=g, **options).images,
        "edit": lambda m, g: m.edit(picture(), "blue", generator=g, **options).images,
        "reconstruct": lambda m, g: m.reconstruct(picture(), output_type="pt").images,
        "latent": lambda m, g: m.reconstruct(picture(), output_type="latent").images / 10.6,
    }.items():
        low, full = (call(m, torch.Generator().manual_seed(0)) for m in (model, tiny_model))
        assert low.dtype == torch.float32, name
        assert low.isfinite().all(), name
        assert (low - full).abs().mean() < 0.05, name
    questions = ["What?", "How many birds are there?"]
    assert len(model.ask([picture(), None], questions, max_new_tokens=4)) == 2


def test_nothing_but_weights_is_kept_in_a_model(tiny_model):
    """Positions are computed in float32 where they are needed: no buffer that a cast could spoil."""
    assert [name for name, _ in tiny_model.named_buffers()] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_on_the_gpu(dtype, tiny_model, fresh_model, picture):
    model = fresh_model().to("cuda", dtype)
    assert model.device.type == "cuda"
    assert {b.device.type for b in model.buffers()} == {"cuda"}
    options = dict(num_inference_steps=3, output_type="pt", progress=False)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    for name, call in {
        "generate": lambda m, g: m.generate(["a cat", "a much longer prompt"], generator=g, **options).images,
        "edit": lambda m, g: m.edit(picture(), "blue", generator=g, **options).images,
        "reconstruct": lambda m, g: m.reconstruct(picture(), output_type="pt").images,
    }.items():
        there, here = (call(m, torch.Generator().manual_seed(0)) for m in (model, tiny_model))
        assert there.device.type == "cuda", name
        assert (there.cpu() - here).abs().mean() < tolerance, name
    assert model.generate("a cat", num_inference_steps=1, progress=False).images[0].size == (56, 56)
    answer = model.ask(
        picture(), "What?", max_new_tokens=5, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(answer, str)
    assert model.generate("a", generator=torch.Generator("cuda").manual_seed(0), **options).images.isfinite().all()


def test_a_processor_belongs_to_its_config(tiny_model):
    assert isinstance(tiny_model.processor, Processor)
    assert tiny_model.processor.config == tiny_model.config
