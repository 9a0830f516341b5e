"""UniLIP behind the interface of a diffusers pipeline, for programs that already speak it.

    pipe = UniLIPPipeline.from_pretrained(...).to("cuda")
    pipe("three yellow stars", num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]
    pipe("change the background to pink", image=picture).images[0]
    pipe("put the hat of picture 2 on the cat", image=[cat, hat], joint=True).images[0]

In: a prompt, or an instruction and a picture. Out: an object with `.images`. The pipeline holds a `UniLIP` and adds no
computation of its own; answering and reconstructing are `pipe.model.ask` and `pipe.model.reconstruct`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unilip import adapters
from unilip.checkpoints.write import push_model
from unilip.errors import LARGEST, UniLIPError, check_flag, check_number
from unilip.fast.loop import Settings
from unilip.method.config import UniLIPConfig
from unilip.model import ImageOutput, UniLIP, check_progress
from unilip.pictures import Fit, ImageLike
from unilip.sampling import Generators, Progress, Stopped

logger = logging.getLogger(__name__)
IGNORED = ("low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "safety_checker")  # options of diffusers
TENSOR_INPUTS = ("latents",)  # what a callback can be given and can replace
PipelineCallback = Callable[["UniLIPPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class UniLIPPipeline:
    """A UniLIP that is called like a `diffusers.DiffusionPipeline`: a prompt draws, a prompt and a picture edit."""

    def __init__(self, model: UniLIP) -> None:
        self.model = model
        self._interrupt = False
        self.num_timesteps = 0  # of the last call
        self._progress_bar_config: Progress = {}
        self._scales: dict[str, float] = {}  # of adapters that `disable_lora` switched off

    def __repr__(self) -> str:
        model = self.model
        return f"{type(self).__name__}({model.config.name}: {', '.join(model.parts)}; {model.dtype} on {model.device})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> UniLIPPipeline:
        """Load a model as `UniLIP.from_pretrained` does, whose `options` these are; `IGNORED` change nothing here.

        `torch_dtype` and `device_map` (one device, "auto" or "balanced") are other names of `dtype` and `device`.
        Raises UniLIPError: an unknown option, or two that contradict each other; or what loading raises.
        """
        if None not in (dtype, torch_dtype) and dtype != torch_dtype:
            raise UniLIPError(f"dtype is {dtype} and torch_dtype {torch_dtype}; give one of the two.")
        if None not in (device, device_map):
            raise UniLIPError(f"device is {device!r} and device_map {device_map!r}; give one of the two.")
        if isinstance(device_map, Mapping):
            places = set(map(str, device_map.values()))
            if len(places) != 1:
                raise UniLIPError(f"device_map is {device_map!r}; this model stays together, so give one device.")
            device_map = places.pop()
        if ignored := sorted(set(options) & set(IGNORED)):
            logger.warning("ignored, since they change nothing here: %s", ", ".join(ignored))
        given = {name: value for name, value in options.items() if name not in IGNORED}
        if device_map is not None:
            device = "auto" if device_map == "balanced" else device_map
        return cls(
            UniLIP.from_pretrained(source, dtype=torch_dtype if dtype is None else dtype, device=device, **given)
        )

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder for `DiffusionPipeline.from_pretrained` and this package; options: dtype, max_shard_size."""
        self.model.save_pretrained(folder, **{"to": "diffusers", **options})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; `options`: dtype, private, token, revision, commit_message."""
        return push_model(self, repo_id, **options)

    def to(self, *args: Any, torch_dtype: torch.dtype | None = None, **kwargs: Any) -> UniLIPPipeline:
        """Move or cast the weights as `torch.nn.Module.to` does, for instance to("cuda", torch.bfloat16)."""
        self.model.to(*args, **(kwargs if torch_dtype is None else {**kwargs, "dtype": torch_dtype}))
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def config(self) -> UniLIPConfig:
        return self.model.config

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts of the model by name."""
        return {name: getattr(self.model, name) for name in self.model.parts}

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress was told to stop; a callback asks for it with `pipe._interrupt = True`."""
        return self._interrupt

    # --- memory, adapters, progress: diffusers' names for what the model does ---

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """CPU offload: keep the weights in main memory and bring each part to a device only while it works."""
        self.model.enable_cpu_offload(device if gpu_id is None else f"cuda:{gpu_id}")

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def enable_vae_tiling(self) -> None:
        """Decode one picture at a time, in strips: the same pixels in less memory."""
        self.model.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode pictures at once again."""
        self.model.enable_tiling(1)

    enable_vae_slicing, disable_vae_slicing = enable_vae_tiling, disable_vae_tiling

    def load_lora_weights(self, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Put a LoRA or DoRA adapter, a folder in peft's format, beside the weights; see `UniLIP.load_adapter`."""
        self.model.load_adapter(folder, adapter_name)

    def unload_lora_weights(self) -> None:
        self.model.unload_adapters()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make exactly these adapters act, each as strongly as its weight says, 1 by default."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given: Any = adapter_weights
        weights = list(given) if isinstance(given, (list, tuple)) else [given] * len(names)
        if len(weights) != len(names):
            raise UniLIPError(f"{len(weights)} weights were given for {len(names)} adapters; give one, or as many.")
        self.model.set_adapters({n: 1.0 if w is None else w for n, w in zip(names, weights, strict=True)})

    def get_active_adapters(self) -> list[str]:
        return [name for name in adapters.adapter_names(self.model) if adapters.adapter_scale(self.model, name)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters, under the name of the component that they are in."""
        names = adapters.adapter_names(self.model)
        return {"model": names} if names else {}

    def disable_lora(self) -> None:
        """Switch all adapters off until `enable_lora`."""
        scales = {name: adapters.adapter_scale(self.model, name) for name in self.get_active_adapters()}
        self.model.set_adapters({})
        self._scales = scales or self._scales

    def enable_lora(self) -> None:
        """Switch on again what `disable_lora` switched off."""
        names = adapters.adapter_names(self.model)
        scales = {name: adapters.adapter_scale(self.model, name) or self._scales.get(name) for name in names}
        self.model.set_adapters({name: scale for name, scale in scales.items() if scale})
        self._scales = {}

    def fuse_lora(self, *, lora_scale: float = 1.0) -> None:
        """Add the acting adapters to the weights, `lora_scale` times as strongly as they act, and take them off."""
        check_number("lora_scale", lora_scale, -LARGEST)
        if lora_scale != 1.0:
            names = self.get_active_adapters()
            self.set_adapters(names, [lora_scale * adapters.adapter_scale(self.model, name) for name in names])
        self.model.merge_adapters()

    def unfuse_lora(self) -> None:
        """Raise UniLIPError: a merged adapter is gone, and so are the weights from before."""
        raise UniLIPError("A merged adapter cannot be taken out again; load the model anew.")

    def set_progress_bar_config(self, **options: Any) -> None:
        """Give tqdm's arguments for the bar: disable=True for none. Raises UniLIPError: there is no such argument."""
        self._progress_bar_config = check_progress(options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageLike | Sequence[ImageLike] | None = None,
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        preset: str = "quality",
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        fit: Fit = "resize",
        joint: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS,
    ) -> ImageOutput | tuple[Any]:
        """Draw pictures of a prompt, or change `image` as the prompt says.

        Args:
            prompt: one or several. What is not named here is as in `UniLIP.generate` and `UniLIP.edit`.
            image: the picture(s) to change; without one, pictures are drawn from the words alone.
            fit, joint: of edits alone.
            return_dict: False returns a tuple whose first entry are the pictures.
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step. It may return
                {"latents": ...} to replace them; after it sets `pipe._interrupt = True` the rest of the steps is left
                out, and the picture comes back as far as it was drawn.
            callback_on_step_end_tensor_inputs: which tensors the callback is given: ("latents",) or ().

        Raises UniLIPError: a value out of range, an empty or overlong prompt, or a missing part.
        """
        named = callback_on_step_end_tensor_inputs
        if not isinstance(named, (list, tuple)) or not set(map(repr, named)) <= set(map(repr, TENSOR_INPUTS)):
            given = ", ".join(map(str, named)) if isinstance(named, (list, tuple)) else repr(named)
            raise UniLIPError(f"A callback cannot be given {given}; allowed: {', '.join(TENSOR_INPUTS)}.")
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise UniLIPError(f"callback_on_step_end is {callback_on_step_end!r}; give a function.")
        check_flag("return_dict", return_dict)
        if check_flag("joint", joint) and image is None:
            raise UniLIPError("A joint edit needs its pictures; give them as image.")

        def on_step(_: UniLIP, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Mapping[str, Tensor] | None:
            given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            result = callback_on_step_end(self, step, timestep, given) if callback_on_step_end is not None else None
            if self._interrupt:
                raise Stopped(result)
            return result

        self._interrupt = False
        settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.num_timesteps = Settings.of(self.model.config, preset, **settings).num_inference_steps
        draw = self.model.generate if image is None else partial(self.model.edit, image, fit=fit, joint=joint)
        output = draw(
            prompt, negative_prompt=negative_prompt, height=height, width=width, preset=preset,
            **settings, generator=generator,
            num_images_per_prompt=1 if num_images_per_prompt is None else num_images_per_prompt, latents=latents,
            callback_on_step_end=None if callback_on_step_end is None else on_step, output_type=output_type,
            progress=self._progress_bar_config,
        )  # fmt: skip
        return output if return_dict else (output.images,)
