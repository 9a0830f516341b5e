"""Describe a checkpoint without loading it.

In:  anything that `checkpoints.read.open_checkpoint` takes.
Out: plain values ready for JSON: what it is, its parts and sizes, its config, and what the position embedding of its
     diffusion transformer means.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import Checkpoint, open_checkpoint
from unilip.checkpoints.tables import EMBEDDING, HEAD, KINDS


def describe(source: Source = None) -> dict[str, Any]:
    """Return what a checkpoint is: kind, parts with parameter counts, types, size on disk, config, what is dropped.

    Raises:
        CheckpointError: it cannot be opened.
    """
    opened = open_checkpoint(source)
    parameters: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for name in opened.names:
        count = prod(opened.shape(name))
        parameters[name.split(".")[0]] += count
        types[str(opened.dtype(name)).removeprefix("torch.")] += count
    return {
        "name": opened.config.name,
        "path": str(opened.path),
        "kind": opened.kind,
        "title": KINDS[opened.kind].title,
        "parts": {part: parameters[part] for part in opened.parts},
        "parameters": sum(parameters.values()),
        "dtype": types.most_common(1)[0][0],
        "dtypes": dict(types),
        "size_on_disk": sum(file.stat().st_size for file in opened.weights.files),
        "files": [file.name for file in opened.weights.files],
        "tokenizer": opened.tokenizer_path is not None,
        "image_size": opened.config.image_size,
        "interpolation_scale": opened.config.dit.interpolation_scale if "dit" in opened.parts else None,
        "position_embedding": _position_embedding(opened),
        "language_head": _language_head(opened),
        "absent": list(opened.absent),
        "dropped": dict(opened.dropped),
        "notes": list(opened.notes),
        "metadata": dict(opened.metadata),
        "config": opened.config.to_dict(),
    }


def _position_embedding(opened: Checkpoint) -> str:
    if "dit" not in opened.parts:
        return "no diffusion transformer here"
    scale = opened.config.dit.interpolation_scale
    if scale is None:
        return "off: the diffusion transformer sees no positions of the latent grid, as plain SANA"
    return f"on, scale {scale:g}: sin-cos positions are added to the latent grid, as all released UniLIP weights expect"


def _language_head(opened: Checkpoint) -> str:
    if "mllm" not in opened.parts:
        return "no language model here"
    if opened.config.text.tie_embeddings:
        return "tied to the token embedding"
    same = opened.shape(HEAD) == opened.shape(EMBEDDING) and torch.equal(opened.tensor(HEAD), opened.tensor(EMBEDDING))
    return "stored, equal to the token embedding" if same else "stored, differs from the token embedding"
