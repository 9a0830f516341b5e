"""Whether the model's own liking finds right pictures: one of several seeds, chosen by what it sees, before the judge.

    python benchmarks/best_of.py --prompts 80 --seeds 4 --preset fast

For held-out prompts of the emoji world every seed is drawn and judged. Printed are the share of right pictures, of
prompts with any right one, and of the chosen ones: by the margin of yes over no to a question, or by the mean
log-probability of the prompt as a caption. "Mixed" are the prompts with right and wrong pictures, where choosing tells.
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import torch
from torch import Tensor

from unilip.emoji.art import Atlas
from unilip.emoji.score import UNGUIDED, Bench, judge_prompt, noise_generator
from unilip.emoji.world import World
from unilip.method.text import Message
from unilip.model import UniLIP
from unilip.pictures import to_pixels

QUESTIONS = ("Do you see {}?", "Is there {} in the picture?")


def probability(model: UniLIP, question: str, answer: str, features: Tensor) -> float:
    """Mean log-probability of the tokens of an answer to a question about a picture with these features (N,D)."""
    processor = model.processor
    assert processor is not None
    asked, told = processor.ids(processor.chat_text([Message("user", question, (1,))])), processor.ids(answer)
    ids = torch.tensor([asked + told])
    hidden = model.mllm(model.mllm.embed(ids, ids == processor.image_id, features[None]), torch.ones_like(ids))
    logs = model.mllm.logits(hidden[:, len(asked) - 1 : -1]).log_softmax(-1)[0]
    return float(logs[torch.arange(len(told)), torch.tensor(told)].mean())


def likings(model: UniLIP, prompt: str, features: Tensor) -> dict[str, list[float]]:
    """How much the model likes each picture (M,N,D), by each way."""
    found: dict[str, list[float]] = {}
    for question in QUESTIONS:
        text = question.format(prompt)
        found[question] = [probability(model, text, "yes", f) - probability(model, text, "no", f) for f in features]
    found["as a caption"] = [probability(model, "Describe the picture.", prompt, f) for f in features]
    return found


@torch.no_grad()
def main() -> None:
    """Read the options, draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--world", default="pico")
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--preset", default="fast")
    o = parser.parse_args()
    model, world = UniLIP.from_pretrained(o.model), World.preset(o.world)
    bench = Bench(model, world, Atlas.load(None), count=-(-o.prompts // 13), seeds=1, preset=o.preset)
    items = [item for item in bench.plan("gen") if item.mode != UNGUIDED and "noise" not in item.data]
    random.Random(0).shuffle(items)
    right, chosen = [], dict[str, list[bool]]()
    for item in items[: o.prompts]:
        prompt, generators = item.data["prompt"], [noise_generator(item.data["prompt"], s) for s in range(o.seeds)]
        images = model.generate([prompt] * o.seeds, generator=generators, preset=o.preset, progress=False)
        readings = [bench.judge.read(np.asarray(image)) for image in images]
        right.append([judge_prompt(r, item.data["scene"], item.data["task"], world).ok for r in readings])
        for way, liked in likings(model, prompt, model.features(to_pixels(list(images)))).items():
            chosen.setdefault(way, []).append(right[-1][int(np.argmax(liked))])
    table = np.array(right)
    mixed = table.any(1) & ~table.all(1)
    print("| | all | mixed |\n|---|---|---|")
    print(f"| prompts | {len(table)} | {mixed.sum()} |")
    print(f"| one picture | {table.mean():.3f} | {table[mixed].mean():.3f} |")
    print(f"| any of {o.seeds} | {table.any(1).mean():.3f} | 1 |")
    for way, picks in chosen.items():
        print(f"| {way} | {np.mean(picks):.3f} | {np.array(picks)[mixed].mean():.3f} |")


if __name__ == "__main__":
    main()
