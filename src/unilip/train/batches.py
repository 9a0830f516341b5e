"""Batches of a recipe: item i is the i-th batch, a function of (seed, i) alone, on any number of loader workers.

A step takes several items in a row; everything random about a sample depends on its number, so one batch of four and
two batches of two are the same data. Out: pictures, uint8 (B,3,S,S); prompts, `Tokens`; conversations with labels
(B,T), -100 where nothing is learned; `seeds`, a number for each sample. What a cache holds comes in place of pictures.
"""

import logging
import math
import multiprocessing
import multiprocessing.process
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from unilip.data.records import Unreadable
from unilip.emoji import lessons
from unilip.emoji.art import Atlas
from unilip.emoji.captions import PLAN, as_written, caption, plan
from unilip.emoji.dataset import Edits, Scenes, pixels, prompt
from unilip.emoji.edits import sample_edit
from unilip.emoji.knowledge import knowledge
from unilip.emoji.lessons import SUMMARY, UNKNOWN, Lesson
from unilip.emoji.questions import QA, questions
from unilip.emoji.world import TRAINED, Scene, World, sample_scene
from unilip.errors import ConfigError, DataError, UniLIPError
from unilip.files import generator, stable_hash
from unilip.method.config import DECODER_PIXELS, TOKEN_PIXELS, UniLIPConfig
from unilip.method.text import Message, Processor, Prompt, Tokens
from unilip.recipes.record import FewSteps, Flow, Recipe, Understand
from unilip.shapes import Size, cells
from unilip.train.processes import own_batches

logger = logging.getLogger(__name__)
ENDLESS = 1 << 40
EVEN = 16  # texts are as long as a multiple: a CPU prepares its products for every shape anew, and keeps what it made
WORKER_SECONDS = 5.0  # that loader workers have to end by themselves
NOT_LEARNED = -100  # what cross entropy leaves out
PLANNED = ("single", "two", "colour", "colour_attr", *("position",) * 3, *("counting",) * 3)  # tasks written out
MASKS = {"conditions": "condition_mask", "unconditional": "unconditional_mask"}  # of arrays of different lengths
Turns = Sequence[tuple[str, str]]
Grounds = Sequence[tuple[int, int, int, np.ndarray]]  # of a question: see `lessons.of_question`


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (H,W,3) -> (B,3,H,W)."""
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()


def stacked(name: str, images: Sequence[Any]) -> dict[str, Tensor]:
    """Pictures under NAME, or what stands for them: dictionaries of arrays, each stacked under its own key."""
    if not isinstance(images[0], dict):
        return {name: stack(images)}
    found: dict[str, Tensor] = {}
    for key in images[0]:
        values = [image[key] for image in images]
        if key in MASKS:  # as long as their prompts are
            ones = [torch.ones(len(row), dtype=torch.long) for row in values]
            found[MASKS[key]] = pad_sequence(ones, True, padding_side="left")
            found[key] = pad_sequence([torch.from_numpy(row) for row in values], True, padding_side="left")
        else:
            found[key] = stack(values) if values[0].dtype == np.uint8 else torch.from_numpy(np.stack(values))
    return found


def edit_kinds(text: str, known: Sequence[str]) -> list[str] | None:
    """Read kinds of edits such as "recolour:3,background", as often as it says; None for "". Raises ConfigError."""
    kinds: list[str] = []
    for name, _, times in (part.strip().partition(":") for part in text.split(",") if part.strip()):
        if name not in known or not (times or "1").isdecimal() or not int(times or "1"):
            raise ConfigError(f"data.edits is {text!r}; write KIND or KIND:TIMES, with kinds of {', '.join(known)}.")
        kinds += [name] * int(times or "1")
    return kinds or None


def tokenized(processor: Processor, texts: list[Prompt]) -> Tokens:
    """Tokenize whole prompts, left-padded to an even length."""
    ids, *masks = vars(processor.tokenize(texts)).values()
    more = -ids.shape[1] % EVEN
    return Tokens(F.pad(ids, (more, 0), value=processor.pad_id), *(F.pad(mask, (more, 0)) for mask in masks))


def conversation(processor: Processor, rows: Sequence[tuple[int, Turns]]) -> tuple[Tokens, Tensor]:
    """Tokenize rows of (number of pictures, question-answer turns), right-padded, as in `ask`; only answers count."""
    ids_rows, label_rows = [], []
    for pictures, turns in rows:
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(turns):
            asked = processor.chat_text([Message("user", question, (1,) * (pictures if i == 0 else 0))])
            for text, learned in ((asked, False), ((answer, processor.end_id), True), ("\n", False)):
                piece = processor.ids(text)
                ids += piece
                labels += piece if learned else [NOT_LEARNED] * len(piece)
        ids_rows.append(ids)
        label_rows.append(labels)
    length = -(-max(map(len, ids_rows)) // EVEN) * EVEN
    more = [length - len(ids) for ids in ids_rows]
    input_ids = torch.tensor([ids + [processor.pad_id] * n for ids, n in zip(ids_rows, more, strict=True)])
    target = torch.tensor([labels + [NOT_LEARNED] * n for labels, n in zip(label_rows, more, strict=True)])
    mask = torch.tensor([[1] * (length - n) + [0] * n for n in more])
    return Tokens(input_ids, mask, (input_ids == processor.image_id) & mask.bool()), target


class Batches(Dataset[dict[str, Any]]):
    """Shared by all sources; a source supplies single items by the number of the sample."""

    def __init__(self, recipe: Recipe, config: UniLIPConfig, processor: Processor | None) -> None:
        self.recipe, self.size = recipe, recipe.batch_size
        self.objective: Any = recipe.objective
        self.image_size: int | Size = config.image_size
        self.target_size: int | Size = config.image_size
        self.source_cells: int | None = None  # image tokens of a picture to be edited, where it is not the square
        if isinstance(recipe.objective, Flow) and recipe.objective.target == "dcae":
            self.target_size = config.image_size // TOKEN_PIXELS * DECODER_PIXELS  # what the autoencoder reads
        self._processor = processor
        self.samples: int | None = None  # how many there are, where that is known
        self.signature = ""  # changes with the data
        self.tally = Tally(recipe.data.max_skipped)  # of the last `iterate`

    @property
    def processor(self) -> Processor:
        """The tokenizer; only a tokenizer stage on files of pictures can do without one."""
        if self._processor is None:
            raise ConfigError("This recipe starts from nothing that has a tokenizer; name one in init.")
        return self._processor

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.accumulate

    def take_shape(self, size: Size) -> None:
        """Give the pictures from now on a width and height."""
        self.image_size, self.target_size, self.source_cells = size, size, cells(size)

    # What a source has, by the number of a sample. Only one with lessons has the last four.
    image_item: Callable[[int], Any]
    caption: Callable[[int], str]
    caption_item: Callable[[int], tuple[Any, str]]  # picture and caption
    questions_item: Callable[[int, int], tuple[Any, str, Turns]]  # picture, caption, so many question-answer turns
    edit_item: Callable[[int], tuple[Sequence[Any], Any, str]]  # sources, target, instruction
    text_item: Callable[[int], tuple[str, str]]  # a question and answer without picture
    cells: Callable[[int], np.ndarray]  # what lies on each image token of the picture of `questions_item` (N,3)
    grounds: Callable[[int, int], list[Grounds]]  # for each of its questions, where what its words name lies
    lesson_item: Callable[[int], tuple[Prompt, str, Lesson]]  # whole prompt, what somebody wrote of it, what that says
    told: Callable[[int, bool], tuple[Lesson, np.ndarray]]  # what caption or instruction says, and of each token

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = range(index * self.size, (index + 1) * self.size)
        step = index // self.recipe.accumulate  # all batches of a step have one shape and one task
        if sizes := self.recipe.data.sizes:
            self.take_shape(sizes[generator("shape", self.recipe.seed, step).randrange(len(sizes))])
        objective = self.recipe.objective
        if isinstance(objective, Understand):
            return self.understanding(samples, objective)
        if isinstance(objective, Flow):
            edit = self.is_edit(step)
            return self.drawn(samples, [self.edit_item(i) if edit else ((), *self.caption_item(i)) for i in samples])
        if objective.contrastive:
            items = [self.caption_item(i) for i in samples]
            return stacked("images", [image for image, _ in items]) | self.contrast([text for _, text in items])
        shown = [self.varied(self.image_item(i), i, objective.augment) for i in samples]
        held = torch.tensor([self.is_held(i, was_varied) for i, (_, was_varied) in zip(samples, shown, strict=True)])
        return stacked("images", [image for image, _ in shown]) | {"held": held}

    def is_held(self, index: int, was_varied: bool) -> bool:
        """Whether features and latents of a picture are to stay as they are."""
        return True

    def varied(self, image: Any, sample: int, share: float) -> tuple[Any, bool]:
        """A picture (H,W,3), and whether it was changed: a SHARE is, half of it mirrored, with channels exchanged."""
        rng = generator("augment", self.recipe.seed, sample)
        if rng.random() >= share:
            return image, False
        high, wide = image.shape[:2]
        if rng.random() < 0.5:  # turned by right angles
            image = np.rot90(image, rng.randrange(4) if high == wide else 2 * rng.randrange(2))
        else:  # turned, zoomed and moved by any amount
            angle, scale = rng.choice((0, math.tau * rng.random())), 1.18 / 2.35 ** rng.random()  # zoomed up to twice
            a, b = scale * math.cos(angle), scale * math.sin(angle)
            (x, u), (y, v) = ([side * rng.uniform(0.3, 0.7) for _ in range(2)] for side in (wide, high))
            found = Image.fromarray(image).transform(
                (wide, high), Image.Transform.AFFINE, (a, -b, x - a * u + b * v, b, a, y - b * u - a * v),
                Image.Resampling.BICUBIC, fillcolor=tuple(image[0, 0].tolist()),
            )  # fmt: skip
            image = np.asarray(found)
        return (image if rng.random() < 0.5 else image[:, ::-1])[..., rng.sample(range(3), 3)], True

    def is_edit(self, step: int) -> bool:
        return generator("task", self.recipe.seed, step).random() < self.recipe.data.edit_share

    def drawn(self, samples: range, items: Sequence[tuple[Sequence[Any], Any, str]]) -> dict[str, Any]:
        """Pictures to draw by (sources, target, text): edits where there are sources, one of each after the other."""
        each = len(items[0][0])
        counts = [self.source_cells or self.processor.num_image_tokens] * each

        def whole(text: str | None) -> Prompt:
            return self.processor.edit_text(text, counts) if each else self.processor.generate_text(text)

        batch: dict[str, Any] = stacked("sources", [one for sources, _, _ in items for one in sources]) if each else {}
        batch |= stacked("targets", [target for _, target, _ in items])
        if isinstance(self.recipe.objective, FewSteps):  # unconditional: one for all pictures, or one for each edit
            batch["blanks"] = tokenized(self.processor, [whole(None)] * (len(items) if each else 1))
        kept = [self._kept(text, i) for i, (*_, text) in zip(samples, items, strict=True)]
        texts = [whole(text) for text in kept]
        seeds = [stable_hash("noise", self.recipe.seed, i) % (1 << 63) for i in samples]
        batch |= {"prompts": tokenized(self.processor, texts), "seeds": seeds}
        if each and self.recipe.data.cache:  # which holds nothing that tells edits from captions
            batch["edits"] = True
        if self.objective.bind and self.recipe.lessons:
            found = [self.told(i, each > 0) for i in samples]
            rows = [(text, words, lesson) for text, words, (lesson, _) in zip(texts, kept, found, strict=True)]
            batch |= labels(self.processor, batch["prompts"], rows)
            batch["cells"] = torch.from_numpy(np.stack([cells for _, cells in found]))
            batch["cells"][[words is None for words in kept]] = UNKNOWN
        return batch

    def _kept(self, text: str, sample: int) -> str | None:
        """The prompt, or None where it is replaced by the unconditional one."""
        dropped = generator("drop", self.recipe.seed, sample).random() < self.objective.drop_prompt
        return None if dropped else text

    def understanding(self, samples: range, objective: Understand) -> dict[str, Any]:
        """Pictures with captions and conversations, and a share of conversations without a picture."""
        items = [self.questions_item(i, objective.turns) for i in samples]
        captions = [caption for _, caption, _ in items]
        batch: dict[str, Any] = stacked("images", [image for image, _, _ in items])
        if objective.contrastive:
            batch |= self.contrast(captions)
        if objective.words:
            batch["words"] = self.soft_words(captions)
        if (objective.local or objective.ground) and self.recipe.lessons:
            batch["cells"] = torch.from_numpy(np.stack([self.cells(i) for i in samples]))
        if objective.next_token:
            rows: list[tuple[int, Turns]] = [(1, turns) for _, _, turns in items]
            texts = samples[: round(self.size * self.recipe.data.text_share)]
            turns = -(-objective.turns // 2)  # of texts alone, which are longer
            rows += [(0, [self.text_item(i * turns + k) for k in range(turns)]) for i in texts]
            batch["conversations"], batch["labels"] = conversation(self.processor, rows)
            if objective.ground and self.recipe.lessons:
                found = [self.grounds(i, objective.turns) for i in samples]
                batch["grounds"] = grounded(self.processor, [turns for _, _, turns in items], found)
        if objective.bind and self.recipe.lessons:
            items_in_words = [self.lesson_item(i) for i in samples]
            batch["lessons"] = tokenized(self.processor, [whole for whole, _, _ in items_in_words])
            batch |= labels(self.processor, batch["lessons"], items_in_words)
        return batch

    def contrast(self, captions: Sequence[str]) -> dict[str, Any]:
        """Captions for a text tower, right-padded, and which of them say the same (B,B)."""
        tokens = self.processor.tokenize([(c, self.processor.end_id) for c in captions], padding_side="right")
        return {"captions": tokens, "same": torch.tensor([[float(a == b) for b in captions] for a in captions])}

    def soft_words(self, captions: Sequence[str]) -> Tensor:
        """Target distribution (B,V) over the tokens of each caption, weighted by inverse document frequency."""
        weights = self.word_weights
        target = torch.zeros(len(captions), len(weights))
        for row, text in zip(target, captions, strict=True):
            words = torch.tensor(self._words(text))
            row[words] = weights[words]
        return target / target.sum(-1, keepdim=True)

    @cached_property
    def word_weights(self) -> Tensor:
        """Log inverse document frequencies (V,) over the first 1000 captions, a little above zero everywhere."""
        seen = Counter(token for i in range(1000) for token in self._words(self.caption(i)))
        weights = torch.full((self.processor.config.text.vocab_size,), math.log(1000))
        for token, often in seen.items():
            weights[token] = math.log(1000 / often) + 0.01
        return weights

    def _words(self, text: str) -> list[int]:
        return sorted(set(self.processor.ids(text)))


class EmojiBatches(Batches):
    """The embedded model's world: scenes, questions, edits and knowledge drawn on the fly."""

    def __init__(self, recipe: Recipe, config: UniLIPConfig, processor: Processor | None) -> None:
        super().__init__(recipe, config, processor)
        world = World.preset(recipe.data.world)
        if world.image_size != config.image_size:
            raise ConfigError(
                f"data.world {recipe.data.world} draws {world.image_size} px, the model reads {config.image_size}; "
                "choose the world of the model's size."
            )
        place = Path(recipe.data.path).expanduser() if recipe.data.path else None
        if place and recipe.data.path != "synthetic" and not any(place.glob("atlas-*.npz")):
            raise ConfigError(
                f"data.path {recipe.data.path} holds no art of the emoji world; to train on files of your own set "
                "data.source=files as well."
            )
        atlas = Atlas.synthetic(world) if recipe.data.path == "synthetic" else Atlas.load(place)
        self.atlas = atlas.warm(world.training)  # before loader workers fork: they share what is decoded here
        self.signature = atlas.fingerprint
        purpose = "generation" if isinstance(recipe.objective, Flow) else "tokenizer"
        purpose = "understanding" if isinstance(recipe.objective, Understand) else purpose
        if purpose == "tokenizer" and world.strangers and not atlas.strange:
            logger.warning(
                "The art is of an older version, without the drawings that only a tokenizer meets; run "
                "`unilip data prepare emoji` again to have them."
            )
        common: dict[str, Any] = dict(world=world, atlas=atlas, split="train", seed=recipe.seed, size=ENDLESS)
        self.scenes = Scenes(**common, purpose=purpose)
        kinds = edit_kinds(recipe.data.edits, world.edits)
        self.edit_pairs: Any = Edits(**common, kinds=kinds) if recipe.data.edit_share else None
        self.shaped: dict[Size, tuple[Scenes, Any]] = {}
        for size in recipe.data.sizes:
            scenes, pairs = replace(self.scenes, world=world.shaped(size)), self.edit_pairs
            self.shaped[size] = scenes, pairs and replace(pairs, world=scenes.world)
        self.knowledge = knowledge(world, "train")

    def take_shape(self, size: Size) -> None:
        super().take_shape(size)
        self.scenes, self.edit_pairs = self.shaped[size]

    def is_strange(self, scene: Scene) -> bool:
        return any(obj.concept in self.scenes.world.strangers for obj in scene.objects)

    def is_held(self, index: int, was_varied: bool) -> bool:
        return not was_varied and not self.is_strange(self.scenes.draw(index)[0])

    def image_item(self, index: int) -> np.ndarray:
        """The picture of a scene; where strangers are on it, most of them are drawings that have no name at all."""
        scene, rng = self.scenes.draw(index)[0], generator("strange", self.recipe.seed, index)
        if self.is_strange(scene) and self.atlas.strange and rng.random() < 0.8:
            looks = {obj.look: rng.choice(self.atlas.strange) for obj in scene.objects}
            drawn = [(obj, *looks[obj.look]) for obj in scene.objects]
            scene = replace(scene, objects=tuple(replace(o, style=s, concept=n, tone=None) for o, s, n in drawn))
        return pixels(scene, self.atlas, self.scenes.world)

    def caption_item(self, index: int) -> tuple[np.ndarray, str]:
        item = self.scenes[index]
        return item["image"], item["caption"]

    def caption(self, index: int) -> str:
        return self.scenes.draw(index)[2]

    def questions_item(self, index: int, turns: int) -> tuple[np.ndarray, str, list[tuple[str, str]]]:
        rng, task, scene = self.shown(index)
        world, asked = self.scenes.world, self.asked(scene, rng)[:turns]
        words = caption(scene, task, rng, world, where=rng.random() < 0.5)
        return pixels(scene, self.scenes.atlas, world), words, [(qa.question, qa.answer) for qa in asked]

    def asked(self, scene: Scene, rng: random.Random) -> list[QA]:
        found = questions(scene, rng, self.scenes.world, "train")
        rng.shuffle(found)
        return found

    def grounds(self, index: int, turns: int) -> list[Grounds]:
        rng, _, scene = self.shown(index)
        return [lessons.of_question(qa, scene, self.scenes.world) for qa in self.asked(scene, rng)[:turns]]

    def shown(self, index: int) -> tuple[random.Random, str, Scene]:
        """Return the scene that questions are asked about, its task, and the generator that goes on from there."""
        rng = generator("questions", self.recipe.seed, index)
        task = rng.choice(TRAINED)
        return rng, task, sample_scene(self.scenes.world, rng, task, "train", "understanding")

    def cells(self, index: int) -> np.ndarray:
        return lessons.cells(self.shown(index)[2], self.scenes.world)

    def edit_item(self, index: int) -> tuple[list[np.ndarray], np.ndarray, str]:
        """An edit of one picture; in a share of the steps, of two."""
        step = index // (self.size * self.recipe.accumulate)
        joint = generator("joint", self.recipe.seed, step).random() < self.recipe.data.joint
        item = self.edit_pairs.joint(index) if joint else self.edit_pairs[index]
        return [item[name] for name in ("source", "other") if name in item], item["target"], item["instruction"]

    def told(self, index: int, edited: bool) -> tuple[Lesson, np.ndarray]:
        world = self.scenes.world
        if edited:
            edit = self.edit_pairs.draw(index)
            return lessons.of_edit(edit, edit.instruction, world), lessons.cells(edit.target, world)
        scene, _, text = self.scenes.draw(index)
        lesson, found = lessons.of_caption(text, scene, world), lessons.cells(scene, world)
        if sum(values[lessons.MARK.index("place")] != UNKNOWN for _, values in lesson.marks) < len(scene.objects):
            found[:, :2] = UNKNOWN  # a layout that the words leave open
        return lesson, found

    def text_item(self, index: int) -> tuple[str, str]:
        """A question about the world, or a caption to be written out with all places."""
        rng, world = generator("text", self.recipe.seed, index), self.scenes.world
        if rng.random() < 0.4:
            fact = self.knowledge[rng.randrange(len(self.knowledge))]
            return fact.question, fact.answer
        task = rng.choice(PLANNED)
        scene = sample_scene(world, rng, task, "train", "generation")
        words = prompt(scene, task, rng, world, 0.2)
        return PLAN + (as_written(words, rng) if rng.random() < 0.5 else words), plan(scene, world)

    def lesson_item(self, index: int) -> tuple[Prompt, str, Lesson]:
        rng, world = generator("lesson", self.recipe.seed, index), self.scenes.world
        edited, written = rng.random() < 0.4, rng.random() < 0.5
        if edited:
            edit = sample_edit(world, rng, rng.choice(world.edits))
            words = as_written(edit.instruction, rng, wish=False) if written else edit.instruction
            return until(self.processor.edit_text(words), words, len(words)), words, lessons.of_edit(edit, words, world)
        task = rng.choice(TRAINED)
        scene = sample_scene(world, rng, task, "train", "generation")
        words = prompt(scene, task, rng, world)
        words = as_written(words, rng) if written else words
        return self.processor.generate_text(words), words, lessons.of_caption(words, scene, world)


def until(prompt: Prompt, words: str, end: int) -> Prompt:
    """Cut a prompt off after END characters of the WORDS in it."""
    at = next(i for i, part in enumerate(prompt) if isinstance(part, str) and words in part)
    part = str(prompt[at])
    return (*prompt[:at], part[: part.index(words) + end])


def grounded(processor: Processor, rows: Sequence[Turns], found: Sequence[Sequence[Grounds]]) -> Tensor:
    """Where the words of questions lie in `conversation`, and what they name: (M,4+N).

    Columns: row, column, concept, colour (0 where a question ends), N image tokens, 1 where they show what is named.
    """
    marks: list[list[int]] = []
    for row, (turns, grounds) in enumerate(zip(rows, found, strict=True)):
        start = 0
        for i, ((question, answer), words) in enumerate(zip(turns, grounds, strict=True)):
            asked = processor.chat_text([Message("user", question, (1,) * (i == 0))])
            for end, *kinds, tokens in words:
                column = start + len(processor.ids(until(asked, question, end))) - 1
                marks.append([row, column, *kinds, *map(int, tokens)])
            start += sum(len(processor.ids(piece)) for piece in (asked, (answer, processor.end_id), "\n"))
    return torch.tensor(marks, dtype=torch.long).reshape(-1, 4 + processor.num_image_tokens)


def labels(
    processor: Processor, tokens: Tokens, items: Sequence[tuple[Prompt, str | None, Lesson | None]]
) -> dict[str, Tensor]:
    """What left-padded tokens say, of (whole prompt, part of it written by somebody, what that says).

    `marks` (M,2+4) are row, column, and the labels of a word in the order of `lessons.MARK`; `summaries` (B,S) belong
    to the end of a row; `present` (B,C) is 1 for the concepts that a caption has. What is not known is UNKNOWN.
    """
    marks: list[tuple[int, ...]] = []
    present = torch.full((len(items), lessons.classes("concept")), float(UNKNOWN))
    summaries = torch.full((len(items), len(SUMMARY)), UNKNOWN)
    for row, (whole, words, lesson) in enumerate(items):
        if words is None or lesson is None:
            continue
        start = tokens.input_ids.shape[1] - int(tokens.attention_mask[row].sum())
        for end, values in lesson.marks:  # where words end tokens end: what follows changes nothing before
            marks.append((row, start + len(processor.ids(until(whole, words, end))) - 1, *values))
        summaries[row] = torch.tensor(lesson.summary)
        if lesson.present:
            present[row] = 0
            present[row, list(lesson.present)] = 1
    found = torch.tensor(marks, dtype=torch.long).reshape(-1, 6)
    return {"marks": found, "summaries": summaries, "present": present}


class Tally:
    """Counts by reason what this process did not use, says so in the log, and stops where it is too much."""

    NAMED = 20  # skipped samples that the log names one by one
    LEAST, MOST = 100, 1000  # samples to judge by: as many as there are, between these

    def __init__(self, most: float, samples: int | None = None) -> None:
        self.most, self.least = most, min(self.MOST, max(self.LEAST, self.MOST if samples is None else samples))
        self.tried = 0
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.last = ""  # of those skipped

    def add(self, tried: Sequence[Unreadable | None]) -> None:
        """Count a batch's samples, each with what is wrong. Raises DataError: more than allowed cannot be read."""
        self.tried += len(tried)
        for problem in (problem for problem in tried if problem is not None):
            if problem.left_out:
                self.left_out[problem.reason] += 1
                continue
            self.skipped[problem.reason] += 1
            self.last = problem.detail
            if self.skipped.total() <= self.NAMED:
                logger.warning("a sample is skipped: %s", problem.detail)
        expected = self.most * max(self.tried, self.least)
        if self.skipped.total() > expected + 3 * math.sqrt(expected):  # three deviations: not by chance
            raise DataError(
                f"{self.skipped.total()} of {self.tried} samples cannot be read ({_reasons(self.skipped)}), the last: "
                f"{self.last}. Mend the data (`unilip data check` lists what is wrong), or allow a "
                f"larger share with data.max_skipped, which is {self.most:g}."
            )

    def summary(self) -> str:
        both = (self.skipped, "could not be read"), (self.left_out, "were over a limit")
        parts = [f"{counts.total()} {what} ({_reasons(counts)})" for counts, what in both if counts]
        return f"of {self.tried} samples {' and '.join(parts)}" if parts else ""


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


class _Carried(Dataset[Any]):
    """Batches whose errors come as values: raised in a worker they would keep the loader, and so its workers, alive."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Any:
        try:
            return self.batches[index]
        except UniLIPError as error:
            return error
        except Exception:  # a mistake of ours, as text: not every error can be sent from one process to another
            return RuntimeError(f"a batch cannot be made:\n{traceback.format_exc()}")


def iterate(batches: Batches, start: int) -> Generator[dict[str, Any]]:
    """Yield this process's batches from index `start` (the first of a step) on, prepared by workers, which end with it.

    Raises UniLIPError: a batch cannot be made, or more samples than allowed cannot be read; RuntimeError: an unforeseen
    error in making one, with its trace; or a worker was killed.
    """
    workers = batches.recipe.data.workers
    tally = batches.tally = Tally(batches.recipe.data.max_skipped, batches.samples)
    others = set(multiprocessing.active_children())
    loader = DataLoader(
        _Carried(batches), batch_size=None, sampler=own_batches(start, len(batches)), num_workers=workers,
        prefetch_factor=4 if workers else None, worker_init_fn=_leave_signals,
    )  # fmt: skip
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            tally.add(batch.pop("tried", ()))
            yield batch
    finally:
        _end(set(multiprocessing.active_children()) - others)
        if summary := tally.summary():
            logger.info("%s", summary)


def _end(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """End loader workers that are still there: they leave SIGTERM to the loop, and one may hang in a file system."""
    end = time.monotonic() + WORKER_SECONDS
    for worker in workers:
        worker.join(max(0.1, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join(1.0)


def _leave_signals(worker: int) -> None:
    """A Ctrl-C or a kill of the process group is for the loop, which saves first; a worker ends with its loader."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move tensors and `Tokens` of a batch."""
    return {k: v.to(device) if isinstance(v, (Tensor, Tokens)) else v for k, v in batch.items()}
