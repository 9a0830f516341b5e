"""The demonstration: every ability of a model on a handful of pictures, as one web page that is honest about it.

The examples are scenes that no training saw, with their true captions, answers and edited pictures. What a small model
draws is judged as in its evaluation; a photograph shows what lies outside.
"""

import contextlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
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
from unilip.files import fill_page, read_json
from unilip.model import UniLIP
from unilip.pictures import fit_square, load_image, picture_psnr

MARKER = ".unilip-demo"  # lists the files of a demo, so that the next one replaces these and nothing else
PAGE = "index.html"
Verdict = tuple[bool, str]  # whether a picture is right, and what the judge saw in it or misses
TAUGHT = 20  # pictures of a new thing
FOLDER = Path(str(resources.files("unilip"))) / "weights" / "examples"


@dataclass(frozen=True)
class Card:
    """Pictures in a row, the file of each with what it is, and words about them."""

    pictures: Mapping[str, str]
    text: str = ""
    verdict: Verdict | None = None
    answers: Sequence[Mapping[str, Any]] = ()  # question, answer, truth, right


Section = tuple[str, list[Card], str]  # numbers in words, the cards, and a command that does one of them again


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
        sections = {}
        for part in (show.generate, show.edit, show.ask, show.reconstruct, show.outside, *[show.learn] * learn):
            result, cards, again = part()
            line, name = f"{result}, in {show.seconds:.1f} s", part.__name__
            show.result["seconds"][name] = show.seconds
            sections[name] = {"line": line, "cards": cards, "again": again}
            say(f"{'outside its world' if name == 'outside' else name}: {line}")
        (show.folder / PAGE).write_text(show.page(sections, loaded), encoding="utf-8")
        _replace_files(show.folder, place)
    return {**show.result, "page": str(place / PAGE)}


class _Show:
    """The parts of the demo; `seconds` are of the model's work in the last one."""

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
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds = round(time.perf_counter() - start, 2)

    def command(self, *words: str, seeded: bool = False) -> str:
        """A command that does one of the block again; names of pictures become paths."""
        paths = (str(Path(self.shown) / word) if word.endswith(".png") else word for word in words)
        again = ("unilip", *paths, *(("--seed", str(self.seed)) if seeded else ()), *self.source)
        return shlex.join(again)

    def generate(self) -> Section:
        prompts = examples()["prompts"]
        with self.timed():
            made = self.model.generate(prompts, generator=[self.seed] * len(prompts), progress=False)
        verdicts = [self.drawn(image, **asked) for image, asked in zip(made, examples()["asked"], strict=True)]
        cards = [
            Card({self.save(image, "generate-" + re.sub(r"\W+", "-", prompt.lower())): ""}, f"“{prompt}”", verdict)
            for prompt, image, verdict in zip(prompts, made, verdicts, strict=True)
        ]
        steps = self.model.config.sampling.num_inference_steps
        result = f"{self.right('generate', verdicts)} pictures of {steps} steps"
        return result, cards, self.command("generate", prompts[0], seeded=True)

    def edit(self) -> Section:
        edits = examples()["edits"]
        sources, wishes = [load_image(FOLDER / e["source"]) for e in edits], [e["instruction"] for e in edits]
        with self.timed():
            made = self.model.edit(sources, wishes, generator=[self.seed] * len(edits), progress=False)
        cards, names = [], ["edit-" + Path(e["source"]).stem.removesuffix("-before") for e in edits]
        verdicts = [self.edited(image, edit) for image, edit in zip(made, edits, strict=True)]
        for edit, name, source, image, verdict in zip(edits, names, sources, made, verdicts, strict=True):
            before, after = self.save(source, f"{name}-source"), self.save(image, name)
            target = self.save(load_image(FOLDER / edit["target"]), f"{name}-wanted")
            row = {before: "before", after: "after", target: "as it should be"}
            cards.append(Card(row, f"“{edit['instruction']}”", verdict))
        again = self.command("edit", f"{names[0]}-source.png", wishes[0], seeded=True)
        return f"{self.right('edit', verdicts)} pictures", cards, again

    def ask(self) -> Section:
        shown = [*examples()["pictures"], {"file": None, "questions": examples()["riddles"]}]
        pictures = [entry["file"] and load_image(FOLDER / entry["file"]) for entry in shown]
        about = [picture for entry, picture in zip(shown, pictures, strict=True) for _ in entry["questions"]]
        questions = [question["question"] for entry in shown for question in entry["questions"]]
        with self.timed():
            answers = iter(self.model.ask(about, questions, max_new_tokens=32))
        cards, told = [], list[dict[str, Any]]()
        for entry, picture in zip(shown, pictures, strict=True):
            lines = []
            for question in entry["questions"]:
                answer, truth = next(answers), question["answers"]
                told_one = {"question": question["question"], "answer": answer, "truth": truth[0]}
                lines.append(told_one | {"right": accepts(answer, truth)})
            row = {self.save(picture, f"ask-{Path(entry['file']).stem}"): ""} if picture else {}
            cards.append(Card(row, "" if picture else "Without a picture", answers=lines))
            told += lines
        self.result["answers"] = told
        again = self.command("ask", f"ask-{Path(shown[0]['file']).stem}.png", questions[0])
        return f"{sum(one['right'] for one in told)} of {len(told)} answers right", cards, again

    def redrawn(self, part: str, captions: Mapping[str, str]) -> tuple[list[float], list[Card], str]:
        """Reconstruct examples; their PSNR, their cards, and the command for the first."""
        pictures = [load_image(FOLDER / name) for name in captions]
        with self.timed():
            made = self.model.reconstruct(pictures)
        scores, cards, names = [], [], [f"{part}-{Path(name).stem}" for name in captions]
        for name, caption, source, image in zip(names, captions.values(), pictures, made, strict=True):
            scores.append(picture_psnr(fit_square(source, self.size), image))
            before, after = self.save(source, f"{name}-source"), self.save(image, name)
            cards.append(Card({before: "source", after: f"again, {scores[-1]:.1f} dB"}, caption))
        return scores, cards, self.command("reconstruct", f"{names[0]}-source.png")

    def reconstruct(self) -> Section:
        captions = {entry["file"]: entry["caption"] for entry in examples()["pictures"]}
        scores, cards, again = self.redrawn("reconstruct", captions)
        self.result["psnr"] = [round(score, 2) for score in scores]
        return f"{len(scores)} pictures, {sum(scores) / len(scores):.1f} dB on average", cards, again

    def outside(self) -> Section:
        (score,), cards, again = self.redrawn("outside", {"photograph.jpg": ""})
        self.result["photograph_psnr"] = round(score, 2)
        return f"{score:.1f} dB", cards, again

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
        with self.timed(), tempfile.TemporaryDirectory() as place:
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
        cards = [Card({taught: ""}, f"One of the {TAUGHT}: “{lessons[0]['caption']}”")]
        for i in range(0, len(prompts), 4):
            whens = enumerate(("before", "after"))
            row = {self.save(drawn[k][i], f"learn-{i // 4}-{when}"): when for k, when in whens}
            cards.append(Card(row, f"“{prompts[i]}”", (right[1][i], "it is not")))
        result = f"{thing}: {sum(right[0])} of {len(prompts)} right before, {sum(right[1])} after"
        return result, cards, "unilip train lora/concept --data FOLDER"

    def drawn(self, image: Image.Image, task: str, scene: dict[str, Any]) -> Verdict | None:
        """Whether a picture shows what was asked; None where that cannot be judged."""
        if not self.judges:
            return None
        reading = judge().read(image)
        return judge_prompt(reading, Scene.from_dict(scene), task, judge().world).ok, f"saw {reading}"

    def edited(self, image: Image.Image, edit: dict[str, Any]) -> Verdict | None:
        """Whether an edit was done and the rest kept; None where that cannot be judged."""
        if not self.judges:
            return None
        before, after = (Scene.from_dict(edit[f"{which}_scene"]) for which in ("source", "target"))
        verdict = judge_edit(judge(), image, Edit(before, edit["instruction"], after, edit["kind"]))
        return verdict.ok, verdict.reason

    def right(self, part: str, verdicts: Sequence[Verdict | None]) -> str:
        """Count what is right, where that can be judged: "4 right of 6"."""
        judged = [verdict[0] for verdict in verdicts if verdict]
        if not judged:
            return str(len(verdicts))
        self.result[f"{part}_right"] = judged
        return f"{sum(judged)} right of {len(judged)}"

    def page(self, sections: Mapping[str, Mapping[str, Any]], loaded: str) -> str:
        after = [self.command("studio"), self.command("generate", "a green cactus", "--num-images", "4")]
        if not self.source:
            after.insert(0, "pip install '.[train]' && unilip demo --learn   # two minutes: a thing that it never saw")
        return fill_page(
            "unilip", "demo.html", sections=sections, after=after, loaded=loaded, seed=self.seed, size=self.size,
            name=self.model.config.name, device=self.model.device.type, seconds=sum(self.result["seconds"].values()),
            millions=sum(p.numel() for p in self.model.parameters()) / 1e6, judges=self.judges, taught=TAUGHT,
            thing=with_article(judge().world.extra[0]), credits=examples()["credits"], version=__version__,
            style=(resources.files("unilip") / "serve" / "page" / "style.css").read_text(encoding="utf-8"),
        )  # fmt: skip
