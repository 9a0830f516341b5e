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

import torch
from torch import Tensor

from unilip.config import UniLIPConfig
from unilip.errors import CheckpointError, PromptError
from unilip.pictures import FITS as FITS
from unilip.pictures import IMAGENET_MEAN as IMAGENET_MEAN
from unilip.pictures import IMAGENET_STD as IMAGENET_STD
from unilip.pictures import MAX_SIDE as MAX_SIDE
from unilip.pictures import Fit as Fit
from unilip.pictures import ImageLike as ImageLike
from unilip.pictures import fit_square as fit_square
from unilip.pictures import load_image as load_image
from unilip.pictures import normalise as normalise
from unilip.pictures import tile as tile
from unilip.pictures import tile_grid as tile_grid
from unilip.pictures import to_images as to_images
from unilip.pictures import to_pixels as to_pixels
from unilip.pictures import unfit_square as unfit_square

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NEEDED_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, TURN_START, TURN_END)
MAX_PROMPT_CHARACTERS = 8_000

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
