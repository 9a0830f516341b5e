"""UniLIP behind the interface of a diffusers pipeline, for programs that already speak it.

    pipe = UniLIPPipeline.from_pretrained(...).to("cuda")
    pipe("three yellow stars", num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]
    pipe("change the background to pink", image=picture).images[0]

In: a prompt, or an instruction and a picture. Out: an object with `.images`. The pipeline holds a `UniLIP` and adds no
computation of its own; answering and reconstructing are `pipe.model.ask` and `pipe.model.reconstruct`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unilip.errors import UniLIPError
from unilip.method.config import UniLIPConfig
from unilip.model import ImageOutput, UniLIP
from unilip.pictures import Fit, ImageLike
from unilip.sampling import Generators, check_flag

TENSOR_INPUTS = ("latents",)  # what a callback can be given and can replace
PipelineCallback = Callable[["UniLIPPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class _Interrupted(Exception):
    """Ends the sampling early, carrying the latents as they are."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class UniLIPPipeline:
    """A UniLIP that is called like a `diffusers.DiffusionPipeline`: a prompt draws, a prompt and a picture edit."""

    def __init__(self, model: UniLIP) -> None:
        self.model = model
        self._interrupt = False
        self._progress: bool = True

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> UniLIPPipeline:
        """Load a model: nothing for the embedded one, else a folder, a file or a hub id, in any known format.

        Args:
            source: what `UniLIP.from_pretrained` takes.
            torch_dtype: of the weights in memory; float32 by default, "auto" for what is stored.
            device: where to put them; the CPU by default.

        Raises:
            CheckpointError: missing, truncated, of an unknown kind, or not exactly the weights that the model needs.
        """
        return cls(UniLIP.from_pretrained(source, dtype=torch_dtype, device=device))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model to a folder that `from_pretrained` reads."""
        self.model.save_pretrained(folder)

    def to(self, *args: Any, **kwargs: Any) -> UniLIPPipeline:
        """Move or cast the weights as `torch.nn.Module.to` does, for instance to("cuda", torch.bfloat16)."""
        self.model.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def config(self) -> UniLIPConfig:
        """Of the model."""
        return self.model.config

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts of the model by name."""
        return {name: getattr(self.model, name) for name in self.model.parts}

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress was told to stop; a callback asks for it with `pipe._interrupt = True`."""
        return self._interrupt

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """CPU offload: keep the weights in main memory and bring each part to a device only while it works."""
        self.model.enable_cpu_offload(device)

    def load_lora_weights(self, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Put a LoRA or DoRA adapter, a folder in peft's format, beside the weights; see `UniLIP.load_adapter`."""
        self.model.load_adapter(folder, adapter_name)

    def unload_lora_weights(self) -> None:
        """Take all adapters off."""
        self.model.unload_adapters()

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Show a progress bar on a terminal, or none."""
        self._progress = not disable

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageLike | Sequence[ImageLike] | None = None,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        fit: Fit = "resize",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS,
    ) -> ImageOutput | tuple[Any]:
        """Draw pictures of a prompt, or change `image` as the prompt says.

        Args:
            prompt: one or several.
            image: the picture(s) to change; without one, pictures are drawn from the words alone.
            negative_prompt: what guidance moves away from, in place of the unconditional prompt; "" means none.
            height, width: in pixels: equal, and a multiple of 28. One may be left out; the model's own without either.
            num_inference_steps, guidance_scale: the model's own when left out; guidance at or below 1 is off.
            num_images_per_prompt: pictures of each prompt; the result is ordered prompt by prompt.
            generator: one or a seed, used for the pictures in order, or a list with one for each picture.
            fit: how `image` becomes a square: "resize", "crop" or "pad".
            output_type: "pil", "np" (B,H,W,3), "pt" (B,3,H,W), both in [0,1], or "latent".
            return_dict: False returns a tuple whose first entry are the pictures.
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step. It may return
                {"latents": ...} to replace them; after it sets `pipe._interrupt = True` the rest of the steps is left
                out, and the picture comes back as far as it was drawn.
            callback_on_step_end_tensor_inputs: which tensors the callback is given: ("latents",) or ().

        Raises:
            UniLIPError: a value out of range, an empty or overlong prompt, or a missing part.
        """
        named = callback_on_step_end_tensor_inputs
        if not isinstance(named, (list, tuple)) or not set(map(repr, named)) <= set(map(repr, TENSOR_INPUTS)):
            given = ", ".join(map(str, named)) if isinstance(named, (list, tuple)) else repr(named)
            raise UniLIPError(f"A callback cannot be given {given}; allowed: {', '.join(TENSOR_INPUTS)}.")
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise UniLIPError(f"callback_on_step_end is {callback_on_step_end!r}; give a function.")
        check_flag("return_dict", return_dict)
        if height is not None and width is not None and height != width:
            raise UniLIPError(f"The picture asked for is {width}x{height} px; this model draws squares only.")

        def on_step(_: UniLIP, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Mapping[str, Tensor] | None:
            given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            result = callback_on_step_end(self, step, timestep, given) if callback_on_step_end is not None else None
            if self._interrupt:
                raise _Interrupted((result or {}).get("latents", tensors["latents"]))
            return result

        settings: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "image_size": width if height is None else height,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "generator": generator,
            "output_type": output_type,
            "callback_on_step_end": on_step if callback_on_step_end is not None else None,
            "progress": self._progress,
        }
        self._interrupt = False
        try:
            if image is None:
                output = self.model.generate(prompt, **settings)
            else:
                output = self.model.edit(image, prompt, fit=fit, **settings)
        except _Interrupted as stopped:
            output = self.model.decode(stopped.latents, output_type=output_type)
        return output if return_dict else (output.images,)
