"""Batches of a recipe: the item at index `step` is the whole batch of that step, a function of (seed, step) alone.

So a run resumes anywhere, on any number of loader workers, with the same data. Pictures are uint8 (B,3,S,S); prompts
are `Tokens`; conversations carry labels (B,T), -100 where nothing is learned.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unilip.errors import ConfigError
from unilip.preprocess import TURN_END, TURN_START, Processor, Tokens, fit_square, load_image
from unilip.train.recipe import Flow, Recipe, Understand

ENDLESS = 1 << 40
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def step_random(seed: int, step: int, what: str = "") -> random.Random:
    """A generator that depends on seed, step and purpose alone."""
    digest = hashlib.blake2b(f"{seed}/{step}/{what}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (H,W,3) -> (B,3,H,W)."""
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()


def conversation(
    processor: Processor, rows: Sequence[tuple[int, Sequence[tuple[str, str]]]]
) -> tuple[Tokens, Tensor]:
    """Tokenize rows of (number of pictures, question-answer turns), right-padded; only answers are learned."""
    ids_rows, label_rows = [], []
    for pictures, turns in rows:
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(turns):
            images = f"{processor.image_text()}\n" * pictures if i == 0 else ""
            asked = f"{TURN_START}user\n{images}{question}{TURN_END}\n{TURN_START}assistant\n"
            for text, learned in ((asked, False), (f"{answer}{TURN_END}", True), ("\n", False)):
                piece = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                labels += piece if learned else [-100] * len(piece)
        ids_rows.append(ids)
        label_rows.append(labels)
    length = max(len(ids) for ids in ids_rows)
    input_ids = torch.full((len(rows), length), processor.pad_id)
    target = torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (ids, labels) in enumerate(zip(ids_rows, label_rows, strict=True)):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        target[i, : len(ids)] = torch.tensor(labels)
        mask[i, : len(ids)] = 1
    return Tokens(input_ids, mask, (input_ids == processor.image_id) & mask.bool()), target


class Batches(Dataset[dict[str, Any]]):
    """Shared by all sources; a source supplies `caption_item`, `questions_item` and `edit_item` by index."""

    def __init__(self, recipe: Recipe, processor: Processor) -> None:
        self.recipe, self.processor = recipe, processor
        self.size = recipe.batch_size
        self._word_weights: Tensor | None = None

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.accumulate

    def caption_item(self, index: int) -> tuple[np.ndarray, str]:
        """Return picture and caption."""
        raise AssertionError("a source must give captions")

    def questions_item(self, index: int, turns: int) -> tuple[np.ndarray, str, list[tuple[str, str]]]:
        """Return picture, caption, and question-answer turns."""
        raise AssertionError("a source must give questions")

    def edit_item(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return source, target, instruction."""
        raise AssertionError("a source must give edits")

    def text_item(self, index: int) -> tuple[str, str]:
        """Return a question and answer without picture."""
        raise AssertionError("a source must give texts")

    def __getitem__(self, step: int) -> dict[str, Any]:
        start = step * self.size
        objective = self.recipe.objective
        if isinstance(objective, Understand):
            return self.understanding(start, objective)
        if isinstance(objective, Flow):
            choose = step_random(self.recipe.seed, step, "task")
            edits = choose.random() < self.recipe.data.edit_share
            return self.edits(start, objective, choose) if edits else self.generation(start, objective, choose)
        return {"images": stack([self.caption_item(start + i)[0] for i in range(self.size)])}

    def generation(self, start: int, flow: Flow, choose: random.Random) -> dict[str, Any]:
        """Prompts and the pictures they ask for."""
        items = [self.caption_item(start + i) for i in range(self.size)]
        texts = [
            self.processor.generate_text(None if choose.random() < flow.drop_prompt else caption) for _, caption in items
        ]
        return {"targets": stack([image for image, _ in items]), "prompts": self.processor.tokenize(texts)}

    def edits(self, start: int, flow: Flow, choose: random.Random) -> dict[str, Any]:
        """Sources, instructions, targets."""
        items = [self.edit_item(start + i) for i in range(self.size)]
        texts = [self.processor.edit_text(None if choose.random() < flow.drop_prompt else text) for *_, text in items]
        return {
            "sources": stack([source for source, _, _ in items]),
            "targets": stack([target for _, target, _ in items]),
            "prompts": self.processor.tokenize(texts),
        }

    def understanding(self, start: int, objective: Understand) -> dict[str, Any]:
        """Pictures with captions and conversations, a share of rows text only."""
        batch: dict[str, Any] = {}
        items = [self.questions_item(start + i, objective.turns) for i in range(self.size)]
        captions = [caption for _, caption, _ in items]
        batch["images"] = stack([image for image, _, _ in items])
        if objective.contrastive or objective.words:
            batch["captions"] = self.processor.tokenize([c + TURN_END for c in captions], padding_side="right")
            batch["same"] = torch.tensor([[float(a == b) for b in captions] for a in captions])
            batch["words"] = self.soft_words(captions)
        if objective.next_token:
            rows: list[tuple[int, Sequence[tuple[str, str]]]] = [(1, turns) for _, _, turns in items]
            texts = round(self.size * self.recipe.data.text_share)
            rows += [(0, [self.text_item(start + i)]) for i in range(texts)]
            batch["conversations"], batch["labels"] = conversation(self.processor, rows)
        return batch

    def soft_words(self, captions: Sequence[str]) -> Tensor:
        """Target distribution (B,V) over the tokens of each caption, weighted by inverse document frequency."""
        if self._word_weights is None:
            seen: Counter[int] = Counter()
            for i in range(1000):
                seen.update(set(self._words(self.caption_item(i)[1])))
            weights = torch.full((self.processor.config.text.vocab_size,), math.log(1000.0))
            for token, count in seen.items():
                weights[token] = math.log(1000.0 / count) + 0.01
            self._word_weights = weights
        target = torch.zeros(len(captions), len(self._word_weights))
        for row, caption in zip(target, captions, strict=True):
            words = torch.tensor(sorted(set(self._words(caption))))
            row[words] = self._word_weights[words]
        return target / target.sum(-1, keepdim=True)

    def _words(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


class EmojiBatches(Batches):
    """The embedded model's world: scenes, questions, edits and knowledge drawn on the fly."""

    def __init__(self, recipe: Recipe, processor: Processor) -> None:
        super().__init__(recipe, processor)
        from unilip.data.art import Atlas
        from unilip.data.dataset import Edits, Knowledge, Scenes
        from unilip.data.world import World

        world = World.preset(recipe.data.world)
        if world.image_size != processor.image_size:
            raise ConfigError(
                f"data.world {recipe.data.world} draws {world.image_size} px, the model reads {processor.image_size}; "
                "choose the world of the model's size."
            )
        atlas = Atlas.synthetic(world) if recipe.data.path == "synthetic" else Atlas.load(recipe.data.path or None)
        atlas.warm(world)  # before loader workers fork: they share what is decoded here
        purpose = "generation" if isinstance(recipe.objective, Flow) else "tokenizer"
        purpose = "understanding" if isinstance(recipe.objective, Understand) else purpose
        common = dict(world=world, atlas=atlas, split="train", seed=recipe.seed, size=ENDLESS)
        self.scenes = Scenes(**common, purpose=purpose)
        self.edit_pairs = Edits(**common) if recipe.data.edit_share else None
        self.knowledge = Knowledge(world, "train")

    def caption_item(self, index: int) -> tuple[np.ndarray, str]:
        item = self.scenes[index]
        return item["image"], item["caption"]

    def questions_item(self, index: int, turns: int) -> tuple[np.ndarray, str, list[tuple[str, str]]]:
        from unilip.data.captions import caption
        from unilip.data.dataset import pixels
        from unilip.data.questions import questions
        from unilip.data.world import TASKS, sample_scene

        rng = step_random(self.recipe.seed, index, "questions")
        task = rng.choice(TASKS)
        scene = sample_scene(self.scenes.world, rng, task, "train", "understanding")
        asked = questions(scene, rng, self.scenes.world, "train")
        rng.shuffle(asked)
        chosen = [(qa.question, qa.answer) for qa in asked[:turns]]
        return pixels(scene, self.scenes.atlas, self.scenes.world), caption(scene, task, rng, self.scenes.world), chosen

    def edit_item(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        assert self.edit_pairs is not None
        item = self.edit_pairs[index]
        return item["source"], item["target"], item["instruction"]

    def text_item(self, index: int) -> tuple[str, str]:
        item = self.knowledge[step_random(self.recipe.seed, index, "text").randrange(len(self.knowledge))]
        return item["question"], item["answer"]


class FolderBatches(Batches):
    """A folder of one's own: `name.png` + `name.txt`, and for edits `name.input.png`, `name.output.png`, `name.txt`."""

    def __init__(self, recipe: Recipe, processor: Processor) -> None:
        super().__init__(recipe, processor)
        folder = Path(recipe.data.path)
        if not folder.is_dir():
            raise ConfigError(f"data.path {folder} is not a folder.")
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.pairs = [(p, self._sibling(p)) for p in pictures if p.stem.endswith(".input")]
        self.pictures = [p for p in pictures if not p.stem.endswith((".input", ".output"))]
        if not self.pictures and not self.pairs:
            raise ConfigError(f"data.path {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
        if isinstance(recipe.objective, Understand):
            raise ConfigError("data.source=folder has no questions; use data.source=emoji for the understanding stages.")
        if recipe.data.edit_share and not self.pairs:
            raise ConfigError(f"data.edit_share is {recipe.data.edit_share}, but {folder} holds no NAME.input/NAME.output pairs.")
        if isinstance(recipe.objective, Flow):
            for path in self.pictures:
                if not path.with_suffix(".txt").exists():
                    raise ConfigError(f"{path} has no caption; put one in {path.with_suffix('.txt')}.")

    @staticmethod
    def _sibling(source: Path) -> Path:
        stem = source.name.removesuffix(f".input{source.suffix}")
        found = [p for s in IMAGE_SUFFIXES if (p := source.with_name(f"{stem}.output{s}")).exists()]
        if not found:
            raise ConfigError(f"{source} has no {stem}.output picture beside it.")
        if not source.with_name(f"{stem}.txt").exists():
            raise ConfigError(f"{source} has no instruction; put one in {stem}.txt beside it.")
        return found[0]

    def _pick(self, index: int, count: int) -> int:
        epoch, place = divmod(index, count)
        order = list(range(count))
        step_random(self.recipe.seed, epoch, "order").shuffle(order)
        return order[place]

    def _read(self, path: Path) -> np.ndarray:
        return np.asarray(fit_square(load_image(path), self.processor.image_size, "crop"))

    def caption_item(self, index: int) -> tuple[np.ndarray, str]:
        paths = self.pictures or [source for source, _ in self.pairs]
        path = paths[self._pick(index, len(paths))]
        caption = path.with_suffix(".txt")
        return self._read(path), caption.read_text().strip() if caption.exists() else ""

    def edit_item(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        source, target = self.pairs[self._pick(index, len(self.pairs))]
        text = source.with_name(source.name.removesuffix(f".input{source.suffix}") + ".txt").read_text().strip()
        return self._read(source), self._read(target), text


SOURCES: dict[str, type[Batches]] = {"emoji": EmojiBatches, "folder": FolderBatches}


def make_batches(recipe: Recipe, processor: Processor) -> Batches:
    """Open a recipe's data."""
    return SOURCES[recipe.data.source](recipe, processor)


def iterate(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """Yield the batches from index `start` on, prepared by the recipe's loader workers."""
    workers = batches.recipe.data.workers
    loader = DataLoader(
        batches, batch_size=None, sampler=range(start, len(batches)), num_workers=workers,
        persistent_workers=False, prefetch_factor=4 if workers else None,
    )  # fmt: skip
    yield from loader


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move tensors and `Tokens` of a batch."""
    return {k: v.to(device) if isinstance(v, (Tensor, Tokens)) else v for k, v in batch.items()}
