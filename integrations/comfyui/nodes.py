"""The nodes: load a model; generate, edit, ask and reconstruct with it.

In and out, as everywhere in ComfyUI: an IMAGE is a tensor (B,H,W,3) in [0,1], a STRING is text. What a node computes is
what `unilip.UniLIP` computes with the same arguments; picture i of a node is drawn with seed `seed` + i.
ComfyUI itself is imported where it is used and may be absent, so that the nodes can be tested without it.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unilip import UniLIP, UniLIPError
from unilip.pictures import fit_square, load_image

CATEGORY = "UniLIP"
EMBEDDED = "embedded"
RELEASED = ("kanashi6/UniLIP-1B", "kanashi6/UniLIP-3B")
FOLDER = "unilip"  # under ComfyUI's models/: each folder in it is a checkpoint
FITS = ("resize", "crop", "pad")
OWN = "model's own"


def comfy(module: str) -> Any:
    """Return a module of ComfyUI, or None where there is no ComfyUI."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def checkpoints() -> dict[str, Path]:
    """Return the checkpoints in models/unilip by name."""
    paths = comfy("folder_paths")
    root = Path(paths.models_dir) / FOLDER if paths else None
    found = sorted(root.iterdir()) if root and root.is_dir() else []
    return {path.name: path for path in found if path.is_dir() or path.suffix in (".safetensors", ".pth", ".bin")}


def device_of(name: str) -> torch.device:
    """Return the device that ComfyUI uses for "auto", else the named one."""
    if name != "auto":
        return torch.device(name)
    management = comfy("comfy.model_management")
    return torch.device(management.get_torch_device() if management else "cuda" if torch.cuda.is_available() else "cpu")


def stepper(steps: int) -> Any:
    """Return a callback that moves ComfyUI's progress bar, and stops when the person pressed Cancel."""
    utils, management = comfy("comfy.utils"), comfy("comfy.model_management")
    bar = utils.ProgressBar(steps) if utils else None

    def on_step(model: UniLIP, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        if management:
            management.throw_exception_if_processing_interrupted()
        if bar:
            bar.update_absolute(step + 1, steps)

    return on_step


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator for each picture, so that a picture does not depend on how many are drawn with it."""
    return [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(count)]


def pictures(image: Tensor) -> list[Any]:
    """Turn an IMAGE (B,H,W,3) into Pillow pictures."""
    if image.dim() != 4 or image.shape[-1] not in (3, 4):
        raise UniLIPError(f"An IMAGE is (B,H,W,3), not {tuple(image.shape)}; connect a picture.")
    return [load_image(one.clamp(0, 1).cpu().numpy()) for one in image]


def to_image(pixels: Tensor) -> Tensor:
    """Turn pixels (B,3,H,W) into an IMAGE (B,H,W,3), float32 on the CPU."""
    return pixels.movedim(1, -1).float().cpu().contiguous()


def drawing() -> dict[str, Any]:
    """The inputs that drawing and editing share."""
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
        "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
        "guidance_scale": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 30.0,
                "step": 0.1,
                "tooltip": "0 is the model's own, 1 is off",
            },
        ),
        "solver": ([OWN, "dpm++", "euler", "unipc"],),
        "count": ("INT", {"default": 1, "min": 1, "max": 64}),
    }


def settings(steps: int, guidance_scale: float, solver: str, negative: str) -> dict[str, Any]:
    """Turn a node's inputs into arguments of the model; what is left at the model's own is not among them."""
    named = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale or None,
        "solver": None if solver == OWN else solver,
        "negative_prompt": negative.strip() or None,
    }
    return {key: value for key, value in named.items() if value is not None} | {
        "output_type": "pt", "callback_on_step_end": stepper(steps), "progress": False,
    }  # fmt: skip


class Load:
    """Load the embedded model, a checkpoint of models/unilip, or a released one."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("UNILIP",), ("model",)
    DESCRIPTION = "A UniLIP model. The embedded one is tiny and knows emoji scenes only; it needs no download."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The choices; folders are looked up each time the page is loaded."""
        return {
            "required": {
                "model": ([EMBEDDED, *checkpoints(), *RELEASED],),
                "device": (["auto", "cpu", "cuda", "mps"],),
                "dtype": (["float32", "bfloat16", "float16", "auto"],),
            }
        }

    def load(self, model: str, device: str, dtype: str) -> tuple[UniLIP]:
        """Return the model; ComfyUI keeps it until an input changes."""
        known: dict[str, Any] = {EMBEDDED: None, **checkpoints(), **{name: name for name in RELEASED}}
        if model not in known:
            raise UniLIPError(f"There is no model {model!r}; put its folder into models/{FOLDER} and reload the page.")
        return (UniLIP.from_pretrained(known[model], dtype=dtype, device=device_of(device)),)


class Generate:
    """Draw pictures from words."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Draw pictures from words. Picture i uses seed + i."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs and their limits."""
        return {
            "required": {
                "model": ("UNILIP",),
                "prompt": ("STRING", {"multiline": True, "default": "three yellow stars"}),
                **drawing(),
            },
            "optional": {"negative_prompt": ("STRING", {"multiline": True, "default": ""})},
        }

    def generate(
        self, model: UniLIP, prompt: str, seed: int, steps: int, guidance_scale: float, solver: str, count: int,
        negative_prompt: str = "",
    ) -> tuple[Tensor]:  # fmt: skip
        """Return (count,S,S,3)."""
        drawn = model.generate(
            prompt, num_images_per_prompt=count, generator=seeded(seed, count),
            **settings(steps, guidance_scale, solver, negative_prompt),
        )  # fmt: skip
        return (to_image(drawn.images),)


class Edit:
    """Change pictures as told."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Change each picture as told, `count` times. Result i uses seed + i."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs and their limits."""
        return {
            "required": {
                "model": ("UNILIP",),
                "image": ("IMAGE",),
                "instruction": ("STRING", {"multiline": True, "default": "change the background to pink"}),
                **drawing(),
                "fit": (list(FITS),),
            },
            "optional": {"negative_prompt": ("STRING", {"multiline": True, "default": ""})},
        }

    def edit(
        self, model: UniLIP, image: Tensor, instruction: str, seed: int, steps: int, guidance_scale: float,
        solver: str, count: int, fit: str, negative_prompt: str = "",
    ) -> tuple[Tensor]:  # fmt: skip
        """Return (B*count,S,S,3), picture by picture."""
        sources = pictures(image)
        drawn = model.edit(
            sources, instruction, fit=fit, num_images_per_prompt=count,  # type: ignore[arg-type]
            generator=seeded(seed, len(sources) * count), **settings(steps, guidance_scale, solver, negative_prompt),
        )  # fmt: skip
        return (to_image(drawn.images),)


class Ask:
    """Answer a question about pictures, or without any."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "ask", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("answer",)
    DESCRIPTION = "Answer one question about all the pictures together; without a picture only the words count."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs and their limits."""
        return {
            "required": {
                "model": ("UNILIP",),
                "question": ("STRING", {"multiline": True, "default": "What is this?"}),
                "max_new_tokens": ("INT", {"default": 128, "min": 1, "max": 4096}),
                "temperature": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            },
            "optional": {"image": ("IMAGE",)},
        }

    def ask(
        self, model: UniLIP, question: str, max_new_tokens: int, temperature: float, seed: int,
        image: Tensor | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the answer, and show it on the node."""
        answer = model.ask(
            None if image is None else pictures(image), question, max_new_tokens=max_new_tokens,
            temperature=temperature, generator=seeded(seed, 1)[0],
        )  # fmt: skip
        return {"ui": {"text": [answer]}, "result": (answer,)}


class Reconstruct:
    """Encode pictures and draw them again."""

    CATEGORY, FUNCTION = CATEGORY, "reconstruct"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "FLOAT"), ("images", "psnr")
    DESCRIPTION = "Encode pictures to CLIP features and draw them again; psnr is their mean, in decibels."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs."""
        return {"required": {"model": ("UNILIP",), "image": ("IMAGE",), "fit": (list(FITS),)}}

    def reconstruct(self, model: UniLIP, image: Tensor, fit: str) -> tuple[Tensor, float]:
        """Return (B,S,S,3) and the mean PSNR against what the encoder saw."""
        size = model.config.image_size
        squares = [fit_square(one, size, fit) for one in pictures(image)]  # type: ignore[arg-type]
        drawn = to_image(model.reconstruct(squares, output_type="pt").images)
        seen = torch.stack([torch.from_numpy(np.array(square)) / 255 for square in squares])  # B S S 3
        errors = (drawn - seen).square().mean((1, 2, 3)).clamp_min(1e-10).tolist()
        return drawn, sum(-10 * math.log10(error) for error in errors) / len(errors)


NODE_CLASS_MAPPINGS = {
    "UniLIPLoad": Load,
    "UniLIPGenerate": Generate,
    "UniLIPEdit": Edit,
    "UniLIPAsk": Ask,
    "UniLIPReconstruct": Reconstruct,
}
NODE_DISPLAY_NAME_MAPPINGS = {name: f"UniLIP {node.__name__}" for name, node in NODE_CLASS_MAPPINGS.items()}
