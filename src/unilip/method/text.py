"""Words -> token ids: the prompts of the released models, the chat template, slots for pictures.

In:  strings, conversations, the number of image tokens N of a picture.
Out: `Tokens`: input_ids (B,T), attention_mask (B,T), image_slots (B,T), true where one of N features of a picture goes.
A prompt is a tuple of plain texts and of ids of special tokens. What a person writes is always plain text; special
tokens are asked of the tokenizer by name, and no id is written anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unilip.errors import CheckpointError, PromptError, check_choice
from unilip.method.config import UniLIPConfig

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NEEDED_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, TURN_START, TURN_END)

Prompt = tuple[str | int, ...]


class TextTokenizer(Protocol):
    """What is asked of a tokenizer; `special` says whether names of special tokens in a text mean the tokens."""

    pad_id: int | None

    @property
    def fingerprint(self) -> str: ...  # changes when the tokenizer does
    def __len__(self) -> int: ...
    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, name: str) -> int | None: ...


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
    """A turn of a conversation: `role` "user" or "assistant"; pictures come before the text, `squares` for each."""

    role: str
    text: str
    squares: tuple[int, ...] = ()


class Processor:
    """Builds every batch of text that a model reads.

    Raises:
        CheckpointError: the tokenizer lacks a special token, or has more tokens than the model.
    """

    def __init__(self, tokenizer: TextTokenizer, config: UniLIPConfig) -> None:
        missing = [name for name in NEEDED_TOKENS if tokenizer.token_id(name) is None]
        if missing:
            lacking = ", ".join(missing)
            raise CheckpointError(f"The tokenizer lacks {lacking}; use the tokenizer files of the checkpoint itself.")
        if len(tokenizer) > config.text.vocab_size:
            sizes = f"{len(tokenizer)} tokens, the model {config.text.vocab_size}"
            raise CheckpointError(f"The tokenizer has {sizes}; they do not belong together.")
        self.tokenizer, self.config = tokenizer, config
        self.image_size, self.num_image_tokens = config.image_size, config.num_image_tokens
        self.max_tokens = config.text.max_positions - config.num_queries
        self.image_id, self.end_id = self._special(IMG_CONTEXT), self._special(TURN_END)
        self.pad_id = self.end_id if tokenizer.pad_id is None else tokenizer.pad_id

    def _special(self, name: str) -> int:
        return cast(int, self.tokenizer.token_id(name))

    # --- prompts (no system turn) ---

    def image(self, cells: int | None = None) -> Prompt:
        """Return what stands for one picture: start, a context slot for each of its tokens (those of a square), end."""
        return (self._special(IMG_START), *(self.image_id,) * (cells or self.num_image_tokens), self._special(IMG_END))

    def _turn(self, role: str, *content: str | int) -> Prompt:
        return (self._special(TURN_START), f"{role}\n", *content, self.end_id, "\n")

    def _request(self, *content: str | int) -> Prompt:
        """A user's turn, then the assistant's, which begins with a picture: the queries come next."""
        return (*self._turn("user", *content), self._special(TURN_START), "assistant\n", self._special(IMG_START))

    def generate_text(self, prompt: str | None) -> Prompt:
        """Return the generation prompt; None gives the unconditional one."""
        return self._request("Generate an image." if prompt is None else f"Generate an image: {prompt}")

    def edit_text(self, instruction: str | None, cells: int | Sequence[int] | None = None) -> Prompt:
        """Return the editing prompt for a source of so many image tokens, or several; None: the unconditional one."""
        head = "Edit the image." if instruction is None else f"Edit the image: {instruction}"
        sources = cells if isinstance(cells, Sequence) else [cells]
        return self._request(head, *(part for count in sources for part in ("\n", *self.image(count))))

    def chat_text(self, messages: Sequence[Message], *, open_turn: bool = True) -> Prompt:
        """Return a conversation in the chat template, ending with an open assistant turn unless told otherwise."""
        parts: list[str | int] = []
        for message in messages:
            check_choice("role of a message", message.role, ("user", "assistant"), PromptError)
            cells = [self.num_image_tokens * squares for squares in message.squares]
            images = [part for count in cells for part in (*self.image(count), "\n")]
            parts += self._turn(message.role, *images, message.text)
        return (*parts, *((self._special(TURN_START), "assistant\n") if open_turn else ()))

    def ids(self, prompt: str | Prompt) -> list[int]:
        """Return the token ids of a prompt. Texts that touch are read as one."""
        parts: list[str | int] = []
        for part in (prompt,) if isinstance(prompt, str) else prompt:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        pieces = ([part] if isinstance(part, int) else self.tokenizer.encode(part, special=False) for part in parts)
        return [token for piece in pieces for token in piece]

    def tokenize(self, texts: Sequence[str | Prompt], padding_side: Literal["left", "right"] = "left") -> Tokens:
        """Tokenize prompts and pad them to the longest: -> `Tokens` of (B,T).

        Raises:
            PromptError: a prompt is longer than the model's positions allow, or there is none.
        """
        rows = [self.ids(text) for text in texts]
        if not rows:
            raise PromptError("There is no prompt to tokenize; give one or more.")
        length = max(map(len, rows))
        if length > self.max_tokens:
            raise PromptError(f"The prompt has {length} tokens; the model reads at most {self.max_tokens}. Shorten it.")
        read = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(read, True, self.pad_id, padding_side)
        mask = pad_sequence([torch.ones_like(row) for row in read], True, 0, padding_side)
        return Tokens(ids, mask, (ids == self.image_id) & mask.bool())

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Turn generated ids (B,T) into stripped text."""
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        return [self.tokenizer.decode(row).strip() for row in rows]
