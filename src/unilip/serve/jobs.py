"""What can be asked of an engine, and what it says back: plain records, without a model.

In:  `Generate`, `Edit`, `Reconstruct`, `Ask`: words, Pillow pictures, settings (None: the model's own) and the adapters
that act, with their strengths. Out: `Event` while it works, one `Result` at the end, or one of the errors of this file.
"""

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

    status, code = 503, "engine_failed"  # what an answer over HTTP says of it

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(EngineError):
    """Too much is waiting already; `retry_after` estimates when there will be room."""

    status, code = 429, "queue_full"


class Draining(EngineError):
    """The engine is being shut down and takes nothing new."""

    status, code = 503, "shutting_down"


class DeadlineExceeded(EngineError):
    """The time that the request allowed for itself was over before it was done."""

    status, code = 408, "deadline_exceeded"


class Cancelled(EngineError):
    """Whoever asked does not want the result any more."""

    status, code = 499, "cancelled"  # nobody reads it; it is for metrics and logs


class EngineFailed(EngineError):
    """The model failed while it worked on the request (memory ran out, for instance); the log says how."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What drawn pictures have in common: `count` of them, the i-th with seed `seed` + i (None: drawn at random).

    Up to 3 `partials` are shown on the way to each. size: (width, height), or about as many pixels as a square of side
    `image_size` has, else of the model's own.
    """

    count: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    preset: str = "quality"
    negative_prompt: str | None = None
    size: Size | None = None
    image_size: int | None = None
    partials: int = 0
    adapters: Strengths = ()


@dataclass(frozen=True)
class Generate(Drawing):
    """Draw pictures of a prompt, each the best of `best_of`."""

    prompt: str
    plan: bool | str = "auto"
    best_of: int = 1


@dataclass(frozen=True)
class Edit(Drawing):
    """Change a picture as told. `fit` and `keep_aspect` are those of `UniLIP.edit`.

    Without a `size` it has about its source's shape. `others` are only read, for the same instruction (joint edits).
    """

    image: Image.Image
    prompt: str
    fit: Fit = "resize"
    keep_aspect: bool = False
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
    or "length". prompt_tokens: slots of pictures included. settings: that were used, none open. seconds: in all.
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
    seconds: float = 0.0
