"""The nodes: load a model; generate, edit, ask and reconstruct with it.

In and out, as everywhere in ComfyUI: an IMAGE is a tensor (B,H,W,3) in [0,1], a STRING is text. What a node computes is
what `unilip.UniLIP` computes with the same arguments; picture i of a node is drawn with seed `seed` + i.
ComfyUI itself is imported where it is used and may be absent, so that the nodes can be tested without it. So is the
model's code, which ComfyUI need not wait for when it starts.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unilip.errors import UniLIPError

if TYPE_CHECKING:
    from unilip import UniLIP

CATEGORY = "UniLIP"
EMBEDDED = "embedded"
RELEASED = ("kanashi6/UniLIP-1B", "kanashi6/UniLIP-3B")
FOLDER = "unilip"  # under ComfyUI's models/: each folder in it is a checkpoint
FITS = ("resize", "crop", "pad")
OWN, NONE = "model's own", "none"


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
    kinds = (".safetensors", ".pth", ".bin")
    return {p.name: p for p in found if (p.is_dir() and not is_adapter(p)) or p.suffix in kinds}


def adapters() -> dict[str, Path]:
    """Return the LoRA and DoRA adapters, folders in peft's format in models/loras and models/unilip, by name."""
    paths = comfy("folder_paths")
    roots = [Path(paths.models_dir) / name for name in ("loras", FOLDER)] if paths else []
    return {p.name: p for root in roots if root.is_dir() for p in sorted(root.iterdir()) if is_adapter(p)}


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, not a model."""
    return (path / "adapter_config.json").is_file()


def device_of(name: str) -> torch.device:
    """Return the device that ComfyUI uses for "auto", else the named one.

    Raises:
        UniLIPError: it is not there.
    """
    from unilip.machine import choose_device

    management = comfy("comfy.model_management")
    return torch.device(management.get_torch_device() if management and name == "auto" else choose_device(name))


class Held(torch.nn.Module):
    """A model as ComfyUI's memory management moves it, which writes down where it is."""

    def __init__(self, model: UniLIP) -> None:
        super().__init__()
        self.model, self.device = model, model.device


def manage(model: UniLIP, device: torch.device) -> UniLIP:
    """Give a model into ComfyUI's memory management: it stays on the CPU until a node works with it."""
    management, patcher = comfy("comfy.model_management"), comfy("comfy.model_patcher")
    if management and patcher:
        held = Held(model.to("cpu"))
        model.__dict__["patcher"] = patcher.ModelPatcher(held, device, torch.device("cpu"))
    return model


def ready(model: UniLIP) -> UniLIP:
    """Have a model on its device, for which ComfyUI may move others away."""
    patcher = model.__dict__.get("patcher")
    if patcher is not None:
        comfy("comfy.model_management").load_models_gpu([patcher], force_full_load=True)
    return model


class Bar:
    """ComfyUI's progress bar, which also stops the work when the person pressed Cancel."""

    def __init__(self, total: int) -> None:
        utils = comfy("comfy.utils")
        self.total, self.bar = total, utils.ProgressBar(total) if utils else None

    def move(self, done: int) -> None:
        """Show how much is done, or stop."""
        if management := comfy("comfy.model_management"):
            management.throw_exception_if_processing_interrupted()
        if self.bar:
            self.bar.update_absolute(done, self.total)

    def on_step(self, model: UniLIP, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        """Move on by a step of the sampler."""
        self.move(step + 1)


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator for each picture, so that a picture does not depend on how many are drawn with it."""
    return [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(count)]


def pictures(image: Tensor) -> list[Any]:
    """Turn an IMAGE (B,H,W,3) into Pillow pictures."""
    from unilip.pictures import load_image

    if image.dim() != 4 or image.shape[-1] not in (3, 4) or not len(image):
        raise UniLIPError(f"An IMAGE is (B,H,W,3), not {tuple(image.shape)}; connect a picture.")
    return [load_image(one.movedim(-1, 0).clamp(0, 1)) for one in image]


def to_image(pixels: Tensor) -> Tensor:
    """Turn pixels (B,3,H,W) into an IMAGE (B,H,W,3), float32 on the CPU."""
    return pixels.movedim(1, -1).float().cpu().contiguous()


def from_pictures(images: Sequence[Any]) -> Tensor:
    """Turn Pillow pictures of one size into an IMAGE."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255


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


def sides() -> dict[str, Any]:
    """The inputs for the size of what is drawn."""
    about: dict[str, Any] = {"default": 0, "min": 0, "max": 8960, "step": 28}
    about["tooltip"] = "0: the source's shape, without a source the model's own; rounded to a multiple of 28"
    return {"width": ("INT", about), "height": ("INT", about)}


def settings(steps: int, guidance_scale: float, solver: str, negative: str, width: int, height: int) -> dict[str, Any]:
    """Turn a node's inputs into arguments of the model; what is left at the model's own is not among them."""
    named = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale or None,
        "solver": None if solver == OWN else solver,
        "negative_prompt": negative.strip() or None,
        "width": width or None,
        "height": height or None,
    }
    return {key: value for key, value in named.items() if value is not None} | {
        "output_type": "pt", "callback_on_step_end": Bar(steps).on_step, "progress": False,
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
            },
            "optional": {
                "lora": ([NONE, *adapters()],),
                "lora_strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
        }

    def load(
        self, model: str, device: str, dtype: str, lora: str = NONE, lora_strength: float = 1.0
    ) -> tuple[UniLIP]:  # fmt: skip
        """Return the model, with an adapter beside its weights; ComfyUI keeps it until an input changes."""
        from unilip import UniLIP

        known: dict[str, Any] = {EMBEDDED: None, **checkpoints(), **{name: name for name in RELEASED}}
        if model not in known:
            raise UniLIPError(f"There is no model {model!r}; put its folder into models/{FOLDER} and reload the page.")
        if lora != NONE and lora not in adapters():
            raise UniLIPError(f"There is no LoRA {lora!r}; put its folder into models/loras and reload the page.")
        where = device_of(device)
        loaded = UniLIP.from_pretrained(known[model], dtype=dtype, device=where)
        if lora != NONE:
            loaded.load_adapter(adapters()[lora], "lora", lora_strength)
        return (manage(loaded, where),)


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
            "optional": {"negative_prompt": ("STRING", {"multiline": True, "default": ""}), **sides()},
        }

    def generate(
        self, model: UniLIP, prompt: str, seed: int, steps: int, guidance_scale: float, solver: str, count: int,
        negative_prompt: str = "", width: int = 0, height: int = 0,
    ) -> tuple[Tensor]:  # fmt: skip
        """Return (count,H,W,3)."""
        drawn = ready(model).generate(
            prompt, num_images_per_prompt=count, generator=seeded(seed, count),
            **settings(steps, guidance_scale, solver, negative_prompt, width, height),
        )  # fmt: skip
        return (to_image(drawn.images),)


class Edit:
    """Change pictures as told."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = (
        "Change each picture as told, `count` times. Result i uses seed + i. All pictures of `image2` help with each "
        "change (a joint edit), which a model must have learned."
    )

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
            "optional": {
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "keep_aspect": ("BOOLEAN", {"default": True, "tooltip": "give the result the shape of its source"}),
                **sides(),
                "image2": ("IMAGE",),
            },
        }

    def edit(
        self, model: UniLIP, image: Tensor, instruction: str, seed: int, steps: int, guidance_scale: float,
        solver: str, count: int, fit: str, negative_prompt: str = "", keep_aspect: bool = True, width: int = 0,
        height: int = 0, image2: Tensor | None = None,
    ) -> tuple[Tensor]:  # fmt: skip
        """Return (B*count,H,W,3), picture by picture."""
        sources, others = pictures(image), [] if image2 is None else pictures(image2)
        seeds = seeded(seed, len(sources) * count)
        given = settings(steps, guidance_scale, solver, negative_prompt, width, height) | {"output_type": "pil"}
        given |= {"fit": fit, "num_images_per_prompt": count, "keep_aspect": keep_aspect and not (width or height)}
        edit = ready(model).edit
        if not others:
            return (from_pictures(edit(sources, instruction, generator=seeds, **given).images),)
        drawn = [
            edit([one, *others], instruction, joint=True, generator=seeds[i * count : (i + 1) * count], **given).images
            for i, one in enumerate(sources)
        ]
        return (from_pictures([image for images in drawn for image in images]),)


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
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": False}),
            },
            "optional": {"image": ("IMAGE",)},
        }

    def ask(
        self, model: UniLIP, question: str, max_new_tokens: int, temperature: float, seed: int,
        image: Tensor | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the answer; connect it to ComfyUI's PreviewAny to read it."""
        pieces = ready(model).ask(
            None if image is None else pictures(image), question, max_new_tokens=max_new_tokens,
            temperature=temperature, generator=seeded(seed, 1)[0], stream=True,
        )  # fmt: skip
        bar, said = Bar(max_new_tokens), []
        for piece in pieces:
            said.append(piece)
            bar.move(min(len(said), max_new_tokens))
        answer = "".join(said).strip()
        return {"ui": {"text": [answer]}, "result": (answer,)}


class Reconstruct:
    """Encode pictures and draw them again."""

    CATEGORY, FUNCTION = CATEGORY, "reconstruct"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "FLOAT"), ("images", "psnr")
    DESCRIPTION = "Encode pictures to CLIP features and draw them again; psnr is their mean, in decibels."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs."""
        return {"required": {"model": ("UNILIP",), "image": ("IMAGE",), "fit": (list(FITS),)}, "optional": sides()}

    def reconstruct(
        self, model: UniLIP, image: Tensor, fit: str, width: int = 0, height: int = 0
    ) -> tuple[Tensor, float]:
        """Return (B,H,W,3) and the mean PSNR against what the encoder saw."""
        from unilip.pictures import fit_picture

        given: dict[str, Any] = {"fit": fit, "width": width or None, "height": height or None}
        sources = pictures(image)
        drawn = to_image(ready(model).reconstruct(sources, output_type="pt", **given).images)
        size = (drawn.shape[2], drawn.shape[1])
        seen = from_pictures([fit_picture(one, size, fit) for one in sources])  # type: ignore[arg-type]
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
