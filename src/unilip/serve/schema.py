"""The requests that the server understands: OpenAI's fields, and a few of ours; pydantic's errors become 400."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, WithJsonSchema, model_validator
from pydantic import FiniteFloat as Finite

from unilip.errors import UniLIPError
from unilip.sampling import MAX_PROMPT_CHARACTERS
from unilip.serve.jobs import MAX_SEED
from unilip.shapes import Size

MAX_COUNT = 10
MAX_OUTPUT_SIDE = 2048
MAX_MESSAGES = 100
TEXT_OR_NULL: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "null"}]}

B = TypeVar("B", bound="Body")

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
# How many times the model's own number of steps a quality takes.
QUALITY = {"auto": 1.0, "medium": 1.0, "standard": 1.0, "low": 0.4, "high": 2.0, "hd": 2.0, "xhigh": 3.0, "max": 4.0}


def size_of(size: Any) -> Size | None:
    """Return width and height in pixels of a `size`, None for "auto". Raises ValueError: bad form, out of range."""
    if size in (None, "", "auto"):
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if found is None:
        raise ValueError('size must be "auto" or width x height, such as 512x512 or 768x512')
    width, height = int(found[1]), int(found[2])
    if not 16 <= min(width, height) <= max(width, height) <= MAX_OUTPUT_SIDE:
        raise ValueError(f"size must be between 16x16 and {MAX_OUTPUT_SIDE}x{MAX_OUTPUT_SIDE}")
    return width, height


class Body(BaseModel):
    """What all requests share."""

    model_config = ConfigDict(extra="forbid")

    deadline: Finite | None = Field(None, gt=0, le=86400, description="Seconds after which nobody wants it any more.")
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """The fields that were sent and mean nothing here."""
        return self._ignored


# Fields that ask for what a truthful answer can do without; other unknown ones are ignored in the same way.
HOLLOW = ("tools", "frequency_penalty", "presence_penalty", "logit_bias")


def read(kind: type[B], fields: dict[str, Any], strict: bool, form: bool = False) -> B:
    """Check the fields of a request; null, "" in a form, and the seed -1 count as not sent.

    What is not understood is ignored, and named in `ignored` so that a mistyped option is seen, unless it would change
    the form of the answer or is almost one that there is; `strict` refuses all of it.
    Raises UniLIPError: a field is written almost like one that there is; ValidationError: pydantic's.
    """
    if strict:
        return kind.model_validate(fields)
    kept, ignored = {}, []
    for name, value in fields.items():
        field = kind.model_fields.get(name)
        empty = value is None or (value == "" and (form or name == "negative_prompt"))
        empty = empty or ((form or kind is Chat) and (name, str(value)) == ("seed", "-1"))
        if field is None and (near := difflib.get_close_matches(name, kind.model_fields, 1, 0.88)):
            raise UniLIPError(f"There is no parameter {name.encode('unicode_escape').decode()}; it is {near[0]}.")
        if field is None or (name in HOLLOW and value):
            ignored.append(name.encode("ascii", "backslashreplace").decode()[:64])
        elif field.is_required() or not empty:
            kept[name] = value
    body = kind.model_validate(kept)
    body._ignored = tuple(ignored[:32])
    return body


class Pictures(Body):
    """What requests share whose answers may be pictures, and that adapters can act on."""

    model: str | None = Field(
        None, max_length=256, description='Any name; there is one model, and "NAME:ADAPTER" with one of its adapters.'
    )
    adapters: (
        Annotated[str, Field(max_length=1024)]
        | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)]
        | Annotated[dict[Annotated[str, Field(max_length=256)], Finite], Field(max_length=16)]
        | None
    ) = Field(None, description='Adapters that act, "style:0.5,other", as a list, or with strengths {"style": 0.5}.')
    size: Annotated[Size | None, PlainValidator(size_of), WithJsonSchema(TEXT_OR_NULL)] = Field(
        None, description='Of the answer: "768x512", or "auto" (the model\'s own; the source\'s shape).'
    )
    image_size: int | None = Field(
        None, ge=28, le=8192, description="The model draws about as many pixels as a square of this side has."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp, 95 by default.")
    user: str | None = Field(None, max_length=512)


class Drawing(Pictures):
    """What requests to draw share."""

    quality: Quality | None = Field(None, description="Sampling steps as a share of the model's own; see the docs.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED - MAX_COUNT, description="Picture i uses seed + i. Same request, same picture."
    )
    steps: int | None = Field(None, ge=1, le=1000, description="Sampling steps, instead of `quality`.")
    guidance: Finite | None = Field(None, ge=0, le=100, description="How far to follow the words; 1 is off.")
    solver: Literal["dpm++", "euler", "unipc"] | None = None
    preset: Literal["quality", "balanced", "fast", "turbo"] | None = Field(
        None, description="How many evaluations a picture may cost, instead of `quality`; turbo needs few-step weights."
    )
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARACTERS)
    safety_identifier: str | None = Field(None, max_length=512)
    partial_images: int | None = Field(None, ge=0, le=3, description="How many a stream shows on the way to each.")


class Images(Drawing):
    """What requests to the image endpoints share."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    n: int | None = Field(None, ge=1, le=MAX_COUNT)
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool | None = Field(None, description="Answer by server-sent events.")
    include_progress: bool | None = Field(None, description="Let a stream tell the sampling steps, in events of ours.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None

    @model_validator(mode="after")
    def _no_urls_in_streams(self) -> Images:
        if self.stream and self.response_format == "url":
            raise ValueError("a stream carries the pictures themselves; leave response_format out")
        return self


class Generations(Images):
    """POST /v1/images/generations."""

    plan: bool | Literal["auto"] = Field(
        "auto", description="Let the language model write the prompt out first, and draw that; auto: if it learned to."
    )
    best_of: int = Field(1, ge=1, le=MAX_COUNT, description="Draw so many for each picture; the model keeps the best.")


class Edits(Images):
    """POST /v1/images/edits: the fields beside the files `image` (or `image[]`) and `mask`."""

    fit: Literal["resize", "crop", "pad"] = Field("resize", description="How a picture gets the size drawn.")
    keep_aspect: bool | None = Field(None, description="Give the result the shape of its source; so without a `size`.")
    input_fidelity: Literal["low", "high"] | None = None
    joint: bool | None = Field(
        None, description="Change the first picture with the help of the others; unsaid: where the model learned it."
    )

    @property
    def keeps_aspect(self) -> bool:
        return self.size is None if self.keep_aspect is None else self.keep_aspect


class Variations(Edits):
    """POST /v1/images/variations: an edit whose instruction may be left out."""

    joint: bool | None = False
    prompt: str = Field("Draw this scene again, a little differently.", max_length=MAX_PROMPT_CHARACTERS)


class Reconstructions(Pictures):
    """POST /v1/images/reconstructions: the fields beside the files `image` (or `image[]`)."""

    response_format: Literal["b64_json", "url"] = "b64_json"
    fit: Literal["resize", "crop", "pad"] = "resize"
    keep_aspect: bool = False


class ImageURL(BaseModel):
    """Where a picture is: a data URL; an http(s) one only where the server allows it."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _complete(self) -> Part:
        if getattr(self, self.type) is None:
            raise ValueError(f'a part of type "{self.type}" needs the field {self.type}')
        return self


class ChatMessage(BaseModel):
    """A message; `images` is what an answer of this server carried and a client sends back."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=64)] | None = None
    images: Annotated[list[Part], Field(max_length=16)] | None = None

    @property
    def parts(self) -> list[Part]:
        """The content, whichever way it was sent."""
        return [Part(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_progress: bool | None = Field(None, description="Send chunks with the sampling steps done.")
    include_obfuscation: bool | None = None


class Format(BaseModel):
    """Plain text, or one JSON object: the model is told to write one, and what it writes becomes one."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _loose(self) -> Format:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.get("strict")):
            raise ValueError("the model cannot be held to a form; it is only asked for one, without `strict`")
        return self


class Chat(Drawing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = Field(
        None, description='["text"] never draws, ["image"] always does; else the words decide.'
    )
    joint: bool | None = Field(None, description="Pictures of a message belong to one edit, see edits.")
    max_tokens: int | None = Field(None, ge=1, description="As many as fit, at most.")
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: Finite | None = Field(None, ge=0, le=2, description="0, the default, gives the likeliest answer.")
    top_p: Finite | None = Field(None, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    max_tiles: int | None = Field(None, ge=1, le=64, description="Read large pictures as up to so many squares.")
    n: Literal[1] | None = None
    # accepted while they ask for nothing
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def parts(self) -> list[Part]:
        """The parts of all messages, and the pictures of answers."""
        return [part for message in self.messages for part in (*message.parts, *(message.images or ()))]


class Intent(Body):
    """POST /v1/intent: what a chat would make of a message."""

    text: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    has_picture: bool = False


class Problem(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is not a success."""

    error: Problem
