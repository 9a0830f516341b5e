"""Decode one sample: bytes -> RGB pictures, text, questions and answers.

Whatever is wrong with a sample becomes `Unreadable` with a short reason, so that it can be skipped and counted.
Kinds: "image" a picture alone; "caption" picture and text; "edit" source, target and instruction; "talk" a picture
with questions and answers; "text" questions and answers without a picture.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from unilip.errors import DataError, ImageError, PromptError
from unilip.files import decode_text
from unilip.pictures import Fit, fit_picture, load_image, open_picture
from unilip.sampling import check_prompt

KINDS = ("image", "caption", "edit", "talk", "text")
PICTURES = ("png", "jpg", "jpeg", "webp")  # endings
IMAGE_SUFFIXES = tuple(f".{ending}" for ending in PICTURES)
PICTURE_MARK = "<image>"  # how conversations in the LLaVA manner mark the place of their picture
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

T = TypeVar("T")
Turns = tuple[tuple[str, str], ...]


class Unreadable(DataError):
    """A sample that cannot be used. `reason` is what it is counted under; `left_out` means a limit, not a fault."""

    def __init__(self, reason: str, detail: str = "", left_out: bool = False) -> None:
        super().__init__(f"{reason}{f': {detail}' if detail else ''}")
        self.reason, self.detail, self.left_out = reason, detail, left_out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail, self.left_out)


@dataclass(frozen=True)
class Record:
    """A sample before decoding: pictures as encoded bytes (of an edit source and target), texts as bytes or strings."""

    name: str
    pictures: tuple[bytes, ...] = ()
    text: Any = None  # or a list, of which `one_text` chooses one
    conversation: Any = None
    tensors: bytes | None = None  # what a cache holds in place of pictures, as npz
    blank: bytes | None = None  # the same in place of a prompt that is dropped


class Source(Protocol):
    """Samples by kind, shard and place; `faults` says what of it is damaged, `notes` what is not read, and why."""

    location: str
    faults: list[str]
    notes: list[str]

    def counts(self, kind: str) -> Sequence[int]: ...  # how many samples of a kind each shard has
    def read(self, kind: str, shard: int, place: int) -> Record: ...  # one sample; raises `Unreadable`
    def signature(self) -> str: ...  # a hash of the names, sizes and parts of the content of all samples

    def expect(self, shards: Sequence[int]) -> None:
        """Hear which shards will be wanted next; nothing has to be fetched unless a source says how."""
        return


def kinds_of(members: Mapping[str, T], texts: bool = True) -> Iterator[tuple[str, dict[str, T]]]:
    """Yield each kind that a sample can serve as, with its members; a lone picture may miss its text."""
    if (cached := next((kind for kind in KINDS if f"{kind}.npz" in members), None)) is not None:
        parts = {part: members[part] for part in ("txt", "json") if part in members}
        yield cached, parts | {"npz": members[f"{cached}.npz"]}
        return
    plain, *pair = (
        next((members[f"{part}{e}"] for e in PICTURES if f"{part}{e}" in members), None)
        for part in ("", "input.", "output.")
    )
    text = next(({name: members[name]} for name in ("txt", "texts", "about") if name in members), {})
    for picture in (plain, *pair):
        if picture is not None:
            yield "image", {"image": picture}
    if any(pair):
        found = {name: part for name, part in zip(("source", "target"), pair, strict=True) if part is not None}
        yield "edit", found | text
    elif plain is not None and (text or (texts and "json" not in members)):
        yield "caption", {"image": plain} | text
    if "json" in members:
        talk = {"json": members["json"]} | text
        if plain is not None:
            yield "talk", {"image": plain} | talk
        elif not any(pair):
            yield "text", talk


def make_record(name: str, kind: str, data: Mapping[str, bytes]) -> Record:
    """Put the parts of a sample together that `kinds_of` names."""
    if kind == "edit" and "npz" not in data and not {"source", "target"} <= data.keys():
        raise Unreadable("picture missing", f"{name} has only one of input and output")
    pictures = tuple(data[part] for part in ("image", "source", "target") if part in data)
    text: Any = data.get("txt")
    if text is None and (about := data.get("texts", data.get("about"))) is not None:
        text = caption_of(about)
    return Record(name, pictures, text, data.get("json"), data.get("npz"))


def is_litter(path: str) -> bool:
    """Whether a file is what a system left beside somebody's own: a Mac's resource forks, a NAS's thumbnails."""
    parts = path.replace("\\", "/").split("/")
    return parts[-1].startswith("._") or not {"__MACOSX", "@eaDir"}.isdisjoint(parts)


def read_bytes(path: Path, reason: str) -> bytes:
    """Read a file of a sample."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        missing = isinstance(error, FileNotFoundError)
        raise Unreadable(f"{reason} missing" if missing else f"{reason} unreadable", str(path)) from error


def decode_picture(data: bytes) -> Image.Image:
    """Decode an encoded picture to upright RGB."""
    try:
        return load_image(open_picture(data))
    except ImageError as error:
        raise Unreadable("picture unreadable", str(error) if data else "it is empty") from error


def square(data: bytes, size: int | tuple[int, int], fit: Fit) -> np.ndarray:
    """Decode a picture and make it a uint8 square (S,S,3), or of a width and height (H,W,3)."""
    return np.asarray(fit_picture(decode_picture(data), (size, size) if isinstance(size, int) else size, fit))


def one_text(record: Record, number: int) -> Record:
    """Return a record with one of its several texts, by the number of the sample."""
    texts = record.text
    if not isinstance(texts, (list, tuple)):
        return record
    return replace(record, text=texts[number % len(texts)] if texts else None)


def clean_text(text: Any, what: str, longest: int = 0) -> str:
    """Return the caption or instruction of a sample; more than `longest` characters (0: no limit) are left out."""
    if text is None:
        raise Unreadable(f"{what} missing")
    if isinstance(text, bytes):
        try:
            text = decode_text(text)
        except UnicodeDecodeError as error:
            raise Unreadable(f"{what} not UTF-8", str(error)) from error
    if not isinstance(text, str):
        raise Unreadable(f"{what} no text", f"it is of the kind {type(text).__name__}: {str(text)[:80]}")
    if longest and len(text.strip()) > longest:
        raise Unreadable(f"{what} over {longest} characters", f"it has {len(text.strip())}", left_out=True)
    try:
        return check_prompt(text, what)
    except PromptError as error:
        raise Unreadable(f"{what} {'empty' if 'is empty' in str(error) else 'refused'}", str(error)) from error


def json_meaning(data: bytes) -> str:
    """What a json is: "json" a conversation or something broken, "about" metadata with a caption, "" other metadata."""
    try:
        value = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        return "json"
    if not isinstance(value, Mapping) or {"conversations", "messages"} & filled(value).keys():
        return "json"
    return "about" if caption_of(data) is not None else ""


def caption_of(data: bytes) -> Any:
    """Return the caption that metadata in JSON hold, as img2dataset writes them; None where they hold none."""
    try:
        value = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise Unreadable("metadata not JSON", str(error)) from error
    row = filled(value) if isinstance(value, Mapping) else {"caption": value}
    return row.get("caption", row.get("text"))


def filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the fields that are null, which tables write where a row has nothing."""
    return {field: value for field, value in row.items() if value is not None}


def read_turns(conversation: Any) -> Turns:
    """Return the questions and answers of LLaVA's (from, value) or OpenAI's (role, content), no system turn."""
    if isinstance(conversation, bytes):
        try:
            conversation = json.loads(decode_text(conversation))
        except (ValueError, RecursionError) as error:
            raise Unreadable("conversation not JSON", str(error)) from error
    if isinstance(conversation, Mapping):
        row = filled(conversation)
        conversation = row.get("conversations", row.get("messages"))
    if not isinstance(conversation, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise Unreadable("conversation malformed", "it must be a list of turns {from, value} or {role, content}")
    spoken = []
    for turn in map(filled, conversation):
        role = SPEAKERS.get(str(turn.get("from", turn.get("role"))))
        value = turn.get("value", turn.get("content"))
        if isinstance(value, list):  # parts, as OpenAI and TRL have them
            spelled = [part if isinstance(part, Mapping) else {} for part in value]
            parts = [part.get("text") for part in spelled if not str(part.get("type")).startswith("image")]
            texts = [part for part in parts if isinstance(part, str)]
            value = "\n".join(texts) if len(texts) == len(parts) else None
        if role is None or not isinstance(value, str):
            raise Unreadable("conversation malformed", f"a turn is {str(turn)[:80]}")
        if role != "system":
            spoken.append((role, value.replace(PICTURE_MARK, "").strip()))
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unreadable("conversation malformed", "user and assistant must take turns, the user first")
    said = [clean_text(text, "conversation") for _, text in spoken]
    return tuple(zip(said[::2], said[1::2], strict=True))
