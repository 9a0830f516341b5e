"""Draw the figures of README and docs/method.md: all abilities, features before and after distillation, what queries
read, denoising, edits, and what the embedded model was taught to draw.

    python scripts/figures.py
    python scripts/figures.py --before runs/pico/recon/final --only features

Goes in: the embedded model with its bundled example pictures, and for `features` a checkpoint with the encoder as it
was before distillation (with its own head and decoder where it has them, as the result of stage `recon` does). Comes
out: docs/figures/*.png. Nothing is chosen by looking: the examples are the bundled ones in their order, the seed is 0.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unilip import UniLIP
from unilip.demo import examples, judge
from unilip.emoji.concepts import SHAPES, concept
from unilip.emoji.edits import Edit
from unilip.emoji.judge import judge_edit, judge_prompt
from unilip.emoji.render import render
from unilip.emoji.score import accepts
from unilip.emoji.world import Scene, World
from unilip.method.qwen2 import Attention, Rotation, rotate
from unilip.method.text import NEEDED_TOKENS
from unilip.pictures import to_pixels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "src" / "unilip" / "weights" / "examples"
BEFORE = "runs/pico/recon/final"
SHOWN_STEPS = (1, 8, 12, 16, 18, 20)


def pyplot() -> Any:
    """Import matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def open_picture(name: str) -> Image.Image:
    """Open a bundled picture."""
    with Image.open(EXAMPLES / name) as stored:
        return stored.convert("RGB")


def grid(rows: Sequence[tuple[str, Sequence[Any]]], titles: Sequence[str], width: float = 1.25) -> Any:
    """Lay pictures out in labelled rows; None leaves a place empty."""
    count = max(len(pictures) for _, pictures in rows)
    figure, axes = pyplot().subplots(
        len(rows), count, figsize=(width * count + 1.1, width * len(rows) + 0.35), squeeze=False, layout="constrained"
    )
    for line, (label, pictures) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for n, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if n >= len(pictures) or pictures[n] is None:
                axis.axis("off")
            else:
                axis.imshow(np.asarray(pictures[n]), interpolation="nearest")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=7)
    return figure


# --- all that the model does ------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_overview(model: UniLIP) -> Any:
    """All bundled examples, right or wrong: the prompts, the edits, a question of each picture, its reconstruction."""
    record, world = examples(), judge().world

    def generators(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(0) for _ in range(count)]

    def right(picture: Image.Image, scene: dict[str, Any], task: str = "recon") -> bool:
        return judge_prompt(judge().read(picture), Scene.from_dict(scene), task, world).ok

    entries, prompts, asked, edits = (record[name] for name in ("pictures", "prompts", "asked", "edits"))
    pictures = [open_picture(entry["file"]) for entry in entries]
    questions = [entry["questions"][0] for entry in entries]
    answers = model.ask(pictures, [q["question"] for q in questions], max_new_tokens=32)
    again = model.reconstruct(pictures).images
    sources, wanted = [open_picture(e["source"]) for e in edits], [e["instruction"] for e in edits]
    edited = model.edit(sources, wanted, generator=generators(len(edits)), progress=False).images
    drawn = model.generate(prompts, generator=generators(len(prompts)), progress=False).images
    scenes = [(Scene.from_dict(e["source_scene"]), Scene.from_dict(e["target_scene"])) for e in edits]
    changes = [
        Edit(before, e["instruction"], after, e["kind"]) for e, (before, after) in zip(edits, scenes, strict=True)
    ]
    done = [judge_edit(judge(), image, edit).ok for image, edit in zip(edited, changes, strict=True)]
    rows: list[tuple[str, list[tuple[str, Any, bool | None]]]] = [
        ("draw", [(p, x, right(x, a["scene"], a["task"])) for p, x, a in zip(prompts, drawn, asked, strict=True)]),
        ("edit", [
            cell for source, words, image, ok in zip(sources, wanted, edited, done, strict=True)
            for cell in (("before", source, None), (words, image, ok))
        ]),
        ("ask", [
            (f"{q['question']}\n“{a}”", p, accepts(a, q["answers"]))
            for q, a, p in zip(questions, answers, pictures, strict=True)
        ]),
        ("reconstruct", [("", x, right(x, e["scene"])) for x, e in zip(again, entries, strict=True)]),
    ]  # fmt: skip
    count = max(len(cells) for _, cells in rows)
    figure, axes = pyplot().subplots(
        len(rows), count, figsize=(2 * count + 0.3, 2.35 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (label, cells) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=12)
        for axis, (title, picture, ok) in zip(line, cells, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#d0d0d0")
            axis.imshow(np.asarray(picture), interpolation="nearest")
            axis.set_title("\n".join(textwrap.fill(part, 25) for part in title.split("\n")), fontsize=9)
            if ok is not None:
                mark, colour = ("✓", "#1a7f37") if ok else ("✗", "#c62828")
                axis.set_xlabel(mark, color=colour, fontsize=12, labelpad=1)
    return figure


# --- features before and after distillation ---------------------------------------------------------------------------


@torch.no_grad()
def encode(model: UniLIP, pictures: Sequence[Image.Image]) -> Tensor:
    """Return features (B,N,D) of pictures."""
    return model.encoder(to_pixels(list(pictures)))


def as_colours(features: Tensor, basis: Tensor, mean: Tensor, scale: Tensor) -> list[np.ndarray]:
    """Show the first three principal components of features (B,N,D) as red, green and blue, a square a token."""
    side = round(features.shape[1] ** 0.5)
    values = ((features - mean) @ basis / scale * 0.25 + 0.5).clamp(0, 1)
    return list(values.reshape(len(features), side, side, 3).numpy())


def draw_features(model: UniLIP, before: str) -> Any:
    """Features of both encoders in one basis, and what each gives back of the pictures."""
    old = UniLIP.from_pretrained(before)
    pictures = [open_picture(entry["file"]) for entry in examples()["pictures"]]
    first, last = encode(old, pictures), encode(model, pictures)
    flat = first.flatten(0, 1)
    mean = flat.mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T  # D 3, of the original's features
    scale = ((flat - mean) @ basis).std(0)
    rows = [("input", pictures), ("features of\nthe original", as_colours(first, basis, mean, scale))]
    if {"latent_head", "pixel_decoder"} <= set(old.parts):
        rows.append(("drawn from\nthem", old.reconstruct(pictures).images))
    rows.append(("features after\ndistillation", as_colours(last, basis, mean, scale)))
    rows.append(("drawn from\nthem", model.reconstruct(pictures).images))
    apart = float(1 - torch.nn.functional.cosine_similarity(first, last, dim=-1).mean())
    print(f"distance of the features (1 - cosine, mean over tokens): {apart:.4f}")
    return grid(rows, [])


# --- what the queries read --------------------------------------------------------------------------------------------


def attention(attn: Attention, x: Tensor, turn: Rotation, seen: Tensor) -> Tensor:
    """Weights (B,heads,L,L) of an attention, which its fused kernel does not tell."""
    q, k = (
        rotate(project(x).unflatten(-1, (-1, attn.width)).transpose(1, 2), turn)
        for project in (attn.q_proj, attn.k_proj)
    )
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / attn.width**0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@torch.no_grad()
def draw_queries(model: UniLIP) -> Any:
    """Attention of the queries to the words of a prompt, in every layer of the language model, mean over heads."""
    prompt = examples()["prompts"][3]
    processor = model.processor
    assert processor is not None, "the embedded model has a tokenizer"
    tokens = processor.tokenize([processor.generate_text(prompt)])
    special = {processor.tokenizer.token_id(name): name for name in NEEDED_TOKENS}
    ids = tokens.input_ids[0].tolist()
    words = [special.get(i) or processor.tokenizer.decode([i]).replace("\n", "\\n") for i in ids]
    sequence, mask = model.mllm.append_queries(model.mllm.embed(tokens.input_ids), tokens.attention_mask)
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda attn, given: found.append(attention(attn, *given[:3])))
        for layer in model.mllm.language_model.model.layers
    ]
    model.mllm(sequence, mask)
    for hook in hooks:
        hook.remove()
    length = len(words)
    layers = [weights[0].mean(0)[length:, 1:length] for weights in found]  # Q T-1: the first position takes the rest
    figure, axes = pyplot().subplots(
        1, len(layers), figsize=(2.6 * len(layers), 3.4), sharey=True, layout="constrained"
    )
    for n, (axis, weights) in enumerate(zip(axes, layers, strict=True)):
        axis.imshow((weights / weights.sum(-1, keepdim=True)).numpy(), aspect="auto", cmap="magma", vmin=0)
        axis.set_xticks(range(length - 1), words[1:], rotation=90, fontsize=6)
        axis.set_title(f"layer {n + 1}", fontsize=8)
    axes[0].set_ylabel("query")
    return figure


# --- denoising --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_denoising(model: UniLIP) -> Any:
    """The latents of some steps, decoded as they are, for three prompts."""
    prompts = examples()["prompts"][:3]
    kept: dict[int, Tensor] = {}

    def keep(model: UniLIP, step: int, timestep: Tensor, state: dict[str, Tensor]) -> None:
        kept[step + 1] = state["latents"].clone()

    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    model.generate(
        prompts, generator=generators, num_inference_steps=20, output_type="latent", callback_on_step_end=keep,
        progress=False,
    )  # fmt: skip
    decoded = {step: model.from_latent(kept[step]).movedim(1, -1).numpy() for step in SHOWN_STEPS}
    rows = [(prompt.replace(" on ", "\non "), [decoded[s][n] for s in SHOWN_STEPS]) for n, prompt in enumerate(prompts)]
    return grid(rows, [f"step {step}" for step in SHOWN_STEPS])


# --- an edit ----------------------------------------------------------------------------------------------------------


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    """Return where two pictures differ, dark to bright: mean over the channels, brightest from a quarter on."""
    apart = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean(-1) / 255
    colours: np.ndarray = pyplot().get_cmap("magma")(np.clip(apart * 4, 0, 1))[..., :3]
    return colours


@torch.no_grad()
def draw_edits(model: UniLIP) -> Any:
    """Each bundled edit: source, result, what changed, what should have changed."""
    rows = []
    for entry in examples()["edits"]:
        source, target = open_picture(entry["source"]), open_picture(entry["target"])
        result = model.edit(source, entry["instruction"], generator=torch.Generator().manual_seed(0), progress=False)
        made = result.images[0]
        again = model.reconstruct(source).images[0]
        words = entry["instruction"].split()
        label = " ".join(words[: len(words) // 2]) + "\n" + " ".join(words[len(words) // 2 :])
        rows.append((label, [source, again, made, target, difference(again, made), difference(source, target)]))
    return grid(
        rows, ["source", "reconstructed", "edited", "exact target", "what the edit changed", "what should change"]
    )


# --- the embedded model's world ---------------------------------------------------------------------------------------


def draw_world() -> Any:
    """Everything that the embedded model was taught to draw: things, colours, backgrounds."""
    world, atlas = World.preset("pico"), judge().atlas
    things = [name for name in world.concepts if name not in world.generation_held_out]

    def sprite(name: str, colour: str | None) -> np.ndarray:
        image = atlas.sprite(name, world.default_style, 48, colour)
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return np.asarray(white.convert("RGB"))

    cells = [(concept(name).phrase, sprite(name, "red" if name in SHAPES else None)) for name in things]
    cells += [(f"a {colour} car", sprite("car", colour)) for colour in world.colours]
    cells += [(f"on {'an' if name[0] in 'aeiou' else 'a'} {name} background", render(Scene(name, ()), atlas, world))
              for name in world.backgrounds]  # fmt: skip
    rows = -(-len(cells) // 12)
    figure, axes = pyplot().subplots(rows, 12, figsize=(12, 1.25 * rows), layout="constrained")
    for axis, cell in itertools.zip_longest(axes.flat, cells):
        axis.axis("off")
        if cell:
            axis.imshow(cell[1], interpolation="nearest")
            axis.set_title(textwrap.fill(cell[0], 14), fontsize=8)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure as a small PNG of 256 colours, whole or not at all."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=80)
    pyplot().close(figure)
    small = Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    temporary = path.with_name(f".{path.name}.part")
    small.save(temporary, "PNG", optimize=True)
    os.replace(temporary, path)
    return path


def main() -> None:
    """Draw the figures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("overview", "features", "queries", "denoising", "edits", "world")
    parser.add_argument("--before", default=BEFORE, help=f"checkpoint with the encoder before distillation ({BEFORE})")
    parser.add_argument("--model", help="the model; the embedded one by default")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures", help="folder (docs/figures)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these figures only")
    o = parser.parse_args()
    model = UniLIP.from_pretrained(o.model)
    draw: dict[str, Callable[[], Any]] = {
        "overview": lambda: draw_overview(model),
        "features": lambda: draw_features(model, o.before),
        "queries": lambda: draw_queries(model),
        "denoising": lambda: draw_denoising(model),
        "edits": lambda: draw_edits(model),
        "world": draw_world,
    }
    o.output.mkdir(parents=True, exist_ok=True)
    for name in o.only:
        figure = draw[name]()
        print(save(figure, o.output / f"{name}.png"))


if __name__ == "__main__":
    main()
