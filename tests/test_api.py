"""The model as a library: any wrong type is an error of ours, weights may change between calls, precisions may differ.

Each call of a table is given values of every kind; it takes them, or refuses them by a `UniLIPError`, nothing else.
"""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from method_support import apart, seeds
from unilip import UniLIP, UniLIPConfig, adapters, preset
from unilip.errors import UniLIPError
from unilip.model import ImageOutput
from unilip.pictures import to_pixels
from unilip.pipeline import UniLIPPipeline

LATENT: dict[str, Any] = dict(num_inference_steps=3, progress=False, output_type="latent")
STRANGE: tuple[Any, ...] = (
    None, 3, -1, 2.5, 10**30, 10**400, True, "x", "", b"x", [], {}, (1, 2), [None], ["a", 3], object(), float("nan"),
    float("inf"), np.float64(1.5), np.zeros(3), torch.zeros(2), torch.zeros(1, 2, 3, 4), {"role": "user"}, len,
)  # fmt: skip


def draw(model: UniLIP, prompt: Any = "three yellow stars", **settings: Any) -> Tensor:
    images: Tensor = model.generate(prompt, **({"generator": 0} | LATENT | settings)).images
    return images


def table(model: UniLIP, red: Image.Image) -> dict[str, Callable[[Any], Any]]:
    """Every public argument as a call that takes its value."""
    quick: dict[str, Any] = LATENT | {"num_inference_steps": 1}
    tokens = {"max_new_tokens": 1}
    pipe, one, config = UniLIPPipeline(model), copy.deepcopy(model), preset("tiny")
    latent, features = torch.zeros(1, 32, 2, 2), torch.zeros(1, 4, 64)
    calls: dict[str, Callable[[Any], Any]] = {
        "generate prompt": lambda v: model.generate(v, **quick),
        "edit image": lambda v: model.edit(v, "a", **quick),
        "edit prompt": lambda v: model.edit(red, v, **quick),
        "reconstruct image": lambda v: model.reconstruct(v),
        "ask image": lambda v: model.ask(v, "a", **tokens),
        "ask question": lambda v: model.ask(None, v, **tokens),
        "ask turn": lambda v: model.ask(None, "a", history=[v], **tokens),
        "ask role": lambda v: model.ask(None, "a", history=[{"role": v, "content": "a"}], **tokens),
        "ask content": lambda v: model.ask(None, "a", history=[{"role": "user", "content": v}], **tokens),
        "ask images": lambda v: model.ask(None, "a", history=[{"role": "user", "content": "a", "images": v}], **tokens),
        "encode image": lambda v: model.encode(v),
        "decode values": lambda v: model.decode(v),
        "decode output_type": lambda v: model.decode(latent, output_type=v),
        "to_latent features": lambda v: model.to_latent(v),
        "to_latent height": lambda v: model.to_latent(features, v),
        "from_latent latent": lambda v: model.from_latent(v),
        "features pixels": lambda v: model.features(v),
        "condition tokens": lambda v: model.condition(v),
        "compile bucket": lambda v: copy.copy(one).compile(bucket=v),
        "enable_tiling": lambda v: one.enable_tiling(v),
        "split_guidance": lambda v: one.split_guidance(v),
        "enable_cpu_offload": lambda v: UniLIP.from_config(config, parts=["latent_head"]).enable_cpu_offload(v),
        "quantize": lambda v: one.quantize(v),
        "require": lambda v: model.require(v),
        "load_adapter": lambda v: one.load_adapter(v),
        "set_adapters": lambda v: one.set_adapters(v),
        "unload_adapters": lambda v: one.unload_adapters(v),
        "preset": preset,
        "from_config config": lambda v: UniLIP.from_config(v, parts=["latent_head"]),
        "from_config seed": lambda v: UniLIP.from_config(config, seed=v, parts=["latent_head"]),
        "from_config parts": lambda v: UniLIP.from_config(config, parts=v),
        "from_dict": UniLIPConfig.from_dict,
        "from_pretrained source": lambda v: v is not None and UniLIP.from_pretrained(v),
        "save_pretrained folder": lambda v: one.save_pretrained(v),
        "pipeline image": lambda v: pipe("a", v, num_inference_steps=1),
    }
    drawing = "negative_prompt num_images_per_prompt num_inference_steps guidance_scale generator solver preset"
    for name in f"{drawing} image_size output_type callback_on_step_end progress".split():
        calls[f"generate {name}"] = lambda v, n=name: model.generate("a", **(quick | {n: v}))
        calls[f"edit {name}"] = lambda v, n=name: model.edit(red, "a", **(quick | {n: v}))
    for name in ("fit", "keep_aspect"):
        calls[f"edit {name}"] = lambda v, n=name: model.edit(red, "a", **(quick | {n: v}))
    for name in ("fit", "keep_aspect", "image_size", "output_type"):
        calls[f"reconstruct {name}"] = lambda v, n=name: model.reconstruct(red, **{n: v})
    for name in ("fit", "image_size"):
        calls[f"encode {name}"] = lambda v, n=name: model.encode(red, **{n: v})
    for name in ["history", "max_new_tokens", "temperature", "top_p", "generator", "max_tiles", "stream"]:
        calls[f"ask {name}"] = lambda v, n=name: model.ask(None, "a", **(tokens | {n: v}))
    for name in ("dtype", "device", "parts", "quantization", "low_memory", "performance"):
        calls[f"from_pretrained {name}"] = lambda v, n=name: UniLIP.from_pretrained("nowhere", **{n: v})
    for name in ("dtype", "max_shard_size"):
        calls[f"save_pretrained {name}"] = lambda v, n=name: one.save_pretrained("saved", **{n: v})
    for name in UniLIPConfig.__dataclass_fields__:
        calls[f"config {name}"] = lambda v, n=name: config.replace(**{n: v})
    callback = "callback_on_step_end"
    for name in ("height", "width", "generator", callback, f"{callback}_tensor_inputs", "return_dict"):
        calls[f"pipeline {name}"] = lambda v, n=name: pipe("a", num_inference_steps=1, output_type="latent", **{n: v})
    return calls


def test_any_value_of_any_type_is_taken_or_refused_by_an_error_of_ours(
    tiny_model: UniLIP, picture: Callable[..., Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, taken = [], {}
    for name, call in table(tiny_model, picture()).items():
        taken[name] = 0
        for value in STRANGE:
            if value is len and "callback" in name:
                continue  # a function it is, and its own errors are the caller's
            if name == "ask max_new_tokens" and isinstance(value, int) and value > 3:
                continue
            try:
                call(value)
                taken[name] += 1
            except UniLIPError:
                pass
            except Exception as error:
                wrong.append(f"{name} = {str(value)[:30]!r}: {type(error).__name__}: {str(error)[:80]}")
    assert not wrong, "\n".join(wrong)
    assert max(taken.values()) < len(STRANGE) - 5 and len(taken) > 80


def test_numbers_of_other_kinds_and_results_as_inputs(tiny_model: UniLIP, picture: Callable[..., Image.Image]) -> None:
    drawn = draw(tiny_model, generator=torch.Generator().manual_seed(5), num_inference_steps=2)
    for steps, seed in ((np.int64(2), 5), (torch.tensor(2), np.int32(5)), (2, torch.tensor(5))):
        assert torch.equal(draw(tiny_model, generator=seed, num_inference_steps=steps), drawn)
    two = draw(tiny_model, ["a", "b"], generator=[1, 2])
    assert torch.equal(two, draw(tiny_model, ["a", "b"], generator=seeds(1, 2)))
    pictures = [picture(seed=i) for i in range(2)]
    made = {kind: tiny_model.reconstruct(pictures, output_type=kind) for kind in ("pil", "pt", "np")}
    expected = tiny_model.encode(made["pil"])
    assert expected.shape == (2, 4, 64)
    for output in made.values():
        for given in (output, output.images):
            assert torch.equal(tiny_model.encode(given), expected)
            assert tiny_model.edit(given, "blue", **LATENT).images.shape == (2, 32, 2, 2)
    latent = tiny_model.to_latent(expected)
    for values in (expected, latent):
        assert apart(tiny_model.decode(values, output_type="pt").images, tiny_model.from_latent(latent).detach()) < 5e-6
    assert made["pil"]._repr_html_().count("<img") == 2 and "[2, 3, 56, 56]" in made["pt"]._repr_html_()
    assert ImageOutput([])._repr_html_() == ""
    assert len(tiny_model.decode(tiny_model.encode([]))) == 0


def test_loading_minds_no_default_device_and_needs_parts(tiny_folder: Path, fresh_model: Callable[..., UniLIP]) -> None:
    plain, config = fresh_model(), preset("tiny")
    with torch.device("meta"):
        built = UniLIP.from_config(config), UniLIP.from_pretrained(tiny_folder)
    for model in built:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain.state_dict()[name]), name
    with pytest.raises(UniLIPError, match=r"parts is \[\]; name one or more of encoder, "):
        UniLIP.from_pretrained(tiny_folder, parts=[])


def test_a_model_for_drawing_keeps_its_head_where_plans_need_it(
    tmp_path: Path, fresh_model: Callable[..., UniLIP]
) -> None:
    planner = fresh_model(sampling=replace(preset("tiny").sampling, plan="Place: "))
    for model, folder in ((planner, tmp_path / "planner"), (fresh_model(), tmp_path / "plain")):
        model.save_pretrained(folder)
    for low_memory in (False, True):
        made = UniLIP.from_pretrained(tmp_path / "planner", parts="drawing", low_memory=low_memory)
        assert torch.equal(draw(made), draw(planner))
        made = UniLIP.from_pretrained(tmp_path / "plain", parts="drawing", low_memory=low_memory)
        with pytest.raises(UniLIPError, match="plan is True, but"):
            draw(made, plan=True)


def test_a_quantised_model_can_be_pickled(fresh_model: Callable[..., UniLIP]) -> None:
    pytest.importorskip("torchao")
    model = fresh_model().quantize("int8")
    assert torch.equal(draw(pickle.loads(pickle.dumps(model))), draw(model))


# --- weights that change between calls --------------------------------------------------------------------------------


def adapter(folder: Path, model: UniLIP, parts: tuple[str, ...]) -> Path:
    """Write a LoRA for linear layers of parts, in peft's format."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    layers = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.startswith(parts) and name.endswith(("q_proj", "to_q"))
    }
    assert layers
    folder.mkdir()
    peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(layers)).save_pretrained(str(folder))
    tensors = {}
    for name, weight in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.2 * torch.randn(2, weight.shape[1])
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 2)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def test_what_was_drawn_before_changes_no_picture_whatever_happens_to_the_weights(
    fresh_model: Callable[..., UniLIP], tmp_path: Path
) -> None:
    """Written through `.data` as averages of weights are, by a step in place, by an adapter, by merging one."""
    files = {part: adapter(tmp_path / part, fresh_model(), (part,)) for part in ("mllm", "connector", "dit")}

    def through_data(model: UniLIP) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(parameter.data + 0.1 * noise * parameter.data.abs().mean())

    def in_place(model: UniLIP) -> None:
        with torch.no_grad():
            model.mllm.queries.add_(1.0)

    def merged(part: str) -> Callable[[UniLIP], None]:
        return lambda model: (model.load_adapter(files[part]), model.merge_adapters())[1]

    changes: dict[str, Callable[[UniLIP], Any]] = {"data": through_data, "in place": in_place}
    changes |= {f"merged {part}": merged(part) for part in files}
    changes["loaded"] = lambda model: model.load_adapter(files["dit"])
    wrong = []
    for name, change in changes.items():
        for compiled in (False, True):
            used, fresh = fresh_model(), fresh_model()
            if compiled and name == "merged dit":
                torch._dynamo.reset()
                used.compile(backend="eager", bucket=64)
            elif compiled:
                continue
            before = draw(used)
            for model in (used, fresh):
                change(model)
            after = draw(used)
            if not apart(after, draw(fresh)) < 1e-5 or not apart(after, before) > 1e-4:
                wrong.append(f"{name} {compiled}: {apart(after, draw(fresh)):.1e}, moved {apart(after, before):.1e}")
    assert not wrong, "\n".join(wrong)


# --- two threads on one model -----------------------------------------------------------------------------------------


def test_a_change_waits_for_the_work_of_other_threads_and_is_refused_within_ones_own(
    fresh_model: Callable[..., UniLIP], picture: Callable[..., Image.Image], tmp_path: Path
) -> None:
    wrong = []

    def grow(model: UniLIP) -> None:  # any change of what is computed, by the way that every one takes
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})

    changes: dict[str, Callable[[UniLIP], Any]] = {
        "load_state_dict": grow, "to": lambda m: m.to(torch.bfloat16), "quantize": lambda m: m.quantize("int8"),
        "tiling": lambda m: m.enable_tiling(2), "offload": lambda m: m.enable_cpu_offload("cpu"),
        "split": lambda m: m.split_guidance("cpu"), "adapters": lambda m: m.set_adapters({}),
        "unload": lambda m: m.unload_adapters(), "merge": lambda m: m.merge_adapters(),
        "compile": lambda m: m.compile(),
    }  # fmt: skip
    files = adapter(tmp_path / "a", fresh_model(), ("mllm", "connector", "dit"))
    second = adapter(tmp_path / "b", fresh_model(), ("dit",))
    changes |= {
        "a real adapter": lambda m: m.load_adapter(second), "its strength": lambda m: m.set_adapters({"a": 0.5}),
        "none any more": lambda m: m.unload_adapters(), "one for good": lambda m: m.merge_adapters(),
        "by function": lambda m: adapters.load_adapter(m, second),
        "strength by function": lambda m: adapters.set_adapters(m, {}),
        "none by function": lambda m: adapters.unload_adapters(m, ["a"]),
        "merged by function": lambda m: adapters.merge_adapters(m),
        "part to": lambda m: m.dit.to(torch.bfloat16), "part half": lambda m: m.pixel_decoder.half(),
        "part state": lambda m: m.dit.load_state_dict({k: 2 * v for k, v in m.dit.state_dict().items()}),
    }  # fmt: skip
    adapted = list(changes)[-11:-3]
    for name, change in changes.items():
        model, other = fresh_model(), fresh_model()
        for one in (model, other) if name in adapted else ():
            one.load_adapter(files)
        started, order = threading.Event(), []

        def later(model: UniLIP = model, change: Any = change, started: Any = started, order: Any = order) -> None:
            started.wait(30)
            change(model)
            order.append("changed")

        def on_step(m: UniLIP, step: int, *_: Any, change: Any = change, started: Any = started,
                    order: Any = order, name: str = name) -> None:  # fmt: skip
            started.set()
            threading.Event().wait(0.05)
            order.append(step)
            try:
                change(m)
                wrong.append(f"{name}: changed within a step")
            except UniLIPError as error:
                if "at work" not in str(error):
                    wrong.append(f"{name}: {error}")

        thread = threading.Thread(target=later)
        thread.start()
        settings: dict[str, Any] = LATENT | {"generator": 0, "output_type": "pt"}
        drawn = model.edit(picture(), "blue", **settings, callback_on_step_end=on_step).images
        thread.join(60)
        if order != [0, 1, 2, "changed"]:
            wrong.append(f"{name}: {order}")
        before = other.edit(picture(), "blue", **settings).images
        if not torch.equal(drawn, before):
            wrong.append(f"{name}: a mixed picture")
        if name in adapted and torch.equal(model.edit(picture(), "blue", **settings).images, before):
            wrong.append(f"{name}: no change")
        stream = other.ask(None, "What?", max_new_tokens=40, stream=True)
        if name in ("load_state_dict", "unload", "a real adapter", "by function", "part state"):
            change(other)  # in the same thread, between two words
            with pytest.raises(UniLIPError, match="changed while"):
                list(stream)
        if order[-1:] == ["changed"] and name not in ("compile", "offload"):
            changed = copy.deepcopy(model)
            if not torch.equal(draw(changed), draw(model)):
                wrong.append(f"{name}: a copy draws something else")
    for made in (copy.deepcopy(fresh_model()), pickle.loads(pickle.dumps(fresh_model()))):
        made.to(torch.float32).generate("a", **LATENT)
        assert type(pickle.loads(pickle.dumps(made.dit))) is type(copy.deepcopy(made.dit)) is type(made.dit)
        assert made.dit.runtime is made.runtime  # so the copy's parts wait for the copy
    assert not wrong, "\n".join(wrong)


def test_an_open_stream_keeps_its_part_and_nobody_waiting(fresh_model: Callable[..., UniLIP]) -> None:
    """The words of an answer may be taken in any thread, between other work, and never."""
    model = fresh_model().enable_cpu_offload("cpu")
    stream, found = model.ask(None, "What?", max_new_tokens=30, stream=True), []
    expected = list(fresh_model().ask(None, "What?", max_new_tokens=30, stream=True))
    found.append(next(stream))
    thread = threading.Thread(target=lambda: (model.generate("a", **LATENT), found.extend(stream)))
    thread.start()
    thread.join(60)
    assert found == expected and not thread.is_alive()
    assert model.runtime.offload is not None and model.runtime.offload.present == set()


def test_logits_that_are_no_numbers_are_an_error_that_names_the_answer(
    fresh_model: Callable[..., UniLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = []
    for value in (float("nan"), float("inf"), float("-inf")):
        for temperature in (0.0, 1.0):
            for after in (0, 2):
                model, calls = fresh_model(), []
                logits = model.mllm.logits

                def spoiled(hidden: Tensor, value: float = value, after: int = after, calls: list[int] = calls,
                            logits: Any = logits) -> Tensor:  # fmt: skip
                    found: Tensor = logits(hidden).clone()
                    calls.append(1)
                    if len(calls) > after:
                        found[-1, 3] = value
                    return found

                monkeypatch.setattr(model.mllm, "logits", spoiled)
                for question, stream in ((["a", "b", "c"], False), ("a", False), ("a", True)):
                    calls.clear()
                    try:
                        answer = model.ask(None, question, temperature=temperature, generator=0, stream=stream)
                        wrong.append(f"{value} {temperature} {after}: {list(answer)}")
                    except UniLIPError as error:
                        words = ["mllm", "NaN or infinite", "float32"] + ["answer 3 of 3"] * isinstance(question, list)
                        if not all(word in str(error) for word in words):
                            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


# --- precision --------------------------------------------------------------------------------------------------------


def test_what_is_no_number_is_an_error_that_names_the_part_and_its_precision(
    fresh_model: Callable[..., UniLIP], picture: Callable[..., Image.Image]
) -> None:
    wrong = []
    spoil: dict[str, Callable[[UniLIP], Tensor]] = {
        "encoder": lambda m: m.encoder.projector[1].weight,
        "latent_head": lambda m: m.latent_head.out[1].weight,
        "pixel_decoder": lambda m: m.pixel_decoder.decoder.conv_in.weight,
        "mllm": lambda m: m.mllm.language_model.model.norm.weight,
        "dit": lambda m: m.dit.transformer.proj_out.weight,
    }
    for part, weight in spoil.items():
        for dtype, value in ((torch.float32, float("nan")), (torch.float16, 6e4)):
            model = fresh_model().to(dtype)
            with torch.no_grad():
                if dtype == torch.float32:
                    weight(model).view(-1)[0] = value
                else:
                    weight(model).copy_(weight(model).sign() * value)  # overflows
            calls: dict[str, Callable[[], Any]] = {
                "reconstruct": lambda m=model: m.reconstruct(picture()),
                "edit": lambda m=model: m.edit(picture(), "blue", num_inference_steps=2, progress=False),
            }
            if part in ("latent_head", "pixel_decoder"):
                del calls["edit"]
            if part in ("mllm", "dit"):
                del calls["reconstruct"]
            for name, call in calls.items():
                try:
                    call()
                    wrong.append(f"{part} {dtype} {name}: a picture")
                except UniLIPError as error:
                    if not all(word in str(error) for word in ("NaN", part, str(dtype)[6:])):
                        wrong.append(f"{part} {dtype} {name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_parts_may_have_different_precisions(
    fresh_model: Callable[..., UniLIP], tiny_model: UniLIP, picture: Callable[..., Image.Image]
) -> None:
    def everything(model: UniLIP) -> list[Tensor]:
        settings: dict[str, Any] = LATENT | {"output_type": "pt", "generator": 0}
        return [
            model.generate("a star", **settings).images,
            model.edit(picture(), "blue", **settings).images,
            model.reconstruct(picture(), output_type="pt").images,
            model.decode(model.encode(picture()), output_type="pt").images,
        ]

    wrong, expected = [], everything(tiny_model)
    for rest in (torch.float16, torch.bfloat16):
        for part in tiny_model.parts:
            model = fresh_model().to(rest)
            model.get_submodule(part).float()
            try:
                for ours, exact in zip(everything(model), expected, strict=True):
                    if not (ours - exact).abs().mean() < 0.05:
                        wrong.append(f"{part} float32, the rest {rest}: {(ours - exact).abs().mean():.2f}")
                model.ask(picture(), "What?", max_new_tokens=2)
            except Exception as error:
                wrong.append(f"{part} float32, the rest {rest}: {type(error).__name__} {error}")
    assert not wrong, "\n".join(wrong)


# --- parts that come and go -------------------------------------------------------------------------------------------


def test_a_model_whose_parts_come_and_go_does_all_that_any_other_does(
    tiny_folder: Path, tiny_model: UniLIP, fresh_model: Callable[..., UniLIP], picture: Callable[..., Image.Image]
) -> None:
    from unilip.emoji.score import fingerprint

    p, red = tiny_model.processor, picture()
    assert p is not None
    features = tiny_model.encode(red)
    latent, pixels = tiny_model.to_latent(features).detach(), to_pixels([red])
    both = p.tokenize([p.generate_text(None), p.generate_text("a")])
    noise, level = torch.ones(1, 32, 2, 2), torch.tensor([0.5])
    calls: dict[str, Callable[[UniLIP], Any]] = {
        "encode": lambda m: m.encode(red),
        "features": lambda m: m.features(pixels),
        "decode": lambda m: torch.cat([m.decode(v, output_type="pt").images for v in (features, latent)]),
        "to_latent": lambda m: m.to_latent(features),
        "from_latent": lambda m: m.from_latent(latent),
        "condition": lambda m: m.condition(p.tokenize([p.edit_text("blue")]), features)[0],
        "draw": lambda m: m.draw(both, noise, 3, 2.0),
        "flow_loss": lambda m: m.flow_loss(p.tokenize([p.generate_text("a")]), pixels, noise, level),
        "tokenizer_loss": lambda m: m.tokenizer_loss(pixels, pixels.sigmoid(), tiny_model.encoder),
        "edit": lambda m: m.edit(red, "blue", generator=0, **LATENT).images,
        "ask": lambda m: m.ask(red, ["What?", "Why?"], max_new_tokens=5),
        "stream": lambda m: "".join(m.ask(red, "What?", max_new_tokens=5, stream=True)),
        "fingerprint": fingerprint,
        "dtype and device": lambda m: (m.dtype, m.device),
        "a deep copy": lambda m: copy.deepcopy(m).encode(red),
    }
    models = {"low_memory": UniLIP.from_pretrained(tiny_folder, low_memory=True), "offload": fresh_model()}
    models["offload"].enable_cpu_offload("cpu")
    wrong = []
    for kind, model in models.items():
        with torch.no_grad():
            for name, call in calls.items():
                a, b = call(model), call(tiny_model)
                if not (apart(a, b) < 1e-5 if isinstance(b, Tensor) else a == b):
                    wrong.append(f"{kind} {name}: {a} for {b}")
        assert model.runtime.offload is not None and model.runtime.offload.present == set()
    assert not wrong, "\n".join(wrong)


# --- without the libraries that prove it ------------------------------------------------------------------------------

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
import unilip
from PIL import Image
from unilip import cli
Image.new("RGB", (112, 112), "red").save("red.png")
for words in (
    ["generate", "a star", "--steps", "2", "--output", "star.png"],
    ["edit", "red.png", "make it blue", "--steps", "2", "--output", "blue.png"],
    ["ask", "red.png", "What is it?"],
    ["reconstruct", "red.png", "--output", "again.png"],
):
    assert cli.main(words) == 0, words
from unilip.emoji.art import Atlas
from unilip.emoji.world import World
art = Atlas.synthetic(World.preset("tiny"))
Atlas.load = staticmethod(lambda *_, **__: art)  # the real one is fetched
for stage in ("clip", "instruct", "recon"):
    words = ["train", f"tiny/{stage}", "--runs", "runs", "--no-progress", "--device", "cpu", "--set", "steps=2"]
    assert cli.main(words) == 0, words
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
model = unilip.UniLIP.from_pretrained()
with Engine(model) as engine:
    assert create_app(engine, Settings("embedded", Rules())).routes
assert not {"transformers", "diffusers"} & set(sys.modules)
"""


def test_everything_runs_without_transformers_and_diffusers(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/tiny/recon/final/model.safetensors").exists()
    assert {path.name for path in tmp_path.glob("*.png")} == {"red.png", "star.png", "blue.png", "again.png"}
