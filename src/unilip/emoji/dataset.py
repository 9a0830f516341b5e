"""Deterministic, indexable, picklable datasets: item i depends on the seed, the split and i, on nothing else.

Out: dictionaries of uint8 pictures (H, W, 3), strings and scene records; nothing is stored.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unilip.emoji.art import Atlas
from unilip.emoji.captions import as_written, background_words, caption, place_words
from unilip.emoji.edits import Edit, sample_edit, sample_joint
from unilip.emoji.knowledge import met_riddles
from unilip.emoji.questions import questions
from unilip.emoji.render import render
from unilip.emoji.world import SPLITS, TASKS, TRAINED, Scene, World, sample_scene
from unilip.errors import DataError, check_choice
from unilip.files import generator

DESCRIBED = 0.33  # share of the questions that ask for a caption


def pixels(scene: Scene, atlas: Atlas, world: World) -> np.ndarray:
    """Return SCENE as a writable uint8 array (H, W, 3)."""
    return np.array(render(scene, atlas, world), dtype=np.uint8)


def prompt(scene: Scene, task: str, rng: random.Random, world: World, placed: float = 0.5) -> str:
    """Describe SCENE as training does: with all places in a share PLACED, and now and then with a riddle for a name."""
    where = rng.random() < placed
    if task == "single" and scene.objects[0].colour is None and rng.random() < 0.5:
        known = met_riddles(world, scene.objects[0].concept)
        if known:
            parts = [rng.choice(known), place_words(scene.objects[0], world, rng) if where else ""]
            return " ".join(filter(None, [*parts, background_words(scene, rng, world)]))
    return caption(scene, task, rng, world, where=where)


@dataclass(frozen=True)
class _Items:
    """What the data sets share: so many items, of a split that exists."""

    world: World
    atlas: Atlas
    split: str
    seed: int
    size: int

    def __post_init__(self) -> None:
        check_choice("split", self.split, SPLITS, DataError)

    def __len__(self) -> int:
        return self.size

    def _generator(self, what: str, i: int) -> random.Random:
        if not -self.size <= i < self.size:
            raise IndexError(f"index {i} is out of range for {self.size} items")
        return generator(what, self.seed, self.split, i % self.size)


@dataclass(frozen=True)
class Scenes(_Items):
    """Pictures with captions: dict(image, caption, scene, task). ``seen`` None: held-out ones in validation."""

    purpose: str
    tasks: Sequence[str] | None = None
    seen: bool | None = None
    pool: Sequence[str] | None = None

    def draw(self, i: int) -> tuple[Scene, str, str]:
        """Return scene, task and caption of item I without drawing the picture."""
        rng = self._generator("scene", i)
        task = rng.choice(self.tasks or (TRAINED if self.split == "train" else TASKS))
        scene = sample_scene(self.world, rng, task, self.split, self.purpose, self.seen, self.pool)
        if self.split != "train":
            return scene, task, caption(scene, task, rng, self.world)
        words = prompt(scene, task, rng, self.world)
        return scene, task, as_written(words, rng) if self.purpose == "generation" and rng.random() < 0.5 else words

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene, task, text = self.draw(i)
        return {"image": pixels(scene, self.atlas, self.world), "caption": text, "scene": scene, "task": task}


@dataclass(frozen=True)
class Questions(_Items):
    """Pictures with one question: dict(image, question, answer, accepted, kind, scene); ``kinds`` None: of any."""

    kinds: Sequence[str] | None = None

    def __getitem__(self, i: int) -> dict[str, Any]:
        rng = self._generator("question", i)
        for _ in range(1000):
            scene = sample_scene(self.world, rng, rng.choice(TASKS), self.split, "understanding")
            found = questions(scene, rng, self.world, self.split)
            asked = [qa for qa in found if self.kinds is None or qa.kind in self.kinds]
            captions, others = ([qa for qa in asked if (qa.kind == "caption") == so] for so in (True, False))
            if asked:
                described = captions and (not others or rng.random() < DESCRIBED)
                qa = rng.choice(captions if described else others)
                about = {"question": qa.question, "answer": qa.answer, "accepted": qa.accepted, "kind": qa.kind}
                return {"image": pixels(scene, self.atlas, self.world), **about, "scene": scene}
        raise DataError(f"no scene can answer questions of the kinds {self.kinds}")


@dataclass(frozen=True)
class Edits(_Items):
    """Pairs of pictures: dict(source, target, instruction, kind, edit)."""

    kinds: Sequence[str] | None = None
    seen: bool = True

    def draw(self, i: int) -> Edit:
        """Return edit I without drawing its pictures."""
        rng = self._generator("edit", i)
        kind = rng.choice(self.kinds or self.world.edits)
        edit = sample_edit(self.world, rng, kind, self.split, self.seen)
        written = self.split == "train" and rng.random() < 0.5
        return replace(edit, instruction=as_written(edit.instruction, rng, wish=False)) if written else edit

    def joint(self, i: int) -> dict[str, Any]:
        """Return edit I of two pictures: dict(source, other, target, instruction, edit)."""
        rng = self._generator("joint", i)
        edit, other = sample_joint(self.world, rng, self.split)
        source, second, target = (pixels(scene, self.atlas, self.world) for scene in (edit.source, other, edit.target))
        return {"source": source, "other": second, "target": target, "instruction": edit.instruction, "edit": edit}

    def __getitem__(self, i: int) -> dict[str, Any]:
        edit = self.draw(i)
        source, target = (pixels(scene, self.atlas, self.world) for scene in (edit.source, edit.target))
        return {"source": source, "target": target, "instruction": edit.instruction, "kind": edit.kind, "edit": edit}
