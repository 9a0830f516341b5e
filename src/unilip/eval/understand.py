"""Ask a model the questions of a JSON-lines file, `unilip eval understand`; a rerun asks only what is new.

In: a line a question, {"question": text, "image": a path, base64, or a list of them, "id"?, "answer"?}. Out, in a run
folder: answers.jsonl, and the exact match with the given answers. The published benchmarks (MMBench, MME, MMVP, MMMU,
SEED, AI2D, MM-Vet) are for lmms-eval and VLMEvalKit, which find the model by `lmms.py` and `vlmevalkit.py`.
"""

import base64
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unilip.checkpoints.hub import Source
from unilip.data.records import IMAGE_SUFFIXES
from unilip.errors import ImageError, PromptError, UniLIPError
from unilip.eval.pictures import decode
from unilip.eval.runs import RunFolder, model_hash
from unilip.eval.scores import FOLDER, Rule, make_row, write_scores
from unilip.files import content_hash, file_hash, read_json, read_lines, remove, write_lines
from unilip.machine import Place
from unilip.model import UniLIP
from unilip.sampling import check_prompt

NAMES = {  # of a question's fields, the first that is there
    "question": ("question", "text", "prompt"), "image": ("image", "image_path", "images"),
    "answer": ("answer", "label"), "id": ("id", "question_id", "index"),
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One question: `answer` is what is right, None where it is not told; `images` are files or encoded pictures."""

    key: str
    text: str
    images: tuple[Path | bytes, ...] = field(default=(), repr=False)
    answer: str | None = None
    group: str = "all"

    def read(self) -> list[bytes]:
        """Return the bytes of the pictures. Raises ImageError: one cannot be read."""
        try:
            return [image if isinstance(image, bytes) else image.read_bytes() for image in self.images]
        except OSError as error:
            raise ImageError(f"{error.filename} cannot be read ({error.strerror}); check --images.") from error


@dataclass(frozen=True)
class Sheet:
    """The questions of a file."""

    questions: tuple[Asked, ...]
    sha256: str


def open_questions(path: str | Path, images: str | Path | None = None) -> Sheet:
    """Read a .jsonl or .json file of questions; IMAGES is the folder of image paths, that of the file by default.

    Raises UniLIPError: no such file, another format, a missing picture, or an id that is there twice.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        raise UniLIPError(
            f"There are no questions at {path}; give a .jsonl file of lines such as "
            '{"question": "What is it?", "image": "a.png", "answer": "a cat"}. Published benchmarks are for lmms-eval '
            "and VLMEvalKit."
        )
    folder = Path(images).expanduser() if images else path.parent
    what = "file of questions"
    rows = read_json(path, what) if path.suffix == ".json" else read_lines(path, what)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UniLIPError(f"{path} holds no questions; write one JSON object for each.")
    found = tuple(_read(row, n, path, folder) for n, row in enumerate(rows))
    key, often = Counter(asked.key for asked in found).most_common(1)[0]
    if often > 1:
        raise UniLIPError(f"{path} has the id {key!r} twice; each question needs its own.")
    return Sheet(found, file_hash(path))


def _read(row: Mapping[str, Any], n: int, path: Path, folder: Path) -> Asked:
    defaults: dict[str, Any] = {"question": None, "image": [], "answer": None, "id": n}
    text, images, answer, key = (
        next((row[name] for name in NAMES[field] if row.get(name) not in (None, "", [])), default)
        for field, default in defaults.items()
    )
    where = f"{path}, question {key}"
    if not isinstance(text, str) or not text.strip():
        raise UniLIPError(f'{where} has no question; write {{"question": "..."}}.')
    try:
        check_prompt(text, "question")
    except PromptError as error:
        raise UniLIPError(f"{where}: {error}") from error
    if isinstance(answer, (list, dict)):
        raise UniLIPError(f"{where}: the answer is {type(answer).__name__}; give a text, or leave it out.")
    found = tuple(_image(image, where, folder) for image in (images if isinstance(images, list) else [images]))
    return Asked(str(key), text, found, None if answer is None else str(answer), str(row.get("category") or "all"))


def _image(value: object, where: str, folder: Path) -> Path | bytes:
    if not isinstance(value, str):
        raise UniLIPError(f"{where}: an image is {type(value).__name__}; give a path or base64.")
    if len(value) < 1000 and Path(value).suffix.lower() in IMAGE_SUFFIXES:
        if not (folder / value).is_file():
            raise UniLIPError(f"{where}: there is no picture {folder / value}; give its folder as --images.")
        return folder / value
    try:
        return base64.b64decode(value.removeprefix("data:").split("base64,")[-1], validate=True)
    except ValueError:
        raise UniLIPError(f"{where}: the image is neither base64 nor the path of a picture.") from None


def evaluate(
    sheet: Sheet,
    output: Path,
    source: Source = None,
    *,
    name: str = "questions",
    count: int | None = None,
    max_tiles: int = 1,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
    place: Place | None = None,
    progress: bool = False,
) -> list[dict[str, Any]] | None:
    """Ask a model the first COUNT questions; returns a list of at most one summary; None where the rank is not 0.

    In: name: of the questions, for people. max_tiles, max_new_tokens: of `UniLIP.ask`.
    Raises UniLIPError: a picture cannot be read, or the folder is another run's.
    """
    questions = sheet.questions[:count]
    dtype = dtype or "float32"
    settings = {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens, "dtype": dtype}
    identity = {"task": "understand", "protocol": "questions", "model": model_hash(source), "settings": settings}
    with RunFolder(output, identity, place or Place.of_environment(), source) as folder:
        marks = [content_hash(asked.text, *asked.read()) for asked in questions]  # what an answer depends on
        by_mark = dict(zip(marks, questions, strict=True))

        @functools.cache
        def load() -> UniLIP:  # only where something is left to ask
            return UniLIP.from_pretrained(source, device=device, dtype=dtype, parts=("encoder", "mllm"))

        def answer(batch: Sequence[str]) -> tuple[list[dict[str, str]], dict[str, Any]]:
            asked = [by_mark[mark] for mark in batch]
            pictures = [[decode(data, f"question {one.key}") for data in one.read()] for one in asked]
            texts = [one.text for one in asked]
            said = load().ask(pictures, texts, max_new_tokens=max_new_tokens, max_tiles=max_tiles)
            return [{"answer": text} for text in said], {}

        found = folder.measured(marks, batch_size, answer, "question", progress)
    if found is None:
        return None
    table = [
        {
            "key": one.key, "question": one.text, "answer": row["answer"], "truth": one.answer,
            "right": None if one.answer is None else bare(one.answer) == bare(row["answer"]),
        }
        for one, row in zip(questions, found, strict=True)
    ]  # fmt: skip
    write_lines(output / "answers.jsonl", table)
    rows = [
        make_row(one.key, {"exact_match": float(row["right"])}, group=one.group)
        for row, one in zip(table, questions, strict=True)
        if row["right"] is not None
    ]
    about = {
        "task": f"understand {name}", "protocol": identity["protocol"], "scorer": "exact match, without case and marks",
        "model": folder.name, "model_hash": identity["model"], "settings": settings,
        "prompts": {
            "sha256": sheet.sha256, "published": None, "count": len(sheet.questions), "sources": content_hash(*marks),
        },
        "prompts_scored": len(rows),
    }  # fmt: skip
    if not rows:  # nor may the score of other questions stay
        remove(output / FOLDER / "understand.json")
    return [write_scores(output, "understand", rows, Rule(), about)] if rows else []


def bare(text: str) -> str:
    """Return a text without case, marks and repeated spaces: what an exact match compares."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
