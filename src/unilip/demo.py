"""The demonstration: every ability of a model on a handful of pictures, as one web page that is honest about it.

Goes in: a model, the example pictures beside its weights, a folder. Comes out: index.html with its PNGs. The examples
are scenes that no training saw, with their true captions, answers and edited pictures, which the page shows beside
what the model made; one picture in the manner of a photograph shows what lies outside a small model's world.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unilip import __version__
from unilip.errors import UniLIPError
from unilip.model import UniLIP
from unilip.pictures import fit_square, load_image, picture_psnr

MARKER = ".unilip-demo"  # lists the files of a demo, so that the next one replaces these and nothing else
PAGE = "index.html"


# --- the examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question and every answer that is right, the shortest full one first."""

    question: str
    answers: tuple[str, ...]

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right, whatever its case and final stop."""
        return _plain(answer) in {_plain(right) for right in self.answers}


@dataclass(frozen=True)
class Picture:
    """An example picture, its true caption, and questions about it."""

    path: Path
    caption: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Edit:
    """A picture, an instruction, and the picture that a perfect editor would make."""

    source: Path
    instruction: str
    target: Path


@dataclass(frozen=True)
class Examples:
    """What the demo works on; `riddles` are questions without a picture."""

    pictures: tuple[Picture, ...]
    edits: tuple[Edit, ...]
    prompts: tuple[str, ...]
    riddles: tuple[Question, ...]
    credits: str


@cache
def examples() -> Examples:
    """Return the examples that come with the package.

    Raises:
        UniLIPError: this installation lacks them.
    """
    folder = Path(str(resources.files("unilip"))) / "weights" / "examples"
    try:
        record = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UniLIPError(f"This installation lacks the example pictures ({error}); install it again.") from error
    return Examples(
        tuple(Picture(folder / p["file"], p["caption"], _questions(p["questions"])) for p in record["pictures"]),
        tuple(Edit(folder / e["source"], e["instruction"], folder / e["target"]) for e in record["edits"]),
        tuple(record["prompts"]),
        _questions(record["riddles"]),
        record["credits"],
    )


def _questions(entries: Sequence[dict[str, Any]]) -> tuple[Question, ...]:
    return tuple(Question(entry["question"], tuple(entry["answers"])) for entry in entries)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[.!,]", " ", text.lower()).split())


def photograph(size: int = 224, seed: int = 0) -> Image.Image:
    """Make up a picture in the manner of a photograph: hills under clouds, every pixel with its own shade."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:size, 0:size] / size  # (S,S) each

    def noise(finest: int, falloff: float = 2.0) -> np.ndarray:
        total = np.zeros((size, size))
        for power in range(1, finest + 1):
            cells = Image.fromarray(rng.random((2**power + 1,) * 2).astype(np.float32))
            total += np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC)) / falloff**power
        return total / total.max()

    sky = np.array([0.38, 0.56, 0.80]) + down[..., None] * np.array([0.62, 0.36, 0.10])
    clouds = np.clip(noise(6) * 2.4 - 1.3, 0, 1)[..., None]
    picture = sky * (1 - clouds) + clouds
    hills = ((0.50, (0.50, 0.58, 0.66), 1.8), (0.60, (0.40, 0.50, 0.34), 1.4), (0.74, (0.42, 0.46, 0.20), 1.1))
    for height, tint, falloff in hills:  # the nearer, the rougher
        ridge = height + 0.12 * (noise(6)[0] - 0.5)  # (S)
        shade = (0.2 + 1.1 * noise(7, falloff))[..., None] * np.array(tint)
        picture = np.where((down > ridge[None])[..., None], shade, picture)
    glow = np.exp(-((across - 0.72) ** 2 + (down - 0.30) ** 2) / 0.03)[..., None] * np.array([0.5, 0.4, 0.15])
    grain = rng.normal(0, 0.02, (size, size, 3))
    return Image.fromarray((np.clip(picture + glow + grain, 0, 1) * 255).round().astype(np.uint8))


# --- the folder -----------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise a clear error unless the demo may write here: a folder of its own, an empty one, or a new one."""
    if not folder.exists():
        if not folder.absolute().parent.is_dir():
            raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another one.")
        return
    if not folder.is_dir():
        raise UniLIPError(f"{folder} is a file; give a folder for the demo's page and pictures.")
    if any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UniLIPError(f"{folder} holds files that no demo made; they were left alone. Give a new folder.")


def _replace_files(new: Path, folder: Path) -> None:
    """Move a finished demo from `new` to `folder`; of what is there, only an earlier demo's own files go."""
    folder.mkdir(exist_ok=True)
    marker = folder / MARKER
    for name in marker.read_text(encoding="utf-8").splitlines() if marker.is_file() else ():
        if name and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    names = sorted(path.name for path in new.iterdir())
    marker.write_text("\n".join(names) + "\n", encoding="utf-8")  # first: an interrupted move can be repeated
    for name in sorted(names, key=lambda name: name == PAGE):  # the page last, when all its pictures are there
        os.replace(new / name, folder / name)


# --- the demonstration ----------------------------------------------------------------------------------------------


def run(model: UniLIP, folder: Path, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Try everything, write the page to `folder`, and return the numbers on it.

    `say` gets a line after each part. The folder changes only once all is done.

    Raises:
        UniLIPError: the folder holds something else, or the model lacks a part.
    """
    check_folder(folder)
    folder = folder.absolute()
    new = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    new.mkdir()
    try:
        show = _Show(model, new, seed)
        sections = []
        for part in (show.reconstruct, show.generate, show.edit, show.ask, show.outside):
            title, line, body = part()
            sections.append((title, line, body))
            say(f"{title.lower()}: {line}")
        page = _page(model, sections, show.result)
        (new / PAGE).write_text(page, encoding="utf-8")
        _replace_files(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return {**show.result, "page": str(folder / PAGE)}


class _Show:
    """The parts of the demo; each returns its title, one line of numbers, and its HTML."""

    def __init__(self, model: UniLIP, folder: Path, seed: int) -> None:
        self.model, self.folder, self.seed = model, folder, seed
        self.examples = examples()
        self.result: dict[str, Any] = {"seed": seed, "seconds": {}}
        self._clock = 0.0

    def save(self, image: Image.Image, name: str) -> str:
        image.save(self.folder / f"{name}.png", optimize=True)
        return f"{name}.png"

    def start(self) -> None:
        self._clock = time.perf_counter()

    def took(self, part: str) -> str:
        seconds = time.perf_counter() - self._clock
        self.result["seconds"][part] = round(seconds, 2)
        return f"{seconds:.1f} s"

    def generators(self, count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed) for _ in range(count)]

    def square(self, image: Image.Image) -> Image.Image:
        return fit_square(image, self.model.config.image_size)

    def pair(self, source: Image.Image, name: str, made: Image.Image) -> tuple[str, float]:
        score = picture_psnr(self.square(source), made)
        names = self.save(self.square(source), f"{name}-source"), self.save(made, name)
        return _row([(names[0], "source"), (names[1], f"{score:.1f} dB")]), score

    def reconstruct(self) -> tuple[str, str, str]:
        pictures = [load_image(picture.path) for picture in self.examples.pictures]
        self.start()
        made = self.model.reconstruct(pictures).images
        took = self.took("reconstruct")
        cards, scores = [], []
        for picture, source, image in zip(self.examples.pictures, pictures, made, strict=True):
            row, score = self.pair(source, f"reconstruct-{picture.path.stem}", image)
            scores.append(score)
            cards.append(_card(row, picture.caption))
        self.result["psnr"] = [round(score, 2) for score in scores]
        mean = sum(scores) / len(scores)
        note = (
            "The picture becomes the features of the CLIP encoder, and only from these it is drawn again. "
            "Decibels are PSNR; more is better."
        )
        return "Reconstruct", f"{len(made)} pictures in {took}, {mean:.1f} dB on average", _section(note, cards)

    def generate(self) -> tuple[str, str, str]:
        prompts = self.examples.prompts
        self.start()
        made = self.model.generate(prompts, generator=self.generators(len(prompts)), progress=False).images
        took = self.took("generate")
        cards = []
        for prompt, image in zip(prompts, made, strict=True):
            name = self.save(image, "generate-" + re.sub(r"\W+", "-", prompt.lower()))
            cards.append(_card(_row([(name, "")]), f"“{prompt}”"))
        steps = self.model.config.sampling.num_inference_steps
        note = "Drawn from words alone, one try each, nothing picked; the model’s own settings."
        return "Generate", f"{len(made)} pictures of {steps} steps in {took}", _section(note, cards)

    def edit(self) -> tuple[str, str, str]:
        edits = self.examples.edits
        sources = [load_image(edit.source) for edit in edits]
        instructions = [edit.instruction for edit in edits]
        self.start()
        made = self.model.edit(sources, instructions, generator=self.generators(len(edits)), progress=False).images
        took = self.took("edit")
        cards = []
        for edit, source, image in zip(edits, sources, made, strict=True):
            name = "edit-" + edit.source.stem.removesuffix("-before")
            row = [
                (self.save(self.square(source), f"{name}-source"), "before"),
                (self.save(image, name), "after"),
                (self.save(self.square(load_image(edit.target)), f"{name}-wanted"), "as it should be"),
            ]
            cards.append(_card(_row(row), f"“{edit.instruction}”"))
        note = "The features of the picture are part of the condition, so that what is not named can stay as it was."
        return "Edit", f"{len(made)} pictures in {took}", _section(note, cards, wide=True)

    def ask(self) -> tuple[str, str, str]:
        asked: list[tuple[Picture | None, Question]] = [(p, q) for p in self.examples.pictures for q in p.questions]
        asked += [(None, question) for question in self.examples.riddles]
        self.start()
        pictures = [None if picture is None else load_image(picture.path) for picture, _ in asked]
        answers = self.model.ask(pictures, [question.question for _, question in asked], max_new_tokens=32)
        took = self.took("ask")
        assert isinstance(answers, list)
        right = [question.accepts(answer) for (_, question), answer in zip(asked, answers, strict=True)]
        self.result["answers"] = [
            {"question": question.question, "answer": answer, "truth": question.answers[0], "right": ok}
            for (_, question), answer, ok in zip(asked, answers, right, strict=True)
        ]
        cards = []
        for picture in (*self.examples.pictures, None):
            lines = [
                _answer(question, answer, ok)
                for (about, question), answer, ok in zip(asked, answers, right, strict=True)
                if about is picture
            ]
            row = _row([(f"reconstruct-{picture.path.stem}-source.png", "")]) if picture else ""
            cards.append(_card(row, "" if picture else "without a picture", "".join(lines)))
        note = "Greedy answers, compared with the truth word by word."
        return "Ask", f"{sum(right)} of {len(right)} answers right, in {took}", _section(note, cards)

    def outside(self) -> tuple[str, str, str]:
        source = photograph(2 * self.model.config.image_size)
        self.start()
        made = self.model.reconstruct(source).images[0]
        took = self.took("outside")
        row, score = self.pair(source, "photograph", made)
        self.result["photograph_psnr"] = round(score, 2)
        note = (
            "A landscape made of noise, in the manner of a photograph. The embedded model has seen emoji drawings and "
            "nothing else: textures like these are outside its world, and come back poor. The released models were "
            "trained on photographs."
        )
        return "Outside its world", f"{score:.1f} dB, in {took}", _section(note, [_card(row, "")])


# --- the page -------------------------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--back:#fbfaf7;--ink:#22252b;--soft:#666b75;--card:#fff;--line:#e2e0d9;
--yes:#1a7f46;--no:#b3392f}
@media(prefers-color-scheme:dark){:root{--back:#15171b;--ink:#e8e8e4;--soft:#9ba1ab;--card:#1f2228;--line:#33373f;
--yes:#5fca8c;--no:#f0857b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.2rem 1rem 3rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:.4rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .2rem}
p{margin:.3rem 0;max-width:46rem}.soft{color:var(--soft)}small,.soft{font-size:.9rem}
.grid{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(15.5rem,1fr));margin-top:.8rem}
.grid.wide{grid-template-columns:repeat(auto-fill,minmax(19rem,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem}
.row{display:flex;gap:.5rem}figure{margin:0;flex:1 1 0;max-width:14rem;min-width:0}
img{display:block;width:100%;height:auto;border-radius:.3rem;border:1px solid var(--line);background:#fff}
figcaption{color:var(--soft);font-size:.82rem;margin-top:.15rem}
.card p{margin:.45rem 0 0}.yes{color:var(--yes)}.no{color:var(--no)}
footer{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:.8rem}
""".strip()


def _row(cells: Sequence[tuple[str, str]]) -> str:
    figures = [
        f'<figure><img src="{html.escape(name)}" alt="{html.escape(label or name)}" loading="lazy">'
        + (f"<figcaption>{html.escape(label)}</figcaption>" if label else "")
        + "</figure>"
        for name, label in cells
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _card(row: str, text: str, more: str = "") -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f'<div class="card">{row}{words}{more}</div>'


def _answer(question: Question, answer: str, right: bool) -> str:
    truth = html.escape(question.answers[0])
    mark = '<span class="yes">✓</span>' if right else f'<span class="no">✗ (truth: {truth})</span>'
    said = html.escape(answer) or "<i>nothing</i>"
    return f'<p><span class="soft">{html.escape(question.question)}</span><br>{said} {mark}</p>'


def _section(note: str, cards: Sequence[str], wide: bool = False) -> str:
    return f'<p class="soft">{html.escape(note)}</p><div class="grid{" wide" if wide else ""}">{"".join(cards)}</div>'


def _page(model: UniLIP, sections: Sequence[tuple[str, str, str]], result: dict[str, Any]) -> str:
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    seconds = sum(result["seconds"].values())
    facts = (
        f"Model {config.name}: {millions:.1f} million parameters, {config.image_size} px, {model.device.type}; "
        f"seed {result['seed']}; all of it made in {seconds:.1f} s."
    )
    body = "\n".join(
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(line)}</p>{inside}</section>"
        for title, line, inside in sections
    )
    by = f"Made by <code>unilip demo</code>, version {__version__}."
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>UniLIP: demo</title><style>{STYLE}</style></head><body>
<header><h1>UniLIP</h1><p>One CLIP encoder that understands, reconstructs, generates and edits.</p>
<p class="soft">{html.escape(facts)} The scenes were not in its training.
Wrong answers and bad pictures are shown as they came.</p></header>
{body}
<footer><small class="soft">{html.escape(examples().credits)} {by}</small></footer>
</body></html>
"""
