"""Save and convert checkpoints: whole or not at all, at most one shard in memory.

Out: a folder of config.json, model.safetensors (or shards and their index), tokenizer files and a model card.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unilip.checkpoints import read
from unilip.checkpoints.foreign import authors_configs, diffusers_files, internvl_files
from unilip.checkpoints.hub import BESIDE, CARD, INDEX, Source, local, model_card, previous_of, push_to_hub, read_json
from unilip.checkpoints.infer import expected_shapes
from unilip.checkpoints.tables import HEAD, POINTWISE, QUERIES, Shape, check_shapes, unmap_names
from unilip.checkpoints.tokenizer import TOKENIZER_FILES
from unilip.errors import CheckpointError, check_choice, reason
from unilip.fast.quantise import flatten
from unilip.files import remove, replacing
from unilip.method.config import FORMAT, UniLIPConfig
from unilip.method.model import PARTS

Files = Mapping[str, Mapping[str, Any] | str]  # content by name
Item = tuple[str, Shape, torch.dtype, Callable[[], Tensor]]  # name, shape, stored type, how to get it

FORMATS = ("unilip", "authors", "transformers", "diffusers")
OF_INTERNVL = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
OURS = ("config.json", *BESIDE, *TOKENIZER_FILES, *OF_INTERNVL)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save(
    model: nn.Module | Mapping[str, Tensor],
    config: UniLIPConfig,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    tokenizer: Any = None,
    dtype: read.DType = None,
    metadata: Mapping[str, str] | None = None,
    to: str = "unilip",
) -> Path:
    """Write a checkpoint in our own format, whole or not at all; returns its folder.

    In: model: a model, or its state dict (any subset of whole parts). folder: new, empty, or an older checkpoint, which
    is replaced; other files in it are kept. tokenizer: one of `checkpoints.tokenizer`, or of transformers. dtype:
    stored type of floating tensors, but for quantised ones, which stay in torchao's layout. metadata: texts kept in the
    weights file. to: "unilip", or "diffusers", whose folder holds the same files one level lower.
    Raises CheckpointError: the folder holds something else, or the tensors do not fit the config, or are no numbers.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    names = [name for name in state if not (name == HEAD and config.text.tie_embeddings)]
    held = {name.split(".")[0] for name in names}
    expected = expected_shapes(config, [part for part in PARTS if part in held])
    check_shapes({name: tuple(state[name].shape) for name in names}, expected, "The model to be saved")
    flat, about = flatten({name: state[name] for name in names})
    if about and dtype is not None:
        raise CheckpointError("A quantised model is saved as it is; leave dtype out.")
    items: list[Item] = [(n, tuple(t.shape), t.dtype, partial(flat.__getitem__, n)) for n, t in flat.items()]
    files = _own_files(config, items, tokenizer, dtype, to)
    notes = {**(metadata or {}), **about}
    return _write_folder(Path(folder), items, files, parse_size(max_shard_size), tokenizer, dtype, notes)


def _own_files(config: UniLIPConfig, items: Sequence[Item], tokenizer: Any, dtype: read.DType, to: str) -> Files:
    held = {name.split(".")[0] for name, *_ in items}
    lacking = [part for part in ("pixel_decoder", "mllm", "connector", "dit") if part not in held]
    lacking += ["tokenizer"] if tokenizer is None else []
    if to == "diffusers" and lacking:
        raise CheckpointError(f"There is no {', '.join(lacking)}, which a pipeline needs; load a whole model.")
    stored = items[0][2] if dtype is None else read.parse_dtype(dtype) or items[0][2]
    card = model_card(config, [part for part in PARTS if part in held], str(stored).removeprefix("torch."), to)
    return {CARD: card, **(diffusers_files(config) if to == "diffusers" else {"config.json": config.to_dict()})}


def _write_folder(
    folder: Path, items: list[Item], files: Files, limit: int, tokenizer: Any, dtype: read.DType, notes: dict[str, str]
) -> Path:
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(os.path.abspath(local(folder)))
    wanted = None if dtype is None else read.parse_dtype(dtype)
    if wanted is not None:
        items = [(n, shape, wanted if t.is_floating_point else t, get) for n, shape, t, get in items]
    empty = {name: torch.empty(shape, dtype=stored, device="meta") for name, shape, stored, _ in items}
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=limit)
    by_name = {item[0]: item for item in items}
    with _one_line(folder), _replacing(folder) as new:
        weights, words = (new / name if INDEX in files else new for name in ("model", "tokenizer"))
        weights.mkdir(exist_ok=True)
        for file, names in split.filename_to_tensors.items():
            _write_shard(weights / file, [by_name[name] for name in names], {"format": "pt", **notes})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2) + "\n"
            (weights / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(words))
        for name, data in files.items():
            if name != CARD or not (folder / name).exists():  # a card that somebody wrote stays
                text = data if isinstance(data, str) else json.dumps(data, indent=2) + "\n"
                (new / name).write_text(text, encoding="utf-8")
    return folder


def parse_size(size: str | int) -> int:
    """Return bytes of "5GB", "200MB" or a number. Raises CheckpointError: not a size."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(KB|MB|GB|B)?\s*", str(size), re.IGNORECASE)
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    value = int(float(match[1]) * units[(match[2] or "B").upper()]) if match else 0
    if value <= 0:
        raise CheckpointError(f'max_shard_size is {size!r}; give a size like "5GB" or "200MB".')
    return value


def _write_shard(path: Path, items: Sequence[Item], metadata: dict[str, str]) -> None:
    """Write one file of weights; what it takes to hold its tensors is free again when this returns."""
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; the library would let nobody else read the file
    tensors = {}
    for name, _, dtype, get in items:
        sound = read.check_weights(get().detach(), name, "Nothing was saved, for it could not be loaded")
        tensors[name] = read.cast(sound.to("cpu", copy=True), dtype, name).contiguous()
    save_file(tensors, path, metadata)
    path.chmod(mode)


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Say why a folder could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = f"{str(folder)[:200]} cannot be written ({reason(error, 120)}); what was there is whole"
        raise CheckpointError(f"{why}. Make room, or give another folder.") from error


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling folder that takes the place of `folder` once all is written, or vanishes on any error."""
    previous = previous_of(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)  # a save was interrupted between its two renames
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is a file or a link; give a folder to save into.")
    pipeline = (folder / INDEX).is_file()
    if folder.is_dir() and any(folder.iterdir()):
        config = folder / "model" / "config.json" if pipeline else folder / "config.json"
        data = read_json(config) if config.is_file() else {}
        if data.get("format") != FORMAT and data.get("model_type") != "unilip_internvl":
            raise CheckpointError(f"{folder} holds something that is not a UniLIP checkpoint; give a new folder.")
    theirs = {*OURS, *((INDEX, "pipeline.py", "model", "tokenizer") if pipeline else ())}
    try:
        with replacing(folder) as new:
            new.mkdir()
            yield new
            for old in folder.iterdir() if folder.exists() else ():
                if not (old.name in theirs or _WEIGHTS.fullmatch(old.name) or (new / old.name).exists()):
                    if old.is_dir() and not old.is_symlink():
                        shutil.copytree(old, new / old.name, symlinks=True, copy_function=_link)
                    else:
                        _link(old, new / old.name)
            if folder.exists():
                remove(previous)
                folder.rename(previous)
    except BaseException:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise
    remove(previous)


def _link(old: str | Path, new: str | Path) -> None:
    """Bring a bystander along without moving it: a hard link, or a copy where there are none; a link stays one."""
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)


def push_model(model: Any, repo_id: str, *, dtype: read.DType = None, **options: Any) -> str:
    """Save a model or pipeline to a temporary folder and upload it; `options` are those of `push_to_hub`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder, dtype=dtype)
        return push_to_hub(folder, repo_id, **options)


def convert(
    source: Source,
    destination: str | os.PathLike[str],
    to: str = "unilip",
    *,
    dtype: read.DType = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Rewrite any checkpoint in one of `FORMATS`. Raises CheckpointError: no such one, or it cannot hold the model."""
    check_choice("format to convert to called", to, FORMATS, CheckpointError)
    opened = read.open_checkpoint(source)
    opened.require_plain("only plain weights can be converted")
    metadata = dict(opened.metadata)
    if opened.image_token_id is not None:
        metadata["image_token_id"] = str(opened.image_token_id)
    if to in ("unilip", "diffusers"):
        items: list[Item] = [(n, opened.shape(n), opened.dtype(n), partial(opened.tensor, n)) for n in opened.names]
        expected = expected_shapes(opened.config, opened.parts)
        for name in opened.absent:
            shape, stored = expected[name], opened.dtype(opened.names[0])
            items.append((name, shape, stored, partial(read.fresh_tensor, shape, stored)))
        if opened.absent:
            metadata["created"] = ",".join(opened.absent)
        files = _own_files(opened.config, items, opened.tokenizer, dtype, to)
    elif to == "authors":
        _require(opened, tuple(PARTS), "the authors' format holds whole models only")
        files = authors_configs(opened.config, opened.image_token_id)
        items = _renamed(opened, "authors", opened.names)
    else:
        _require(opened, ("encoder", "mllm"), "InternVL needs them")
        files = internvl_files(opened.config, opened.tokenizer)
        kept = [name for name in opened.names if name.startswith(("encoder.", "mllm.")) and name != QUERIES]
        items = _renamed(opened, "internvl", kept)
    return _write_folder(Path(destination), items, files, parse_size(max_shard_size), opened.tokenizer, dtype, metadata)


def _require(opened: read.Checkpoint, parts: Sequence[str], why: str) -> None:
    if lacking := [part for part in parts if part not in opened.parts]:
        raise CheckpointError(f"{opened.path} has no {', '.join(lacking)}; {why}.")


def _renamed(opened: read.Checkpoint, kind: str, names: Sequence[str]) -> list[Item]:
    """Give tensors of ours under their names, stacked where theirs are."""
    items: list[Item] = []
    for theirs, group in unmap_names(kind, names).items():
        first, *rest = opened.shape(group[0])
        shape = (first * len(group), *rest, *((1, 1) if POINTWISE.fullmatch(group[0]) else ()))
        items.append((theirs, shape, opened.dtype(group[0]), partial(_stack, opened, group, shape)))
    return items


def _stack(opened: read.Checkpoint, group: Sequence[str], shape: Shape) -> Tensor:
    tensors = [opened.tensor(name) for name in group]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(shape)
