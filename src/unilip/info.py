"""Describe a checkpoint, anything that `open_checkpoint` takes, without loading it: plain values ready for JSON."""

import contextlib
import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch

from unilip.adapters import CONFIG, WEIGHTS, read_adapter
from unilip.checkpoints.hub import Adapted, Source, adapted, local
from unilip.checkpoints.read import open_checkpoint
from unilip.checkpoints.tables import EMBEDDING, HEAD, KINDS
from unilip.errors import CheckpointError
from unilip.fast import products
from unilip.machine import processor, spare_memory


def describe(source: Source = None) -> dict[str, Any]:
    """Return kind, parts with parameter counts, types, sizes, config, what is dropped; of an adapter base and ranks.

    Raises CheckpointError: it cannot be opened.
    """
    folder = local(source) if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return _describe_adapter(folder)
    opened = open_checkpoint(source)
    position = few = "no diffusion transformer here"
    if "dit" in opened.parts:
        scale, steps = opened.config.dit.interpolation_scale, ", ".join(map(str, opened.config.dit.few_steps))
        position = "off: the diffusion transformer sees no positions of the latent grid, as plain SANA"
        if scale is not None:
            does = "sin-cos positions are added to the latent grid, as all released UniLIP weights expect"
            position = f"on, scale {scale:g}: {does}"
        few = f"{steps}: the preset turbo draws in so many jumps" if steps else "none: not trained for the preset turbo"
    head = "no language model here"
    if "mllm" in opened.parts:
        same = opened.config.text.tie_embeddings or opened.same(HEAD, EMBEDDING)
        head = f"stored, {'equal to' if same else 'differs from'} the token embedding"
        head = "tied to the token embedding" if opened.config.text.tie_embeddings else head
    parameters, types = Counter[str](), Counter[str]()
    for name in opened.names:
        count = prod(opened.shape(name))
        parameters[name.split(".")[0]] += count
        types[str(opened.dtype(name)).removeprefix("torch.")] += count
    return {
        "name": opened.config.name, "path": str(opened.path), "kind": opened.kind, "title": KINDS[opened.kind].title,
        "parts": {part: parameters[part] for part in opened.parts}, "parameters": sum(parameters.values()),
        "dtype": types.most_common(1)[0][0], "dtypes": dict(types),
        "size_on_disk": sum(file.stat().st_size for file in opened.weights.files),
        "files": [file.name for file in opened.weights.files], "tokenizer": opened.tokenizer_path is not None,
        "image_size": opened.config.image_size,
        "interpolation_scale": opened.config.dit.interpolation_scale if "dit" in opened.parts else None,
        "position_embedding": position, "few_steps": few, "language_head": head, "absent": list(opened.absent),
        "dropped": dict(opened.dropped), "notes": list(opened.notes), "metadata": dict(opened.metadata),
        "config": opened.config.to_dict(),
    }  # fmt: skip


def machine(source: Source = None) -> dict[str, Any]:
    """Return what this machine is, and what the products of a checkpoint's transformer take on its processor, measured.

    `products`: names, shapes (rows, inputs, outputs), milliseconds by way, the library weights are packed for, if any.
    """
    config, rows = open_checkpoint(source).config, []
    for name, shape in products.shapes_of(config).items():
        times = {way: ms for way, ms in products.product_times(shape, anew=True).items() if way in products.WAYS}
        packed = {kind: products.fastest(kind, shape, 20) for kind in ("float32", "bfloat16")}
        row = {"product": name, "shape": list(shape), "measured": list(products.measured_shape(shape))}
        rows.append({**row, "milliseconds": times, "packed": packed})
    threads, free = torch.get_num_threads(), spare_memory()
    about = {"processor": processor(), "torch": str(torch.__version__), "threads": threads, "free_memory": free}
    return {**about, "model": config.name, "products": rows}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    adapter = read_adapter(folder)
    base = adapter.base
    with contextlib.suppress(CheckpointError):
        whole = adapted(folder)
        base = str(Adapted(whole.base, whole.adapters[:-1]))
    parameters: Counter[str] = Counter()
    for layer, tensors in adapter.tensors.items():
        parameters[layer.split(".")[0]] += sum(tensor.numel() for tensor in tensors.values())
    return {
        "path": str(folder), "kind": "adapter",
        "title": f"{'DoRA' if adapter.dora else 'LoRA'} adapter; it stands for its base with itself beside it",
        "base": base, "parts": dict(parameters), "parameters": sum(parameters.values()), "layers": len(adapter.tensors),
        "rank": sorted(set(adapter.rank.values())), "dora": adapter.dora, "few_steps": list(adapter.few_steps),
        "size_on_disk": (folder / WEIGHTS).stat().st_size,
    }  # fmt: skip
