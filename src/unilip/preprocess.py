"""Pictures and text -> batches of tensors: sizes, chat template, image and query slots.

In:  anything that Pillow reads (any mode, size, orientation), strings, chat messages.
Out: pixels (M,3,S,S) normalised by ImageNet's mean and standard deviation; `Tokens`: input_ids (B,T), attention_mask
     (B,T), image_slots (B,T) true where one of N features of an image goes.
Special tokens are asked of the tokenizer by name; no id is written anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unilip.config import UniLIPConfig
from unilip.errors import CheckpointError, ImageError, PromptError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NEEDED_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, TURN_START, TURN_END)
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
MAX_PROMPT_CHARACTERS = 8_000

ImageLike = Image.Image | np.ndarray | Tensor | str | os.PathLike[str]
Fit = Literal["resize", "crop", "pad"]
FITS = ("resize", "crop", "pad")


# --- pictures -------------------------------------------------------------------------------------------------------


def load_image(image: ImageLike) -> Image.Image:
    """Return an upright 8-bit RGB picture of a path, Pillow image, array (H,W[,C]) or tensor ([C,]H,W).

    Arrays and tensors hold floats in [0,1] or integers in 0..255 (uint16: 0..65535). Palettes, transparency (over
    white), 16-bit and CMYK are converted; EXIF rotation is applied.

    Raises:
        ImageError: unreadable, truncated, empty, out of range, or more than 100 million pixels.
    """
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        image = _array_to_image((values.movedim(0, -1) if values.dim() == 3 else values).numpy())
    elif isinstance(image, np.ndarray):
        image = _array_to_image(image)
    elif isinstance(image, (str, os.PathLike)):
        image = _open(Path(image))
    if not isinstance(image, Image.Image):
        raise ImageError(f"Expected a path, a Pillow image, an array or a tensor, not {type(image).__name__}.")
    check_size(*image.size)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # whatever the decoder of a format raises for a broken file
        raise ImageError(
            f"The image cannot be decoded ({error}); it may be truncated. Give a whole PNG or JPEG."
        ) from error


def check_size(width: int, height: int) -> None:
    """Refuse empty and gigantic pictures before they are decoded."""
    if width < 1 or height < 1:
        raise ImageError(f"The image is {width}x{height} px; both sides must be at least 1.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"The image is {width}x{height} px; at most {MAX_SIDE} px a side and {MAX_PIXELS // 1_000_000} million in "
            "all are read. Scale it down first."
        )


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise ImageError(f"There is no image file {path}; check the path.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large to decode ({error}); scale it down first.") from error
    except Exception as error:
        raise ImageError(f"{path} is not an image that can be read (PNG, JPEG, WebP, ...).") from error


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"An image array must be (H,W), (H,W,3) or (H,W,4), not {array.shape}.")
    if array.dtype == np.uint16:
        array = array / 65535
    elif array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise ImageError(f"The image array holds integers from {array.min()} to {array.max()}; allowed: 0 to 255.")
        return Image.fromarray(array.astype(np.uint8))
    elif array.dtype.kind not in "fb":
        raise ImageError(f"The image array holds {array.dtype}; give uint8, or floats in [0,1].")
    return Image.fromarray(_unit_to_bytes(array))


def _unit_to_bytes(array: np.ndarray) -> np.ndarray:
    """Map [0,1] to 0..255; a little overshoot, as resizing makes it, is clipped, another range is refused."""
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("The image array holds NaN or infinite values; give uint8, or floats in [0,1].")
    if low < -0.5 or high > 1.5:
        raise ImageError(f"The image array holds values from {low:g} to {high:g}; give uint8, or floats in [0,1].")
    return (np.clip(array, 0, 1) * 255).round().astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit greys; Pillow's own conversion clips them
        grey = np.asarray(image, dtype=np.float64)
        high = grey.max()
        top = 65535 if image.mode != "F" or high > 255 else 255 if high > 1.5 else 1
        image = Image.fromarray(_unit_to_bytes(grey / top))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int, fit: Fit = "resize") -> Image.Image:
    """Make an RGB picture `size` x `size`: "resize" stretches, "crop" keeps the centre, "pad" adds a white border."""
    if fit not in FITS:
        raise ImageError(f"There is no way to fit an image called {fit!r}; allowed: {', '.join(FITS)}.")
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if fit == "pad":
        left, top, right, bottom = _inner_box(image.size, size)
        square = Image.new("RGB", (size, size), "white")
        square.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        return square
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _inner_box(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Return the centred box (left, top, right, bottom) of a picture of `size` scaled to fit a square of `side` px."""
    longest = max(size)
    width, height = (max(1, round(length * side / longest)) for length in size)
    left, top = (side - width) // 2, (side - height) // 2
    return left, top, left + width, top + height


def unfit_square(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Undo `fit_square`: return the square picture at the aspect ratio of `size` (width, height), without enlarging it.

    "resize" stretches back and "pad" cuts the border off; what "crop" removed cannot come back, so it stays square.
    """
    if fit == "crop" or size[0] == size[1]:
        return image
    left, top, right, bottom = _inner_box(size, image.width)
    if fit == "pad":
        return image.crop((left, top, right, bottom))
    return image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Normalise equally sized RGB pictures: -> (M,3,H,W) float32."""
    array = np.stack([np.asarray(image, dtype=np.uint8) for image in images])  # M H W 3
    return normalise(torch.from_numpy(array).movedim(-1, 1).float() / 255)


def normalise(pixels: Tensor) -> Tensor:
    """Map (...,3,H,W) from [0,1] to ImageNet-normalised values."""
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def unnormalise(pixels: Tensor) -> Tensor:
    """Map (...,3,H,W) from ImageNet-normalised values to [0,1]."""
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels * std + mean


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn (M,3,H,W) in [0,1] into Pillow pictures; NaN becomes black."""
    array = pixels.detach().float().nan_to_num(0).clamp(0, 1).mul(255).round().byte().movedim(1, -1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def tile_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Choose columns and rows, at most `max_tiles` in all, whose ratio is nearest to the picture's.

    Of grids with the same ratio (1x1, 2x2, ...) the largest is taken that the picture fills to more than half.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        filled = width * height > 0.5 * size**2 * columns * rows
        if distance < nearest or (distance == nearest and filled):
            best, nearest = (columns, rows), distance
    return best


def tile(image: Image.Image, size: int, max_tiles: int) -> list[Image.Image]:
    """Cut an RGB picture into up to `max_tiles` squares of `size` px at the nearest aspect ratio, plus a thumbnail.

    This is InternVL's dynamic resolution for understanding. One tile means the plain resized picture.
    """
    columns, rows = tile_grid(image.width, image.height, size, max_tiles)
    if columns * rows == 1:
        return [fit_square(image, size)]
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    return [*tiles, fit_square(image, size)]


# --- text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A batch of prompts; `image_slots` marks the positions that take image features, in order."""

    input_ids: Tensor
    attention_mask: Tensor
    image_slots: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        """Move all three tensors."""
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device), self.image_slots.to(device))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: `role` is "user" or "assistant".

    Its pictures come before the text; `squares` holds one number for each: how many squares it was cut into.
    """

    role: str
    text: str
    squares: tuple[int, ...] = ()


def check_prompt(prompt: object, what: str = "prompt") -> str:
    """Return a prompt stripped of surrounding space, or say what is wrong with it."""
    if not isinstance(prompt, str):
        raise PromptError(f"The {what} must be a string, not {type(prompt).__name__}.")
    text = prompt.strip()
    if not text:
        raise PromptError(f"The {what} is empty; say in words what you want.")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PromptError(
            f"The {what} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are read. Shorten it."
        )
    reserved = ", ".join(token for token in (*NEEDED_TOKENS, TEXT_END) if token in text)
    if reserved:
        raise PromptError(f"The {what} contains {reserved}, which the model reserves for itself; leave it out.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"The {what} contains half of a surrogate pair, which is no character; send valid Unicode.")
    return text


class Processor:
    """Tokenizer and picture size of one model: builds every batch that the model reads."""

    def __init__(self, tokenizer: Any, config: UniLIPConfig) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in NEEDED_TOKENS if t not in vocabulary]
        if missing:
            raise CheckpointError(
                f"The tokenizer lacks {', '.join(missing)}; use the tokenizer files of the checkpoint itself."
            )
        if len(tokenizer) > config.text.vocab_size:
            raise CheckpointError(
                f"The tokenizer has {len(tokenizer)} tokens, the model {config.text.vocab_size}; they do not belong "
                "together."
            )
        self.tokenizer = tokenizer
        self.config = config
        self.image_size = config.image_size
        self.num_image_tokens = config.num_image_tokens
        self.max_tokens = config.text.max_positions - config.num_queries
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
        self.end_id: int = tokenizer.convert_tokens_to_ids(TURN_END)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], config: UniLIPConfig) -> Processor:
        """Read the tokenizer files of a checkpoint folder."""
        # with a tokenizer.json nothing else needs to be guessed from the folder's config.json
        if (Path(folder) / "tokenizer.json").exists():
            from transformers import PreTrainedTokenizerFast as Kind
        else:
            from transformers import AutoTokenizer as Kind
        try:
            tokenizer = Kind.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing more special
            raise CheckpointError(f"{folder} holds no readable tokenizer ({str(error).splitlines()[0]}).") from error
        return cls(tokenizer, config)

    def resized(self, image_size: int | None) -> Processor:
        """Return a processor for another square size in pixels (a multiple of 28), or itself for None."""
        if image_size is None or image_size == self.image_size:
            return self
        return Processor(self.tokenizer, self.config.replace(image_size=image_size))

    # prompts: the exact texts of the released models (no system turn)

    def image_text(self, squares: int = 1) -> str:
        """Return the text that stands for one picture: start, N context slots for each of its squares, end."""
        return f"{IMG_START}{IMG_CONTEXT * (self.num_image_tokens * squares)}{IMG_END}"

    @staticmethod
    def _request(user: str) -> str:
        return f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n{IMG_START}"

    def generate_text(self, prompt: str | None) -> str:
        """Return the generation prompt; None gives the unconditional one."""
        return self._request("Generate an image." if prompt is None else f"Generate an image: {prompt}")

    def edit_text(self, instruction: str | None) -> str:
        """Return the editing prompt with slots for the source picture; None gives the unconditional one."""
        head = "Edit the image." if instruction is None else f"Edit the image: {instruction}"
        return self._request(f"{head}\n{self.image_text()}")

    def chat_text(self, messages: Sequence[Message], *, open_turn: bool = True) -> str:
        """Return a conversation in the chat template, ending with an open assistant turn unless told otherwise."""
        turns = []
        for message in messages:
            if message.role not in ("user", "assistant"):
                raise PromptError(f"A message has the role {message.role!r}; allowed: user, assistant.")
            images = "".join(f"{self.image_text(squares)}\n" for squares in message.squares)
            turns.append(f"{TURN_START}{message.role}\n{images}{message.text}{TURN_END}\n")
        return "".join(turns) + (f"{TURN_START}assistant\n" if open_turn else "")

    def tokenize(self, texts: Sequence[str], padding_side: Literal["left", "right"] = "left") -> Tokens:
        """Tokenize and pad prompts: -> `Tokens` of (B,T).

        Raises:
            PromptError: a prompt is longer than the model's positions allow.
        """
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = max(len(row) for row in rows)
        if length > self.max_tokens:
            raise PromptError(
                f"The prompt has {length} tokens; this model reads at most {self.max_tokens}. Shorten it."
            )
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.long)
            mask[i, place] = 1
        return Tokens(ids, mask, (ids == self.image_id) & mask.bool())

    def decode(self, ids: Tensor) -> list[str]:
        """Turn generated ids (B,T) into stripped text."""
        rows = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in rows]

    def pixels(self, images: Sequence[ImageLike], fit: Fit = "resize") -> Tensor:
        """Load, fit and normalise pictures: -> (M,3,S,S)."""
        return to_pixels([fit_square(load_image(image), self.image_size, fit) for image in images])
