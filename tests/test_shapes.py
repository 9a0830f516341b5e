"""Pictures that are not square: their sizes, and that everything draws them as the plain networks do."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from method_support import ODD, apart, seeds, spread
from support import failures
from unilip.cli import main
from unilip.errors import UniLIPError
from unilip.fast.loop import Settings
from unilip.method.encoder import Embeddings
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.pictures import fit_picture, to_pixels, unfit_square
from unilip.shapes import MAX_DRAWN, drawn, like, parse, targets

QUICK = dict(num_inference_steps=3, progress=False)


def plainly(model, texts, noise, features=None):
    """Latents by the plain loop of the method, from prompts of which the first half are unconditional."""
    tokens = model.processor.tokenize(texts)
    return model.draw(tokens, noise, steps=3, guidance=model.config.sampling.guidance_scale, features=features)


def noise_of(model, rows, columns, *numbers):
    shape = (model.config.dit.latent_channels, rows, columns)
    return torch.stack([torch.randn(*shape, generator=one) for one in seeds(*numbers)])


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_multiples_of_28_and_what_is_rounded_is_said(caplog):
    cases = {(448, 336): (448, 336), (450, 340): (448, 336), (42, 28): (56, 28), (41, 8960): (28, 8960)}
    for asked, got in cases.items():
        caplog.clear()
        assert drawn(*asked) == got
        assert ("rounded" in caplog.text) == (asked != got)
    assert drawn(np.int64(56), torch.tensor(84)) == (56, 84)
    assert (parse("448x336"), parse("448"), parse(" 56X84 ")) == ((448, 336), (448, 448), (56, 84))


def test_a_source_keeps_its_shape_at_the_pixels_of_the_square():
    for side in (56, 112, 448, 1344):
        assert like((side, side), side**2) == like((3, 3), side**2) == (side, side)
        for source in ((5, 3), (16, 9), (3, 2), (4, 3), (1, 60)):
            width, height = like(source, side**2)
            assert like(source[::-1], side**2) == (height, width)
            assert width % 28 == height % 28 == 0 and side**2 / 4 <= width * height <= side**2
    assert like((500, 300), 112**2) == (140, 84)
    width, height = like((1600, 900), 448**2)
    assert abs(math.log(width / height * 9 / 16)) < 0.05 and width * height > 0.93 * 448**2
    sources = [(160, 90), (90, 160)]
    assert targets(sources, 448, height=448) == [(784, 448), (252, 448)]
    assert targets(sources, 448, width=84, height=56) == [(84, 56)] * 2
    assert targets([(100, 50)], 448, max_pixels=56 * 28) == [(56, 28)]


def test_what_cannot_be_a_size_is_refused(tiny_model, picture):
    bad = [0, -28, 27, 8961, 2**70, 56.0, "56", True, None, [56], float("nan"), torch.ones(2)]

    def refused(call):
        with pytest.raises(UniLIPError, match=r"between \d+|whole number|at most|multiple of 28|Give either"):
            call()

    looked = []
    hooks = [part.register_forward_pre_hook(lambda *_: looked.append(1)) for part in tiny_model.children()]
    calls = [lambda v=v: drawn(v, 56) for v in bad] + [lambda v=v: drawn(56, v) for v in bad]
    calls += [lambda: drawn(8960, 8960), lambda: tiny_model.edit(picture(), "a", max_pixels=27 * 28, **QUICK)]
    for v in bad:
        if v is not None:
            calls += [lambda v=v, n=n: tiny_model.generate("a", **{n: v}, **QUICK) for n in ("height", "width")]
            calls += [
                lambda v=v, n=n: tiny_model.edit(picture(), "a", **{n: v}, **QUICK)
                for n in ("height", "width", "image_size")
            ]
            calls += [lambda v=v: tiny_model.reconstruct(picture(), max_pixels=v)] * (type(v) is not int or v < 784)
    for both in ({"image_size": 56, "height": 56}, {"max_pixels": 3136, "width": 56}):
        calls += [lambda o=both: tiny_model.edit(picture(), "a", **o, **QUICK)]
        calls += [lambda o=both: tiny_model.encode(picture(), **o)]
    assert failures(refused, calls) == [] and not looked and MAX_DRAWN < 8960**2
    for hook in hooks:
        hook.remove()


def test_a_side_is_that_of_the_picture_and_not_of_a_square(tiny_model, caplog):
    """A square of that side would be too large, and is neither drawn nor spoken of."""
    assert tiny_model.encode(Image.new("RGB", (4, 400)), height=4900).shape[1] == 2 * 175
    tiny_model.encode(Image.new("RGB", (30, 20)), height=50)
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ["49x4900 is rounded to 56x4900", "75x50 is rounded to 84x56"]


def test_fit_and_its_undoing(picture):
    for source in ((100, 50), (50, 100), (70, 70)):
        for size in ((84, 56), (56, 84), (56, 56)):
            for fit in ("resize", "crop", "pad"):
                made = fit_picture(picture(*source), size, fit)
                back = unfit_square(made, source, fit)
                assert made.size == size and all(b <= s for b, s in zip(back.size, size, strict=True))
                assert fit == "crop" or abs(back.width / back.height - source[0] / source[1]) < 0.06
    square = fit_picture(Image.new("RGB", (100, 50), "red"), (84, 84), "pad")
    assert square.getpixel((0, 0)) == (255, 255, 255) and square.getpixel((42, 42)) == (255, 0, 0)


# --- the networks -----------------------------------------------------------------------------------------------------


def odd_model():
    return spread(UniLIP(ODD)).eval()


@torch.no_grad()
def test_both_axes_swapped():
    """Weights that do not know rows from columns give the transposed picture of a transposed one."""
    model = odd_model()
    for module in model.modules():  # kernels over rows and columns become symmetric
        if isinstance(module, torch.nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.transpose(2, 3)) / 2)
        if isinstance(module, Embeddings):
            side = round((module.position_embeddings.shape[1] - 1) ** 0.5)
            grid = module.position_embeddings[:, 1:].unflatten(1, (side, side))
            module.position_embeddings[:, 1:] = ((grid + grid.transpose(1, 2)) / 2).flatten(1, 2)
    first = model.encoder.projector[1].weight  # merged patches: (row, column, channel)
    blocks = first.unflatten(1, (2, 2, -1))
    first.copy_(((blocks + blocks.transpose(1, 2)) / 2).flatten(1))
    norm = model.encoder.projector[0]
    for weight in (norm.weight, norm.bias):
        blocks = weight.unflatten(0, (2, 2, -1))
        weight.copy_(((blocks + blocks.transpose(0, 1)) / 2).flatten())
    pixels = torch.randn(2, 3, 56, 140)
    turned = pixels.transpose(2, 3).contiguous()
    wide, tall = (model.encoder(one).unflatten(1, grid) for one, grid in ((pixels, (2, 5)), (turned, (5, 2))))
    assert apart(wide, tall.transpose(1, 2)) < 1e-4 * float(wide.abs().max())
    latent = model.to_latent(wide.flatten(1, 2), 2)
    back = model.to_latent(tall.flatten(1, 2), 5).transpose(2, 3)
    assert latent.shape == (2, 6, 2, 5) and apart(latent, back) < 1e-3 * float(latent.abs().max())
    assert model.from_latent(latent).shape == (2, 3, 56, 140)
    net, width = model.dit.transformer, ODD.dit.hidden_size // 2
    wide, tall = (places(net, *size) for size in ((2, 5), (5, 2)))  # columns come first: the halves are swapped, too
    tall = tall.transpose(1, 2)
    assert apart(wide, torch.cat([tall[..., width:], tall[..., :width]], -1)) < 1e-5
    net.d = dataclasses.replace(net.d, interpolation_scale=None)
    given = torch.tensor([7.0, 900.0]), torch.randn(2, 4, ODD.dit.caption_channels), torch.ones(2, 4)
    velocity = model.dit(latent, *given)
    turned = model.dit(latent.transpose(2, 3).contiguous(), *given).transpose(2, 3)
    assert apart(velocity, turned) < 1e-4 * float(velocity.abs().max())


def places(net, rows, columns):
    """The positions (1,h,w,W) that the DiT adds."""
    return (net.tokens(torch.zeros(1, 6, rows, columns)) - net.patch_embed["proj"].bias).unflatten(1, (rows, columns))


@torch.no_grad()
def test_positions_of_an_axis_do_not_depend_on_the_other():
    net = odd_model().dit.transformer
    half = ODD.dit.hidden_size // 2
    assert apart(places(net, 2, 5)[:, 0, :, :half], places(net, 4, 5)[:, 3, :, :half]) < 1e-5
    assert apart(places(net, 3, 5)[:, :, 0, half:], places(net, 3, 2)[:, :, 1, half:]) < 1e-5


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_pictures_of_any_shape_are_those_of_the_plain_loop(tiny_model, picture):
    p = tiny_model.processor
    for width, height in ((84, 56), (28, 112), (140, 84)):
        rows, columns = height // 28, width // 28
        noise = noise_of(tiny_model, rows, columns, 1, 2)
        expected = plainly(
            tiny_model, [p.generate_text(None)] * 2 + [p.generate_text(t) for t in ("a", "a dog")], noise
        )
        options = dict(width=width, height=height, output_type="latent", **QUICK)
        assert apart(tiny_model.generate(["a", "a dog"], generator=[1, 2], **options).images, expected) < 1e-4
        alone = tiny_model.generate("a dog", generator=[2], **options).images
        assert apart(alone, expected[1:]) < 1e-4  # whatever the batch size
        sources = [picture(90, 60, seed) for seed in (0, 1)]
        features = tiny_model.features(to_pixels([fit_picture(s, (width, height)) for s in sources]))
        assert torch.equal(features, tiny_model.encode(sources, width=width, height=height))
        texts = [p.edit_text(t, rows * columns) for t in (None, None, "blue", "a dog")]
        expected = plainly(tiny_model, texts, noise, torch.cat([features, features]))
        got = tiny_model.edit(sources, ["blue", "a dog"], generator=[1, 2], **options).images
        assert apart(got, expected) < 1e-4
        latent = tiny_model.reconstruct(sources, width=width, height=height, output_type="latent").images
        assert apart(latent, tiny_model.to_latent(features, rows)) < 1e-5
        assert tiny_model.decode(features, height=height, output_type="pt").images.shape == (2, 3, height, width)


def test_squares_are_bit_equal_to_the_plain_way(tiny_model, picture):
    """The model's own square needs no option, and says the same as every way to ask for it."""
    first = tiny_model.generate(["a", "a dog"], generator=5, output_type="latent", **QUICK).images
    for same in ({"image_size": 56}, {"height": 56, "width": 56}, {"height": 56}, {"width": 56}):
        again = tiny_model.generate(["a", "a dog"], generator=5, output_type="latent", **same, **QUICK).images
        assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(32, 2, 2, generator=generator) for _ in range(2)])
    settings = Settings.of(tiny_model.config, num_inference_steps=3)
    from unilip import sampling

    assert torch.equal(first, sampling.draw(tiny_model, tiny_model.processor, ["a", "a dog"], settings, noise))
    source = picture(56, 56)
    edited = tiny_model.edit(source, "blue", generator=5, **QUICK).images[0]
    for same in ({"image_size": 56}, {"height": 56, "width": 56}, {"max_pixels": 3136}, {"keep_aspect": True}):
        assert np.array_equal(edited, tiny_model.edit(source, "blue", generator=5, **same, **QUICK).images[0])


def test_sources_of_several_shapes_in_one_call(tiny_model, picture):
    sources = [picture(120, 60), picture(56, 56, 1), picture(60, 120, 2), picture(122, 61, 3)]
    options = dict(num_images_per_prompt=2, **QUICK)
    together = tiny_model.edit(sources, "blue", generator=list(range(8)), **options).images
    sizes = [(56, 28), (56, 56), (28, 56), (56, 28)]
    assert [image.size for image in together] == [size for size in sizes for _ in range(2)]
    for i, source in enumerate(sources):
        alone = tiny_model.edit(source, "blue", generator=[2 * i, 2 * i + 1], **options).images
        for one, other in zip(alone, together[2 * i :], strict=False):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    ordered = tiny_model.edit(sources, "blue", generator=7, **options).images  # one generator serves them in order
    generator = torch.Generator().manual_seed(7)
    for i, source in enumerate(sources):
        alone = tiny_model.edit(source, "blue", generator=generator, **options).images
        for one, other in zip(alone, ordered[2 * i :], strict=False):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    again = tiny_model.reconstruct(sources).images
    assert [image.size for image in again] == sizes
    assert np.array_equal(again[2], tiny_model.reconstruct(sources[2]).images[0])
    exact = tiny_model.reconstruct(picture(100, 70), keep_aspect=True).images[0]
    assert abs(exact.width / exact.height - 10 / 7) < 0.06
    for call in (
        lambda: tiny_model.edit(sources, "blue", output_type="pt", **QUICK),
        lambda: tiny_model.reconstruct(sources, output_type="np"),
        lambda: tiny_model.encode(sources),
    ):
        with pytest.raises(UniLIPError, match="56x28, 56x56, 28x56 px; give height and width"):
            call()
    assert tiny_model.encode(sources, image_size=56).shape[:2] == (4, 4)


def test_a_source_too_large_for_the_context_is_refused_before_any_work(fresh_model, picture):
    model, looked = fresh_model(), []
    model.encoder.register_forward_pre_hook(lambda *_: looked.append(1))
    side = 28 * (math.isqrt(model.config.text.max_positions) + 1)
    with pytest.raises(UniLIPError, match="model reads at most"):
        model.edit(picture(), "blue", image_size=side, **QUICK)
    assert not looked


@torch.no_grad()
def test_strips_and_packing_know_shapes(fresh_model):
    model = fresh_model()
    one = dict(width=140, height=84, generator=3, output_type="pt", progress=False, num_inference_steps=40)
    whole = model.generate("a star", **one).images
    model.enable_tiling(3)
    assert apart(whole, model.generate("a star", **one).images) < 1e-4


@pytest.mark.slow
def test_compiled_steps_of_several_shapes(fresh_model, picture):
    model = fresh_model()
    sizes = ({"width": 84, "height": 56}, {"width": 56, "height": 84}, {})
    call = lambda o: model.generate("a star", generator=3, output_type="latent", **o, **QUICK).images  # noqa: E731
    plain = [call(o) for o in sizes]
    model.compile(backend="eager")
    assert max(apart(a, call(o)) for a, o in zip(plain, sizes, strict=True)) < 1e-4


def test_the_number_of_queries_stays(tiny_model):
    tokens = tiny_model.processor.tokenize([tiny_model.processor.edit_text("x", 15)])
    assert isinstance(tokens, Tokens) and tokens.image_slots.sum() == 15
    condition, mask = tiny_model.condition(tokens, torch.randn(1, 15, tiny_model.config.text.hidden_size))
    assert condition.shape[1] == mask.shape[1] == tokens.input_ids.shape[1] + tiny_model.config.num_queries


def test_the_command_line_draws_any_shape(tiny_folder, tmp_path, monkeypatch, capsys, picture):
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(tiny_folder), "--json", "--no-progress"]

    def run(*words):
        code = main([*words, *common])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out), err

    made, err = run("generate", "a star", "--steps", "2", "--size", "90x55", "--output", "a.png")
    assert Image.open("a.png").size == (84, 56) and err.count("unilip: 90x55 is rounded to 84x56") == 1
    assert (made["settings"]["width"], made["settings"]["height"]) == (84, 56)
    run("generate", "a star", "--steps", "2", "--size", "84", "--output", "b.png")
    assert Image.open("b.png").size == (84, 84)
    picture(120, 60).save("wide.png")
    for options, size in (((), (56, 28)), (("--max-pixels", "12544"), (140, 84)), (("--size", "56"), (56, 56))):
        run("edit", "wide.png", "blue", "--steps", "2", *options, "--force", "--output", "c.png")
        run("reconstruct", "wide.png", *options, "--force", "--output", "d.png")
        assert Image.open("c.png").size == Image.open("d.png").size == size, options
    assert main(["edit", "wide.png", "blue", "--size", "56", "--max-pixels", "3136", *common]) == 2
    assert "Give either" in capsys.readouterr().err
