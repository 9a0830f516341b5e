"""Less memory, the same answers: parts that come and go, strips, few bits, and nothing kept after an interruption."""

import copy
import gc
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import unilip
from unilip import cli
from unilip.checkpoints.write import convert
from unilip.errors import UniLIPError
from unilip.fast.offload import HEAD
from unilip.fast.quantise import is_quantised, quantise
from unilip.info import describe
from unilip.method.config import QUANTIZATIONS
from unilip.model import UniLIP


def draw(model: UniLIP, prompt: str = "a red star", **settings: Any) -> Tensor:
    settings = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "progress": False, **settings}
    images: Tensor = model.generate(prompt, num_inference_steps=4, **settings).images
    return images


def held(model: UniLIP) -> set[str]:
    """Return the parts that have weights."""
    return {part for part in model.parts if not any(p.is_meta for p in model.get_submodule(part).parameters())}


# --- parts that come and go -----------------------------------------------------------------------------------------


def everything(model: UniLIP, picture: Image.Image) -> list[Any]:
    """A result of each ability."""
    settings: dict[str, Any] = dict(num_inference_steps=3, output_type="pt", progress=False)
    edited = model.edit(picture, "make it blue", generator=torch.Generator().manual_seed(1), **settings).images
    streamed = "".join(model.ask(picture, "What is it?", max_new_tokens=4, stream=True))
    return [draw(model), edited, model.reconstruct(picture, output_type="pt").images, streamed]


def same(ours: list[Any], expected: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, expected, strict=True))


def test_parts_read_from_disk_as_needed_give_the_same(
    tiny_model: UniLIP, tiny_folder: Path, picture: Callable[..., Image.Image]
) -> None:
    model = UniLIP.from_pretrained(tiny_folder, low_memory=True)
    seen: set[str] = set()
    model.dit.transformer.patch_embed["proj"].register_forward_pre_hook(lambda *_: seen.update(held(model)))
    assert held(model) == set() and str(model.device) == "cpu"
    ours, expected = everything(model, picture()), everything(tiny_model, picture())
    assert ours[3] == expected[3]
    assert all(float((a - b).abs().max()) < 1e-5 for a, b in zip(ours[:3], expected[:3], strict=True))  # in strips
    assert seen == {"dit"}  # nothing else was there while it worked
    assert held(model) == set()


def test_copies_of_a_model_that_is_read_each_time_are_models_of_their_own(tiny_folder: Path) -> None:
    model = UniLIP.from_pretrained(tiny_folder, low_memory=True)
    assert model.runtime.offload is not None
    model.runtime.offload.adapters["a"] = (None, 0.0)  # switched off
    drawn = draw(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made.unload_adapters("a")
        assert held(made) == set() and torch.equal(draw(made), drawn) and unilip.adapters.adapter_names(model) == ["a"]


@pytest.mark.parametrize("kind", ["low_memory", "offload"])
def test_parts_that_come_and_go_are_not_cast(kind: str, tiny_folder: Path, fresh_model: Callable[..., UniLIP]) -> None:
    low = kind == "low_memory"
    model = UniLIP.from_pretrained(tiny_folder, low_memory=True) if low else fresh_model().enable_cpu_offload("cpu")
    for whole in (model, model.dit):
        with pytest.raises(UniLIPError, match="give device and type when it is loaded"):
            whole.half()
        with pytest.raises(UniLIPError, match="load the folder instead"):
            whole.load_state_dict({})
    assert draw(model).isfinite().all() and type(model.dit)(model.config).half()  # which is a part of no model


def test_what_pytorch_takes_for_the_usual_device_changes_nothing(
    tiny_model: UniLIP, tiny_folder: Path, picture: Callable[..., Image.Image]
) -> None:
    for model in (tiny_model, UniLIP.from_pretrained(tiny_folder, low_memory=True)):
        expected = everything(model, picture())
        with torch.device("meta"):
            assert same(everything(model, picture()), expected)


def test_low_memory_keeps_the_type(tiny_folder: Path) -> None:
    model = UniLIP.from_pretrained(tiny_folder, low_memory=True, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert torch.equal(draw(model), draw(UniLIP.from_pretrained(tiny_folder, dtype="bfloat16").enable_tiling()))
    assert draw(UniLIP.from_pretrained(tiny_folder, low_memory=True, dtype="auto")).isfinite().all()


def test_offloaded_parts_are_moved_and_put_back(
    tiny_model: UniLIP, fresh_model: Callable[..., UniLIP], picture: Callable[..., Image.Image]
) -> None:
    model = fresh_model(text=tiny_model.config.text)
    homes = {name: p for name, p in model.named_parameters()}
    model.enable_cpu_offload("cpu")
    offload, seen = model.runtime.offload, []
    assert offload is not None
    model.dit.transformer.patch_embed["proj"].register_forward_pre_hook(lambda *_: seen.append({*offload.present}))
    assert same(everything(model, picture()), everything(tiny_model, picture()))
    assert {frozenset(s) for s in seen} == {frozenset({"dit"})}
    assert model.runtime.offload is not None and model.runtime.offload.present == set()
    assert all(p is homes[name] for name, p in model.named_parameters())  # the originals are in their places


def test_offloading_keeps_tied_weights_tied(fresh_model: Callable[..., UniLIP], tiny_model: UniLIP) -> None:
    import dataclasses

    model = fresh_model(text=dataclasses.replace(tiny_model.config.text, tie_embeddings=True)).enable_cpu_offload("cpu")
    with model.using("mllm"):
        llm: Any = model.mllm.language_model
        assert llm.lm_head.weight is llm.model.embed_tokens.weight


class Stop(Exception):
    pass


def interrupt(*_: Any) -> None:
    raise Stop


def tensor_bytes() -> int:
    gc.collect()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor}
    return sum(storages.values())


def test_an_interrupted_run_frees_memory(fresh_model: Callable[..., UniLIP]) -> None:
    model = fresh_model()
    with pytest.raises(Stop):
        draw(model, callback_on_step_end=interrupt)
    before = tensor_bytes()
    for _ in range(2):
        with pytest.raises(Stop):
            draw(model, callback_on_step_end=interrupt, num_images_per_prompt=4)
    assert tensor_bytes() <= before


@pytest.mark.parametrize("kind", ["disk", "offload"])
def test_an_interrupted_run_takes_its_parts_away(
    kind: str, tiny_folder: Path, fresh_model: Callable[..., UniLIP]
) -> None:
    if kind == "disk":
        model = UniLIP.from_pretrained(tiny_folder, low_memory=True)
    else:
        model = fresh_model().enable_cpu_offload("cpu")
    with pytest.raises(Stop):
        draw(model, callback_on_step_end=interrupt)
    assert model.runtime.offload is not None and model.runtime.offload.present == set()
    assert kind == "offload" or held(model) == set()
    answer = model.ask(None, "What?", stream=True, max_new_tokens=5)
    next(answer)  # type: ignore[arg-type]
    assert model.runtime.offload.present == {"mllm"}
    answer.close()  # type: ignore[union-attr]
    assert model.runtime.offload.present == set()
    assert draw(model).isfinite().all()  # and works again


def test_what_cannot_go_together_says_so(fresh_model: Callable[..., UniLIP], tmp_path: Path) -> None:
    model = fresh_model().enable_cpu_offload("cpu")
    for call in (lambda: model.compile(), lambda: model.split_guidance("cpu"), lambda: model.quantize("int8")):
        with pytest.raises(UniLIPError):
            call()
    with pytest.raises(UniLIPError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(UniLIPError, match="come and go"):
        model.to(torch.bfloat16)
    with pytest.raises(UniLIPError, match="come and go"):
        model.load_state_dict(fresh_model().state_dict())
    with pytest.raises(UniLIPError, match="choose one"):
        fresh_model().compile().enable_cpu_offload("cpu")
    with pytest.raises(UniLIPError, match="strips is 0"):
        fresh_model().enable_tiling(0)


# --- strips ---------------------------------------------------------------------------------------------------------


def test_pictures_are_decoded_one_by_one(fresh_model: Callable[..., UniLIP]) -> None:
    model, seen = fresh_model(), []
    model.pixel_decoder.decoder.conv_in.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
    latent = torch.randn(3, 32, 2, 2)
    with torch.no_grad():
        whole = model.from_latent(latent)
        sliced = model.enable_tiling(2).from_latent(latent)
    assert seen == [3, 1, 1, 1]
    assert float((whole - sliced).abs().max()) < 1e-5


# --- few bits -------------------------------------------------------------------------------------------------------

QUESTION = "What color is the background?"
TEXTS = (
    "a red star", "three yellow stars", "a cat on a pink background", "a red car", "a frog and a blue balloon",
    "two green fish", "a dog", "a purple heart above a tree", "four donuts", "a house on a blue background",
)  # fmt: skip
NEAR = {
    "int8": 0.02,
    "int8_dynamic": 0.04,
    "int4": 0.25,
    "fp8": 0.1,
}  # of latents, relative; random weights suffer more than trained ones


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_quantised_models_draw_nearly_the_same(
    kind: str, tiny_model: UniLIP, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr("unilip.fast.quantise.SMALL", 0)  # as if these were large
    model = UniLIP.from_pretrained(tiny_folder, quantization=kind)
    linear = model.dit.transformer.transformer_blocks[0]
    assert is_quantised(linear.ff.conv_inverted) and is_quantised(linear.attn1.to_q)
    assert is_quantised(model.mllm.language_model.model.layers[0]) and not is_quantised(model.pixel_decoder)
    exact, near = (draw(m, output_type="latent") for m in (tiny_model, model))
    assert 1e-5 < float((near - exact).norm() / exact.norm()) < NEAR[kind]
    low = UniLIP.from_pretrained(tiny_folder, quantization=kind, low_memory=True)
    assert torch.equal(draw(low, output_type="latent"), near)
    if kind == "int4":  # what a processor packs for itself stays there
        with pytest.raises(UniLIPError, match="cannot be saved; save int8 or fp8"):
            model.save_pretrained(tmp_path / "x")
        return
    model.save_pretrained(tmp_path / "x", max_shard_size="1MB")
    for options in ({}, {"low_memory": True}):
        again = UniLIP.from_pretrained(tmp_path / "x", **options)
        assert torch.equal(draw(again, output_type="latent"), near)
    again = UniLIP.from_pretrained(tmp_path / "x", dtype="bfloat16")
    assert torch.equal(draw(again), draw(again.to(torch.bfloat16))) and draw(again).isfinite().all()


def test_a_quantised_model_moves_but_is_not_cast(fresh_model: Callable[..., UniLIP]) -> None:
    pytest.importorskip("torchao")
    model = fresh_model().quantize("int8")
    drawn = draw(model)
    for whole in (model, model.dit):
        with pytest.raises(UniLIPError, match="keep their type; cast before quantising"):
            whole.half()
    assert torch.equal(draw(model.to("cpu").float()), drawn)


def test_quantised_files_are_torchaos_and_read_strictly(tiny_folder: Path, tmp_path: Path) -> None:
    layout = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = UniLIP.from_pretrained(tiny_folder, quantization="int8")
    model.save_pretrained(tmp_path / "few")
    file = tmp_path / "few" / "model.safetensors"
    assert describe(file.parent)["language_head"] == "stored, differs from the token embedding"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in load_file(file)}
    theirs, left = layout.unflatten_tensor_state_dict(tensors, metadata)
    state = model.state_dict()
    assert (
        not left and set(theirs) == set(state) and all(type(theirs[name]) is type(state[name].data) for name in state)
    )
    assert sum(t.nbytes for t in tensors.values()) < 0.6 * sum(
        t.nbytes for t in load_file(tiny_folder / file.name).values()
    )

    some = next(name for name in tensors if name.endswith("_weight_scale"))
    whole = some.replace("._weight_scale", ".weight")
    about = json.loads(metadata[whole])
    wrong: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "lacks a piece": ({n: t for n, t in tensors.items() if n != some}, metadata),
        "has a piece too much": (tensors, {n: t for n, t in metadata.items() if n != whole} | {"tensor_names": "[]"}),
        "of an unknown kind": (tensors, metadata | {whole: json.dumps(about | {"_type": "Int3Tensor"})}),
        "of no kind": (tensors, metadata | {whole: "[1"}),
        "of another shape": (tensors | {some.replace("scale", "qdata"): torch.zeros(3, 5, dtype=torch.int8)}, metadata),
    }
    for name, (held_tensors, said) in wrong.items():
        save_file(held_tensors, file, said)
        with pytest.raises(UniLIPError):
            UniLIP.from_pretrained(tmp_path / "few")
            pytest.fail(name)
    save_file(tensors, file, metadata)
    refused = {
        "cannot be quantised": lambda: UniLIP.from_pretrained(tmp_path / "few", quantization="int8"),
        "only plain weights": lambda: convert(tmp_path / "few", tmp_path / "out", "authors"),
        "leave dtype out": lambda: model.save_pretrained(tmp_path / "out", dtype=torch.bfloat16),
    }
    for said_, call in refused.items():
        with pytest.raises(UniLIPError, match=said_):
            call()
    assert not (tmp_path / "out").exists()


def peak_bytes(task: Callable[[], Any]) -> tuple[int, Any]:
    """The most that tensors hold at once while a task runs, as torch's allocator counts them, and what it returns."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = task()
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_never_peaks_above_plain(dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")

    def run(source: Path = tiny_folder, **options: Any) -> Callable[[], Any]:
        def task() -> UniLIP:
            model = UniLIP.from_pretrained(source, dtype=dtype, parts="drawing", **options)
            draw(model)
            return model

        return task

    run(quantization="int8")()  # what is made once is not counted
    UniLIP.from_pretrained(tiny_folder, quantization="int8", dtype=dtype).save_pretrained(tmp_path / "int8")
    plain, model = peak_bytes(run())
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= plain
    peaks = {kind: peak_bytes(run(quantization=kind))[0] for kind in QUANTIZATIONS}
    peaks["stored"] = peak_bytes(run(tmp_path / "int8"))[0]
    assert {kind: peak / plain for kind, peak in peaks.items() if peak > plain} == {}
    low, _ = peak_bytes(run(low_memory=True))
    both, _ = peak_bytes(run(low_memory=True, quantization="int8"))
    assert both <= low <= plain


def test_pictures_read_no_language_head(tiny_folder: Path, tmp_path: Path) -> None:
    model = UniLIP.from_pretrained(tiny_folder, parts="drawing")
    assert not any("lm_head" in name for name in model.state_dict())
    assert torch.equal(draw(model), draw(UniLIP.from_pretrained(tiny_folder)))
    with pytest.raises(UniLIPError, match="lm_head"):
        model.save_pretrained(tmp_path / "x")
    low = UniLIP.from_pretrained(tiny_folder, low_memory=True)
    head: Any = low.mllm.language_model.lm_head
    with low.using("mllm"):
        assert head.weight.is_meta and not low.mllm.queries.is_meta
    with low.using("mllm", HEAD):
        assert not head.weight.is_meta


def test_large_weights_are_quantised_by_rows_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    for kind in ("int8", "fp8"):
        whole, parts = (torch.nn.Linear(64, 100, bias=False) for _ in range(2))
        parts.load_state_dict(whole.state_dict())
        quantise(whole, kind)
        monkeypatch.setattr("unilip.fast.quantise.SLICE", 64 * 30)
        quantise(parts, kind)
        monkeypatch.undo()
        x = torch.randn(3, 64)
        assert is_quantised(parts) and torch.equal(whole(x), parts(x))


@pytest.fixture(scope="module")
def embedded() -> tuple[UniLIP, Image.Image, str, list[Tensor]]:
    """The embedded model, a picture of its world, what it answers, and what it draws of some prompts."""
    model = UniLIP.from_pretrained()
    image = Image.open(next((Path(unilip.__file__).parent / "weights" / "examples").glob("*.png")))
    return model, image, str(model.ask(image, QUESTION, max_new_tokens=12)), [draw(model, text) for text in TEXTS]


@pytest.mark.parametrize(
    ("kind", "decibels", "stay"), [("int8", 35.0, 8), ("int8_dynamic", 35.0, 8), ("fp8", 35.0, 8), ("int4", 30.0, 2)]
)
def test_a_trained_model_answers_the_same_in_few_bits(
    kind: str,
    decibels: float,
    stay: int,
    embedded: tuple[UniLIP, Image.Image, str, list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So many pictures of ten stay what they were: prompts at a turning point become others, in int4 more than half."""
    pytest.importorskip("torchao")
    monkeypatch.setattr("unilip.fast.quantise.SMALL", 0)
    _, image, answer, drawn = embedded
    model = UniLIP.from_pretrained(quantization=kind)
    assert answer and model.ask(image, QUESTION, max_new_tokens=12) == answer
    off = [(draw(model, text) - picture).square().mean() for text, picture in zip(TEXTS, drawn, strict=True)]
    assert int((-10 * torch.stack(off).log10() > decibels).sum()) >= stay, off


def test_int4_leaves_rows_that_cannot_be_packed() -> None:
    pytest.importorskip("torchao")
    layers = torch.nn.Sequential(torch.nn.Linear(64, 42), torch.nn.Linear(64, 48))
    quantise(layers, "int4")
    assert [is_quantised(layer) for layer in layers] == [False, True]


def test_int8_weights_take_a_quarter() -> None:
    pytest.importorskip("torchao")
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    quantise(layer, "int8")
    weight: Any = layer[0].weight
    stored = sum(getattr(weight, name).nbytes for name in weight.tensor_data_names)
    assert stored < 0.3 * 256 * 256 * 4


def test_a_head_that_shares_the_embedding_stays_shared(fresh_model: Callable[..., UniLIP], tiny_model: UniLIP) -> None:
    pytest.importorskip("torchao")
    import dataclasses

    model = fresh_model(text=dataclasses.replace(tiny_model.config.text, tie_embeddings=True)).quantize("int8")
    llm: Any = model.mllm.language_model
    assert llm.lm_head.weight is llm.model.embed_tokens.weight


def test_an_unknown_quantisation_lists_the_known_ones(tiny_folder: Path) -> None:
    with pytest.raises(UniLIPError, match=r"'int3'.*int8, int4, fp8"):
        UniLIP.from_pretrained(tiny_folder, quantization="int3")


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UniLIPError, match=r"pip install '\.\[quantize\]'"):
        quantise(torch.nn.Identity(), "int8")


# --- from the command line ------------------------------------------------------------------------------------------


def test_low_memory_and_quantize_on_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    def pixels(name: str, *options: str) -> Tensor:
        path = tmp_path / f"{name}.png"
        words = ["generate", "a star", "--model", str(tiny_folder), "--steps", "2", "--output", str(path), *options]
        assert cli.main(words) == 0
        return torch.tensor(list(Image.open(path).getdata()), dtype=torch.float32)

    plain = pixels("plain")
    assert float((pixels("low", "--low-memory") - plain).abs().max()) <= 1
    pytest.importorskip("torchao")
    assert 0 < float((pixels("few", "--quantize", "int4") - plain).abs().mean()) < 16


def test_only_the_parts_that_a_verb_needs_are_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Callable[..., Image.Image]
) -> None:
    load, asked = UniLIP.from_pretrained, list[Any]()

    def spy(*arguments: Any, **options: Any) -> UniLIP:
        asked.append(options["parts"])
        return load(*arguments, **options)

    monkeypatch.setattr(UniLIP, "from_pretrained", spy)
    picture().save(tmp_path / "in.png")
    assert (
        cli.main(["reconstruct", str(tmp_path / "in.png"), "--model", str(tiny_folder), "--output", str(tmp_path)]) == 0
    )
    words = ["generate", "a star", "--model", str(tiny_folder), "--steps", "1", "--output", str(tmp_path)]
    assert cli.main(words) == 0
    assert set(asked[0]) == {"encoder", "latent_head", "pixel_decoder"}
    assert asked[1] == "drawing"
