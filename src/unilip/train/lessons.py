"""Lessons beside the three objectives: heads for training alone, and what they are to tell.

Out: a loss, and the shares told right. B batch, N image tokens, Q queries, L length, M marked words, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.emoji.lessons import MARK, SUMMARY, UNKNOWN, classes, numbers
from unilip.method.config import TextConfig
from unilip.method.qwen2 import TextLayer, positions, rotate, rotation
from unilip.method.text import Processor, Tokens

CELL = ("concept", "colour", "background")
Terms = dict[str, Tensor]


def cell_heads(width: int) -> nn.ModuleDict:
    """Return what tells from a state what lies on an image token, and what is behind."""
    return nn.ModuleDict({kind: nn.Linear(width, classes(kind)) for kind in CELL})


def ground_loss(head: nn.Module, states: Tensor, grounds: Tensor) -> tuple[Tensor, Terms]:
    """What the states (B,L,D) of words tell of where that lies which they name: `grounds` (M,4+N) of `grounded`."""
    told, target = head(states[grounds[:, 0], grounds[:, 1]]).float(), grounds[:, 4:].float()
    # the mean over words of the sum over image tokens
    loss = F.binary_cross_entropy_with_logits(told, target, reduction="sum") / max(len(grounds), 1)
    right, some = ((told > 0) == (target > 0)).all(-1), target.any(-1)  # all tokens of a word
    return loss, {"ground": mean(right[some]), "ground_none": mean(right[~some])}


def look_loss(layer: TextLayer, x: Tensor, tokens: Tokens, grounds: Tensor, text: TextConfig) -> tuple[Tensor, Terms]:
    """Where words look in a layer whose input is x (B,L,D): at what they name, at no image token if it is not there.

    One head of each group is asked, under the softmax over all that a word sees; told is its share on what is named.
    """
    rows, columns, targets = grounds[:, 0], grounds[:, 1], grounds[:, 4:].float()
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    turns = rotation(positions(tokens.attention_mask), text)
    both = (project(normed).unflatten(-1, (-1, attention.width)) for project in (attention.q_proj, attention.k_proj))
    q, k = (rotate(heads.transpose(1, 2), turns) for heads in both)
    q, k = q[rows, :, columns][:, :: q.shape[1] // k.shape[1]].float(), k[rows].float()  # M G d, M G L d
    logits = (k * q[:, :, None]).sum(-1) / attention.width**0.5  # M G L
    later = torch.arange(x.shape[1], device=x.device) > columns[:, None]
    shares = logits.masked_fill(later[:, None], -torch.inf).softmax(-1)
    slots = tokens.image_slots[rows]
    named = torch.zeros(slots.shape, device=x.device).masked_scatter(slots, targets)
    some = targets.any(-1)
    on, anywhere = (shares * named[:, None]).sum(-1), (shares * slots[:, None]).sum(-1)  # M G
    missed = torch.where(some[:, None], on, 1 - anywhere).clamp(min=1e-6).log().mean()
    return -missed, {"look": mean(on[some]), "look_none": mean(1 - anywhere[~some])}


def slot_words(processor: Processor) -> dict[str, Tensor]:
    """Return for each kind of `CELL` what its classes are called: shares (classes,V) of tokens, none for "nothing"."""
    found = {}
    for kind in CELL:
        found[kind] = torch.zeros(classes(kind), processor.config.text.vocab_size)
        for name, number in numbers(kind).items():
            ids = processor.ids(f" {name}") if name else []
            for token in ids:
                found[kind][number, token] += 1 / len(ids)
    return found


def slot_loss(logits: Tensor, cells: Tensor, words: dict[str, Tensor]) -> tuple[Tensor, Terms]:
    """What the slots of pictures say in words (B,N,V) of the cells (B,N,3) they show: thing and paint, or ground."""
    concept, colour, background = (words[kind].to(logits.device)[cells[..., i]] for i, kind in enumerate(CELL))
    covered = cells[..., 0] > 0
    wanted = torch.where(covered[..., None], concept + colour, background)
    loss, share = say_loss(logits.flatten(0, 1), wanted.flatten(0, 1))
    return loss, {"slot_word": mean(share[covered.flatten()])}


def word_loss(logits: Tensor, grounds: Tensor, words: dict[str, Tensor]) -> tuple[Tensor, Terms]:
    """What names of things and paints say in words (M,V): themselves, so that they and image tokens can be compared."""
    concept, colour = (words[kind].to(logits.device)[grounds[:, 2 + i]] for i, kind in enumerate(("concept", "colour")))
    loss, share = say_loss(logits, concept + colour)
    return loss, {"own_word": mean(share)}


def say_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (M,V) with shares of tokens (M,V), and in which rows the likeliest is one of them."""
    right = wanted.gather(-1, logits.argmax(-1, keepdim=True))[:, 0] > 0
    return F.cross_entropy(logits, wanted / wanted.sum(-1, keepdim=True)), right


def bind_heads(width: int) -> nn.ModuleDict:
    """Return what tells from states what words and whole texts say."""
    heads = {kind: nn.Linear(width, classes(kind)) for kind in (*MARK, *SUMMARY)}
    present = nn.Linear(width, classes("concept"))
    nn.init.constant_(present.bias, -5.0)  # of hundreds of concepts a caption has one or two
    return nn.ModuleDict(heads | {"present": present})


def told(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy (in float32) and the share that is right, of those whose target is known; 0 where none is."""
    known = target != UNKNOWN
    logits = logits.float()
    loss = F.cross_entropy(logits, target, weight, ignore_index=UNKNOWN, reduction="sum")
    count = known.sum() if weight is None else weight[target[known]].sum()
    right = ((logits.argmax(-1) == target) & known).sum() / known.sum().clamp(min=1)
    return loss / count.clamp(min=1), right


def mean(values: Tensor) -> Tensor:
    """The mean in float32; 0 of none."""
    return values.float().sum() / max(values.numel(), 1)


def local_loss(heads: Any, features: Tensor, cells: Tensor) -> tuple[Tensor, Terms]:
    """What features (B,N,D) tell of cells (B,N,3) and of their place; shares of concept and colour on objects alone."""
    b, n = cells.shape[:2]
    total, terms = torch.zeros((), device=features.device), Terms()
    covered = cells[..., 0] > 0
    for kind, target in (*zip(CELL, cells.unbind(-1), strict=True), ("place", torch.arange(n).to(cells).expand(b, n))):
        logits = heads[kind](features)
        total = total + told(logits.flatten(0, 1), target.flatten())[0]
        chosen = covered if kind in ("concept", "colour") else torch.ones_like(covered)
        terms[f"local_{kind}"] = told(logits[chosen], target[chosen])[1]
    return total, terms


def cell_loss(heads: Any, states: Tensor, cells: Tensor) -> tuple[Tensor, Terms]:
    """What the states of queries (B,Q,D) tell of cells (B,Q,3) that are known; "nothing" counts a fifth."""
    total, terms = torch.zeros((), device=states.device), Terms()
    for kind, target in zip(CELL, cells.unbind(-1), strict=True):
        weight = torch.ones(classes(kind), device=states.device)
        weight[0] = 0.2
        loss, terms[f"cell_{kind}"] = told(heads[kind](states).flatten(0, 1), target.flatten(), weight)
        total = total + loss
    return total, terms


def bind_loss(heads: Any, states: Tensor, batch: dict[str, Any], length: int) -> tuple[Tensor, Terms]:
    """What the states (B,L,D) of words tell at `marks`, and that of the last of `length` tokens of the whole text."""
    total, terms = torch.zeros((), device=states.device), Terms()
    words, ends = states[batch["marks"][:, 0], batch["marks"][:, 1]], states[:, length - 1]
    for i, kind in enumerate(MARK):
        loss, terms[f"bind_{kind}"] = told(heads[kind](words), batch["marks"][:, 2 + i])
        total = total + (2 if kind == "concept" else 1) * loss
    for i, kind in enumerate(SUMMARY):
        total = total + told(heads[kind](ends), batch["summaries"][:, i])[0]
    known = batch["present"][:, :1] != UNKNOWN
    present = F.binary_cross_entropy_with_logits(
        heads["present"](ends).float(), batch["present"].clamp(min=0), reduction="none"
    )
    return total + (present * known).sum() / known.sum().clamp(min=1), terms
