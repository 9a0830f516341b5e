"""Evaluation of a model on the held-out splits of the emoji world.

Goes in: a model, its world and the atlas. Comes out: numbers by task and kind.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unilip.data.art import Atlas
from unilip.data.captions import canonical
from unilip.data.dataset import Questions, Scenes
from unilip.data.seeding import stable_hash
from unilip.data.world import TASKS, World
from unilip.eval.judge import Judge, judge_prompt
from unilip.model import UniLIP

# ---------------------------------------------------------------------------------------------- answers


def normalise(answer: str) -> str:
    """Lower case, no punctuation at the ends, single spaces: what counts of an answer."""
    return re.sub(r"\s+", " ", answer.lower()).strip(" .,!?;:\"'")


def accepts(answer: str, accepted: Sequence[str]) -> bool:
    """Whether ANSWER is one of the accepted forms, after ``normalise`` and without a leading article."""

    def bare(text: str) -> str:
        return re.sub(r"^(a|an|the) ", "", normalise(text))

    return bare(answer) in {bare(form) for form in accepted}


def quick_answers(
    model: UniLIP, world: World, atlas: Atlas, count: int = 200, seed: int = 0, batch_size: int = 32
) -> dict[str, float]:
    """Ask COUNT held-out questions and return the accuracy by kind, and over all ("all")."""
    data = Questions(world, atlas, "val", seed, count)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, batch_size):
        items = [data[i] for i in range(start, min(start + batch_size, count))]
        answers = model.ask([item["image"] for item in items], [item["question"] for item in items], max_new_tokens=48)
        for item, answer in zip(items, answers, strict=True):
            right[item["kind"]].append(accepts(answer, item["accepted"]))
    found = {kind: float(np.mean(values)) for kind, values in sorted(right.items())}
    return {**found, "all": float(np.mean([value for values in right.values() for value in values]))}


def quick_generation(
    model: UniLIP,
    world: World,
    atlas: Atlas,
    count: int = 48,
    seed: int = 0,
    batch_size: int = 16,
    judge: Judge | None = None,
    **sampling: Any,
) -> dict[str, float]:
    """Draw COUNT held-out captions and return how often each part of the verdict is right, and all of it ("all").

    JUDGE may be given to save building it again; SAMPLING goes to ``UniLIP.generate``. ``all/TASK`` is by task.
    """
    judge = judge or Judge(world, atlas)
    data = Scenes(world, atlas, "val", seed, count, "generation")
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, batch_size):
        drawn = [data.draw(i) for i in range(start, min(start + batch_size, count))]
        prompts = [canonical(scene, task, world) for scene, task, _ in drawn]
        generators = [noise_generator("quick", seed, start + i) for i in range(len(drawn))]
        images = model.generate(prompts, generator=generators, progress=False, **sampling).images
        for image, (scene, task, _) in zip(images, drawn, strict=True):
            verdict = judge_prompt(judge.read(image), scene, task, world)
            for part, value in verdict.parts.items():
                right[part].append(value)
            right["all"].append(verdict.ok)
            right[f"all/{task}"].append(verdict.ok)
    return {part: float(np.mean(values)) for part, values in sorted(right.items())}


def noise_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by the text of PARTS: one picture's noise, whatever the batch."""
    return torch.Generator().manual_seed(stable_hash(*parts) % 2**63)


__all__ = ["TASKS", "accepts", "noise_generator", "normalise", "quick_answers", "quick_generation"]
