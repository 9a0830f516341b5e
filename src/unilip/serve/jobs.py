"""What can be asked of an engine, and what it says back: plain records, without a model.

In:  `Generate`, `Edit`, `Reconstruct`, `Ask`: words, Pillow pictures, settings (None: the model's own) and the adapters
that act, with their strengths. Out: `Event` while it works, one `Result` at the end, or one of the errors of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from unilip.chat import Turn as Turn
from unilip.errors import UniLIPError
from unilip.pictures import Fit
from unilip.shapes import Size

MAX_SEED = 2**63 - 1
Strengths = tuple[tuple[str, float], ...]  # of adapters, by name


class EngineError(UniLIPError):
    """A request was in order, but could not be served; `retry_after`: seconds to wait before another (None: no use)."""

    retry_after: float | None = None

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after)


class QueueFull(EngineError):
    """Too much is waiting already; `retry_after` estimates when there will be room."""


class Draining(EngineError):
    """The engine is being shut down and takes nothing new."""


class DeadlineExceeded(EngineError):
    """The time that the request allowed for itself was over before it was done."""


class Cancelled(EngineError):
    """Whoever asked does not want the result any more."""


class EngineFailed(EngineError):
    """The model failed while it worked on the request (memory ran out, for instance); the log says how."""


@dataclass(frozen=True)
class Generate:
    """Draw `count` pictures of a prompt, picture i with seed `seed` + i (or drawn), up to 3 `partials` on the way."""

    prompt: str
    count: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    preset: str = "quality"
    negative_prompt: str | None = None
    size: Size | None = None
    image_size: int | None = None
    plan: bool | str = "auto"
    partials: int = 0
    best_of: int = 1
    adapters: Strengths = ()


@dataclass(frozen=True)
class Edit:
    """Change a picture as told, `count` times. `fit` and `keep_aspect` are those of `UniLIP.edit`.

    It has about the shape of `size` (width, height), else of its source, and as many pixels as a square of
    `image_size`, else of the model's own. `others` are only read, for the same instruction (joint edits).
    """

    image: Image.Image
    prompt: str
    count: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    preset: str = "quality"
    negative_prompt: str | None = None
    size: Size | None = None
    image_size: int | None = None
    fit: Fit = "resize"
    keep_aspect: bool = False
    partials: int = 0
    adapters: Strengths = ()
    others: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Reconstruct:
    """Encode a picture and draw it again."""

    image: Image.Image
    size: Size | None = None
    image_size: int | None = None
    fit: Fit = "resize"
    keep_aspect: bool = False
    adapters: Strengths = ()


@dataclass(frozen=True)
class Ask:
    """Answer a question about pictures, or about none, after earlier turns. Temperature 0 is greedy."""

    question: str
    images: tuple[Image.Image, ...] = ()
    history: tuple[Turn, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tiles: int = 1
    adapters: Strengths = ()
    lower: bool = False  # take fewer new tokens where the conversation leaves no room for all


Job = Generate | Edit | Reconstruct | Ask


@dataclass(frozen=True)
class Event:
    """It left the queue ("start"), `step` of `steps`, a piece of "text", a "partial" `image`, or, last, the "end"."""

    kind: Literal["start", "step", "text", "partial", "end"]
    step: int = 0
    steps: int = 0
    text: str = ""
    image: Image.Image | None = None
    picture: int = 0
    number: int = 0


@dataclass(frozen=True)
class Result:
    """What came of a job.

    Attributes: images, seeds: in order; of `Ask` the one seed that was used. plan: the prompt as the model wrote it
    out. psnr: dB between each reconstructed picture and its source, at most 100. text, finish_reason: of `Ask`; "stop",
    or "length". prompt_tokens: slots of pictures included. settings: that were used, none open. waited, seconds: in the
    queue, in all.
    """

    images: tuple[Image.Image, ...] = ()
    seeds: tuple[int, ...] = ()
    plan: str | None = None
    psnr: tuple[float, ...] = ()
    text: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    waited: float = 0.0
    seconds: float = 0.0
