"""The model as a library: any wrong type is an error of ours, weights may change between calls, precisions may differ.

Each call of a table is given values of every kind; it may take them, or refuse them by a `UniLIPError`, and nothing else.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unilip import UniLIP, UniLIPConfig, preset
from unilip.errors import UniLIPError
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
        "using": lambda v: model.using(v),
        "load_adapter": lambda v: one.load_adapter(v),
        "set_adapters": lambda v: one.set_adapters(v),
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
    for name in ("dtype", "device", "parts", "quantization", "low_memory"):
        calls[f"from_pretrained {name}"] = lambda v, n=name: UniLIP.from_pretrained("nowhere", **{n: v})
    for name in ("dtype", "max_shard_size"):
        calls[f"save_pretrained {name}"] = lambda v, n=name: one.save_pretrained("saved", **{n: v})
    for name in UniLIPConfig.__dataclass_fields__:
        calls[f"config {name}"] = lambda v, n=name: config.replace(**{n: v})
    for name in ["height", "width", "generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict"]:
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
