"""The demonstration: every ability of a model on a handful of pictures, as one web page that is honest about it.

The examples are scenes that no training saw, with their true captions, answers and edited pictures. What a small model
draws is judged as in its evaluation; a photograph shows what lies outside.
"""

import contextlib
import html
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from unilip import __version__
from unilip.emoji.art import Atlas
from unilip.emoji.captions import with_article
from unilip.emoji.dataset import Scenes
from unilip.emoji.edits import Edit
from unilip.emoji.judge import Judge, judge_edit, judge_prompt
from unilip.emoji.score import accepts
from unilip.emoji.world import Scene, World
from unilip.errors import UniLIPError
from unilip.files import read_json
from unilip.model import UniLIP
from unilip.pictures import fit_square, load_image, picture_psnr

MARKER = ".unilip-demo"  # lists the files of a demo, so that the next one replaces these and nothing else
PAGE = "index.html"
Section = tuple[str, str, str]  # title, one line of numbers, HTML
TAUGHT = 20  # pictures of a new thing
FOLDER = Path(str(resources.files("unilip"))) / "weights" / "examples"
JUDGED = " The marks are of the judge that the evaluation uses: it compares pictures with drawings, without a network."


@cache
def examples() -> dict[str, Any]:
    """Return the record of the examples: captions, questions, edits, prompts with their scenes, riddles, credits.

    Raises UniLIPError: this installation lacks them.
    """
    return dict(read_json(FOLDER / "examples.json", "record of the examples"))


@cache
def judge() -> Judge:
    """Return the judge of the small model's world, with the sprites that come with the package."""
    return Judge(World.preset("pico"), Atlas.load(FOLDER / "sprites.npz"))


def check_folder(folder: Path) -> None:
    """Raise a clear error unless the demo may write here: a folder of its own, an empty one, or a new one."""
    if not folder.absolute().parent.is_dir():
        raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another one.")
    if folder.exists() and not folder.is_dir():
        raise UniLIPError(f"{folder} is a file; give a folder for the demo's page and pictures.")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
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


def run(
    model: UniLIP,
    folder: Path,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    *,
    source: Sequence[str] = (),
    loaded: str = "",
    learn: bool = False,
) -> dict[str, Any]:
    """Try everything, write the page to `folder`, and return the numbers on it.

    `say` gets a line after each part; `source` are the options that name the model, `loaded` a remark on loading;
    `learn` teaches the embedded model a new thing as well, which takes minutes. The folder changes only once all is
    done. Raises UniLIPError: the folder holds something else, or the model lacks a part.
    """
    check_folder(folder)
    place = folder.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.part-", dir=place.parent) as new:
        show = _Show(model, Path(new), seed, str(folder), source)
        sections = []
        for part in (show.generate, show.edit, show.ask, show.reconstruct, show.outside, *[show.learn] * learn):
            title, line, body = part()
            sections.append(f"<section><h2>{title}</h2><p>{html.escape(line)}</p>{body}</section>")
            say(f"{title.lower()}: {line}")
        (show.folder / PAGE).write_text(show.page(sections, loaded), encoding="utf-8")
        _replace_files(show.folder, place)
    return {**show.result, "page": str(place / PAGE)}


class _Show:
    """The parts of the demo."""

    def __init__(self, model: UniLIP, folder: Path, seed: int, shown: str, source: Sequence[str]) -> None:
        self.model, self.folder, self.seed, self.shown, self.source = model, folder, seed, shown, source
        self.result: dict[str, Any] = {"seed": seed, "seconds": {}}
        self.size = model.config.image_size
        self.judges = self.size == judge().world.image_size

    def save(self, image: Image.Image, name: str) -> str:
        """Save a picture in the model's size; returns the name of the file."""
        fit_square(image, self.size).save(self.folder / f"{name}.png", optimize=True)
        return f"{name}.png"

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.result["seconds"][part] = round(time.perf_counter() - start, 2)

    def command(self, *words: str, seeded: bool = False) -> str:
        """A command that does one of the block again; names of pictures become paths."""
        paths = (str(Path(self.shown) / word) if word.endswith(".png") else word for word in words)
        again = ("unilip", *paths, *(("--seed", str(self.seed)) if seeded else ()), *self.source)
        return f"<pre>{html.escape(shlex.join(again))}</pre>"

    def section(
        self, part: str, result: str, note: str, cards: Sequence[str], again: str, wide: bool = False
    ) -> Section:
        grid = f'<div class="grid{" wide" if wide else ""}">{"".join(cards)}</div>'
        body = f'<p class="soft">{html.escape(note)}</p>{grid}{again}'
        title = "Outside its world" if part == "outside" else part.capitalize()
        return title, f"{result}, in {self.result['seconds'][part]:.1f} s", body

    def generate(self) -> Section:
        prompts = examples()["prompts"]
        with self.timed("generate"):
            made = self.model.generate(prompts, generator=[self.seed] * len(prompts), progress=False)
        verdicts = [self.drawn(image, **asked) for image, asked in zip(made, examples()["asked"], strict=True)]
        cards = [
            _card(_row((self.save(image, "generate-" + re.sub(r"\W+", "-", prompt.lower())), "")), f"“{prompt}”", found)
            for prompt, image, (_, found) in zip(prompts, made, verdicts, strict=True)
        ]
        steps = self.model.config.sampling.num_inference_steps
        result = f"{self.right('generate', verdicts)} pictures of {steps} steps"
        note = "Drawn from words alone, one try each, nothing picked." + JUDGED * self.judges
        return self.section("generate", result, note, cards, self.command("generate", prompts[0], seeded=True))

    def edit(self) -> Section:
        edits = examples()["edits"]
        sources, wishes = [load_image(FOLDER / e["source"]) for e in edits], [e["instruction"] for e in edits]
        with self.timed("edit"):
            made = self.model.edit(sources, wishes, generator=[self.seed] * len(edits), progress=False)
        cards, names = [], ["edit-" + Path(e["source"]).stem.removesuffix("-before") for e in edits]
        verdicts = [self.edited(image, edit) for image, edit in zip(made, edits, strict=True)]
        for edit, name, source, image, (_, found) in zip(edits, names, sources, made, verdicts, strict=True):
            before = self.save(source, f"{name}-source")
            target = self.save(load_image(FOLDER / edit["target"]), f"{name}-wanted")
            row = _row((before, "before"), (self.save(image, name), "after"), (target, "as it should be"))
            cards.append(_card(row, f"“{edit['instruction']}”", found))
        note = "The features of the picture are part of the condition, so that what is not named can stay as it was."
        again = self.command("edit", f"{names[0]}-source.png", wishes[0], seeded=True)
        result = f"{self.right('edit', verdicts)} pictures"
        return self.section("edit", result, note + JUDGED * self.judges, cards, again, wide=True)

    def ask(self) -> Section:
        shown = [*examples()["pictures"], {"file": None, "questions": examples()["riddles"]}]
        pictures = [entry["file"] and load_image(FOLDER / entry["file"]) for entry in shown]
        about = [picture for entry, picture in zip(shown, pictures, strict=True) for _ in entry["questions"]]
        questions = [question["question"] for entry in shown for question in entry["questions"]]
        with self.timed("ask"):
            answers = iter(self.model.ask(about, questions, max_new_tokens=32))
        cards, told = [], []
        for entry, picture in zip(shown, pictures, strict=True):
            lines = ""
            for question in entry["questions"]:
                answer, truth = next(answers), question["answers"]
                right = accepts(answer, truth)
                told.append({"question": question["question"], "answer": answer, "truth": truth[0], "right": right})
                words = f'<span class="soft">{html.escape(question["question"])}</span><br>'
                said = html.escape(answer) or "<i>nothing</i>"
                lines += f"<p>{words}{said} {_mark(right, f'truth: {truth[0]}')}</p>"
            row = picture and _row((self.save(picture, f"ask-{Path(entry['file']).stem}"), ""))
            cards.append(_card(row or "", "" if picture else "Without a picture", lines))
        self.result["answers"] = told
        again = self.command("ask", f"ask-{Path(shown[0]['file']).stem}.png", questions[0])
        result = f"{sum(one['right'] for one in told)} of {len(told)} answers right"
        return self.section("ask", result, "Greedy answers, compared with the truth word by word.", cards, again)

    def redrawn(self, part: str, captions: Mapping[str, str]) -> tuple[list[float], list[str], str]:
        """Reconstruct examples; their PSNR, their cards, and the command for the first."""
        pictures = [load_image(FOLDER / name) for name in captions]
        with self.timed(part):
            made = self.model.reconstruct(pictures)
        scores, cards, names = [], [], [f"{part}-{Path(name).stem}" for name in captions]
        for name, caption, source, image in zip(names, captions.values(), pictures, made, strict=True):
            scores.append(picture_psnr(fit_square(source, self.size), image))
            before, after = self.save(source, f"{name}-source"), self.save(image, name)
            cards.append(_card(_row((before, "source"), (after, f"again, {scores[-1]:.1f} dB")), caption))
        return scores, cards, self.command("reconstruct", f"{names[0]}-source.png")

    def reconstruct(self) -> Section:
        captions = {entry["file"]: entry["caption"] for entry in examples()["pictures"]}
        scores, cards, again = self.redrawn("reconstruct", captions)
        self.result["psnr"] = [round(score, 2) for score in scores]
        note = (
            "The picture becomes the features of the CLIP encoder, and is drawn again from these alone. Decibels are "
            "PSNR, more is better; on plain backgrounds they are high even where the eye sees another thing."
        )
        result = f"{len(scores)} pictures, {sum(scores) / len(scores):.1f} dB on average"
        return self.section("reconstruct", result, note, cards, again, wide=True)

    def outside(self) -> Section:
        (score,), cards, again = self.redrawn("outside", {"photograph.jpg": ""})
        self.result["photograph_psnr"] = round(score, 2)
        note = (
            "A photograph. The embedded model has seen emoji drawings and nothing else, so fur and light come back "
            "poor. The released models were trained on photographs."
        )
        return self.section("outside", f"{score:.1f} dB", note, cards, again, wide=True)

    def learn(self) -> Section:
        """Train an adapter on a thing that no training showed; draw it before and after, in words not taught."""
        from unilip.recipes.catalog import get_recipe
        from unilip.recipes.record import override
        from unilip.train.loop import train

        world, atlas = judge().world, judge().atlas
        thing = with_article(world.extra[0])
        lesson = Scenes(world, atlas, "val", 0, TAUGHT, "generation", ("single",), None, world.extra[:1])
        known = Scenes(world, atlas, "train", 1, 2 * TAUGHT, "generation")
        lessons = [lesson[i] for i in range(TAUGHT)]
        captions = {item["caption"] for item in lessons}
        asked = [f"{thing} on {with_article(name)} background" for name in world.backgrounds]
        prompts = [prompt for prompt in [one for one in asked if one not in captions][:4] for _ in range(4)]
        seeds = [self.seed + i % 4 for i in range(len(prompts))]
        with self.timed("learn"), tempfile.TemporaryDirectory() as place:
            for name, items in (("new", lessons), ("known", [known[i] for i in range(2 * TAUGHT)])):
                (Path(place) / name).mkdir()
                for i, item in enumerate(items):
                    Image.fromarray(item["image"]).save(Path(place) / name / f"{i:02}.png")
                    (Path(place) / name / f"{i:02}.txt").write_text(item["caption"], encoding="utf-8")
            settings = [f"data.path={place}/new:1,{place}/known:2", f"seed={self.seed}"]
            final = train(override(get_recipe("lora/concept"), settings), place, progress=False)
            models = (self.model, UniLIP.from_pretrained(final).to(self.model.device))
            drawn = [model.generate(prompts, generator=seeds, progress=False).images for model in models]
        right = [[[one.concept for one in judge().read(image).objects] == [world.extra[0]] for image in images]
                 for images in drawn]  # fmt: skip
        self.result["learned"] = [sum(one) for one in right]
        taught = self.save(Image.fromarray(lessons[0]["image"]), "learn-taught")
        cards = [_card(_row((taught, "")), f"One of the {TAUGHT}: “{lessons[0]['caption']}”")]
        for i in range(0, len(prompts), 4):
            whens = enumerate(("before", "after"))
            row = _row(*((self.save(drawn[k][i], f"learn-{i // 4}-{when}"), when) for k, when in whens))
            cards.append(_card(row, f"“{prompts[i]}”", f"<p>{_mark(right[1][i], 'it is not')}</p>"))
        note = (
            f"{thing[:1].upper() + thing[1:]} stands in no training picture. An adapter (LoRA) was trained here and "
            f"now on {TAUGHT} captioned pictures of it, mixed with known ones; the prompts are not among the captions."
        )
        result = f"{thing}: {sum(right[0])} of {len(prompts)} right before, {sum(right[1])} after"
        again = "<pre>unilip train lora/concept --data FOLDER</pre>"
        return self.section("learn", result, note, cards, again, wide=True)

    def drawn(self, image: Image.Image, task: str, scene: dict[str, Any]) -> tuple[bool, str]:
        """Whether a picture shows what was asked, and that in HTML."""
        if not self.judges:
            return False, ""
        reading = judge().read(image)
        ok = judge_prompt(reading, Scene.from_dict(scene), task, judge().world).ok
        return ok, f"<p>{_mark(ok, f'saw {reading}')}</p>"

    def edited(self, image: Image.Image, edit: dict[str, Any]) -> tuple[bool, str]:
        """Whether an edit was done and the rest kept, and that in HTML."""
        if not self.judges:
            return False, ""
        before, after = (Scene.from_dict(edit[f"{which}_scene"]) for which in ("source", "target"))
        verdict = judge_edit(judge(), image, Edit(before, edit["instruction"], after, edit["kind"]))
        return verdict.ok, f"<p>{_mark(verdict.ok, verdict.reason)}</p>"

    def right(self, part: str, verdicts: Sequence[tuple[bool, str]]) -> str:
        """Count what is right, where that can be judged: "4 right of 6"."""
        if not self.judges:
            return str(len(verdicts))
        self.result[f"{part}_right"] = [ok for ok, _ in verdicts]
        return f"{sum(ok for ok, _ in verdicts)} right of {len(verdicts)}"

    def page(self, sections: Sequence[str], loaded: str) -> str:
        config, seconds = self.model.config, sum(self.result["seconds"].values())
        facts = (
            f"Model {config.name}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} million parameters, "
            f"{self.size} px, on {self.model.device.type}, seed {self.seed}. "
            f"{loaded[:1].upper() + loaded[1:]}{', ' if loaded else 'In '}{seconds:.1f} s of work."
        )
        times = max(1, 224 // self.size)  # pictures are shown at a whole multiple of their size
        teach = "pip install '.[train]' && unilip demo --learn   # two minutes: a thing that it never saw"
        learn = "" if self.source else f"<pre>{html.escape(teach)}</pre>"
        after = learn + self.command("studio") + self.command("generate", "a green cactus", "--num-images", "4")
        shared = (resources.files("unilip") / "serve" / "page" / "style.css").read_text(encoding="utf-8")
        template = Template((resources.files("unilip") / "demo.html").read_text(encoding="utf-8"))
        return template.substitute(
            shared=shared, size=self.size, times=times, facts=html.escape(facts), sections="".join(sections),
            after=after, credits=html.escape(examples()["credits"]), version=__version__,
        )  # fmt: skip


def _row(*cells: tuple[str, str]) -> str:
    figures = [
        f'<figure><img src="{html.escape(name)}" alt="{html.escape(Path(name).stem.replace("-", " "))}" loading="lazy">'
        + (f"<figcaption>{html.escape(label)}</figcaption>" if label else "")
        + "</figure>"
        for name, label in cells
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _card(row: str, text: str = "", more: str = "") -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f'<div class="card">{row}{words}{more}</div>'


def _mark(right: bool, reason: str) -> str:
    return '<span class="yes">✓</span>' if right else f'<span class="no">✗ ({html.escape(reason)})</span>'
