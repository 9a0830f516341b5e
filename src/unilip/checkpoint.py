"""Checkpoints on disk: find, open lazily, load into a model part by part, save whole or not at all, convert.

In:  a folder, a file, a hub id or nothing (the embedded model), in any format that `convert.KINDS` names.
Out: a `Checkpoint` whose tensors have our names and are read from disk one at a time; a model with nothing left on the
     meta device; or a folder of config.json, model.safetensors (or shards and their index) and tokenizer files.
Every tensor is accounted for in both directions; nothing is loaded loosely.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from unilip.config import FORMAT, UniLIPConfig
from unilip.convert import (
    EMBEDDING,
    HEAD,
    KINDS,
    PART_CLASSES,
    Origin,
    Shape,
    authors_configs,
    check_shapes,
    expected_shapes,
    infer_config,
    map_names,
    unmap_names,
)
from unilip.errors import CheckpointError, ConfigError
from unilip.preprocess import IMG_CONTEXT

Source = str | os.PathLike[str] | None
DType = torch.dtype | str | None
Item = tuple[str, Shape, torch.dtype, Callable[[], Tensor]]  # name, shape, stored type, how to get it

BESIDE = ("dit_config.json", "vae_config.json", "scheduler_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:/([\w.-]+\.(?:pth|pt|bin|safetensors)))?(?:@([\w./-]+))?")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _understood() -> str:
    return "; ".join(kind.title for kind in KINDS.values())


# --- finding --------------------------------------------------------------------------------------------------------


def resolve(source: Source = None) -> Path:
    """Return the local folder or file of a source, fetching it from the hub if it is "owner/name".

    "owner/name@revision" and "owner/name/file.pth" work too. None is the embedded model.

    Raises:
        CheckpointError: nothing is there.
    """
    if source is None:
        return _embedded()
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub = _HUB_ID.fullmatch(str(source))
    if hub and not str(source).startswith("."):
        return _fetch(hub[1], hub[2], hub[3])
    previous = _previous(path)
    hint = f" An interrupted save left the old one whole in {previous}; rename it back." if previous.exists() else ""
    raise CheckpointError(
        f'There is no checkpoint at {path}; give a folder, a file, or a hub id like "owner/name".{hint}'
    )


def _embedded() -> Path:
    root = Path(str(resources.files("unilip"))) / "weights"
    found = [root] if (root / "config.json").is_file() else sorted(p.parent for p in root.glob("*/config.json"))
    if not found:
        raise CheckpointError(
            f"This installation has no embedded model ({root} holds none); name a checkpoint to load."
        )
    return found[0]


def needed_files(files: Iterable[str]) -> list[str]:
    """Choose what to fetch of a repository: configs, tokenizer and weights, each in one format, of the part we read."""
    files = list(files)
    if "model_index.json" in files:  # a diffusers pipeline: its transformer only
        inner = [f.removeprefix("transformer/") for f in files if f.startswith("transformer/")]
        return ["model_index.json", *(f"transformer/{f}" for f in needed_files(inner))]
    top = [f for f in files if "/" not in f]
    chosen = [f for f in top if f == "config.json" or f in BESIDE or f in TOKENIZER_FILES]
    for suffix in _SUFFIXES:
        shards = re.compile(rf"({'|'.join(_STEMS)})(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
        weights = [f for f in top if shards.fullmatch(f)]
        if weights:
            return chosen + weights
    return chosen


def _fetch(repo: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        try:
            there = HfApi().list_repo_files(repo, revision=revision)
        except Exception:  # no network: perhaps it was fetched before
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        files = needed_files(there)
        if not any(name.endswith(_SUFFIXES) for name in files):
            single = [name for name in there if name.endswith(_FILE_SUFFIXES)]
            raise CheckpointError(
                f"{repo} has no weights under a known name"
                + (f"; name one of its files, for example {repo}/{single[0]}." if single else ".")
            )
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except CheckpointError:
        raise
    except Exception as error:  # the client lets errors of several libraries through
        raise CheckpointError(
            f"{repo} is no folder here and could not be fetched from the hub ({_reason(error)}); check the name and "
            "the network, or give a folder."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- reading tensors ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return data


class Weights:
    """Named tensors in one file or several; only shapes are read until a tensor is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}
        self._where: dict[str, tuple[Any, Path]] = {}
        for path in files:
            handle, names = self._open(path)
            self._where |= {name: (handle, path) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, as in the files."""
        return tuple(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def file_of(self, name: str) -> Path:
        """Which file holds a tensor."""
        return self._where[name][1]

    def _open(self, path: Path) -> tuple[Any, list[str]]:
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there.")
        if path.suffix == ".safetensors":
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                self.metadata |= handle.metadata() or {}
                return handle, list(handle.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch or save it again.") from error
        state = _load_pickle(path)
        return state, list(state)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        handle = self._where[name][0]
        return tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        handle, path = self._where[name]
        if isinstance(handle, dict):
            dtype: torch.dtype = handle[name].dtype
            return dtype
        code = handle.get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{path} holds {name} in {code}, which is not supported; convert it to BF16 or F32.")
        return _DTYPES[code]

    def read(self, origin: Origin) -> Tensor:
        """Read a tensor, or one part of a stacked one."""
        handle, path = self._where[origin.name]
        first, *_ = self.shape(origin.name) or (1,)
        if first % origin.parts:
            raise CheckpointError(f"{path} holds {origin.name} with {first} rows, no multiple of {origin.parts}.")
        step = first // origin.parts
        if isinstance(handle, dict):
            tensor: Tensor = handle[origin.name]
            return tensor if origin.parts == 1 else tensor[origin.part * step : (origin.part + 1) * step]
        if origin.parts == 1:
            return handle.get_tensor(origin.name)
        return handle.get_slice(origin.name)[origin.part * step : (origin.part + 1) * step]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a torch file, tensors only: code inside it is never run."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # the format before 2020
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and loading it could run code; it was refused. Save its tensors alone."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}); fetch or save it again.") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors.")
    return dict(state)


def _find_weights(folder: Path) -> Weights:
    for suffix in _SUFFIXES:
        for stem in _STEMS:
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return _open_shards(index)
            if (folder / f"{stem}{suffix}").is_file():
                return Weights([folder / f"{stem}{suffix}"])
    only = sorted(folder.glob("*.safetensors"))
    if len(only) == 1:
        return Weights(only)
    names = ", ".join(f"{stem}{suffix}" for suffix in _SUFFIXES for stem in _STEMS)
    raise CheckpointError(
        f"{folder} has a config.json but no weights; expected one of {names}, or shards and their index."
    )


def _open_shards(index: Path) -> Weights:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) and "/" not in v for v in table.values()):
        raise CheckpointError(f"{index} has no weight_map of file names; fetch or save it again.")
    files = [index.parent / name for name in sorted(set(table.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)}, named in {index.name}; fetch or save it again."
        )
    weights = Weights(files)
    wrong = [name for name, file in table.items() if name not in weights or weights.file_of(name).name != file]
    wrong += [name for name in weights.names if name not in table]
    if wrong:
        raise CheckpointError(
            f"{index} and its shards disagree about {wrong[0]} ({len(wrong)} in all); fetch them again."
        )
    return weights


# --- opening --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened checkpoint: what it is, and its tensors under our names, read when asked for.

    Attributes:
        path: the local folder or file; kind: a key of `convert.KINDS`; config: ours.
        parts: which of the model's parts it holds.
        names: our names of its tensors; absent: what its kind never holds although its parts have it (new queries).
        dropped: their name -> why it is left out; notes: remarks for people; metadata: text stored with the weights.
        tokenizer_path: the folder with tokenizer files, or None; image_token_id: of the image slots, if it is known.
    """

    def __init__(self, path: Path, kind: str, weights: Weights, data: Mapping[str, Any], folder: Path) -> None:
        self.path, self.kind, self.weights = path, kind, weights
        self.metadata = {k: v for k, v in weights.metadata.items() if k != "format"}
        mapped = map_names(kind, weights.names)
        self._origins, self.dropped = mapped.origins, mapped.dropped
        self.notes: list[str] = []
        self._untie(data)
        shapes = {name: self.shape(name) for name in self._origins}
        if kind == "unilip" or data.get("format") == FORMAT:
            try:
                self.config = UniLIPConfig.from_dict(data)
            except ConfigError as error:
                raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        else:
            beside = {name: read_json(folder / name) for name in BESIDE if (folder / name).is_file()}
            self.config = infer_config(kind, data, shapes, beside, path.stem if path.is_file() else path.name)
        held = {name.split(".")[0] for name in shapes}
        allowed = KINDS[kind].parts
        self.parts = tuple(p for p in allowed if p in held) if kind == "unilip" else allowed
        expected = expected_shapes(self.config, self.parts)
        self.absent = tuple(name for name in KINDS[kind].absent if name in expected and name not in shapes)
        check_shapes(shapes, expected, str(path), self.absent)
        self.tokenizer_path = folder if _has_tokenizer(folder) else None
        self.image_token_id = self._image_token_id(data)

    def _image_token_id(self, data: Mapping[str, Any]) -> int | None:
        """Which id the image token has: by the tokenizer files, else as the config or the weights' metadata say."""
        known = {}
        if self.tokenizer_path is not None:
            file, added = self.tokenizer_path / "tokenizer.json", self.tokenizer_path / "added_tokens.json"
            known = {t["content"]: t["id"] for t in (read_json(file).get("added_tokens", []) if file.is_file() else [])}
            known |= read_json(added) if added.is_file() else {}
        found = known.get(IMG_CONTEXT, data.get("image_token_id", self.metadata.get("image_token_id")))
        return None if found is None else int(found)

    def _untie(self, data: Mapping[str, Any]) -> None:
        """Drop a stored language head that the config calls tied, if it really equals the embedding."""
        text = data.get("text_config", {})
        said = data.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        if data.get("format") == FORMAT or not said or HEAD not in self._origins or EMBEDDING not in self._origins:
            return
        if self.shape(HEAD) == self.shape(EMBEDDING) and torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            self.dropped[self._origins.pop(HEAD).name] = "tied: the same numbers as the token embedding"
        else:
            self.notes.append("The language head is called tied, but differs from the embedding: both are used.")

    @property
    def names(self) -> tuple[str, ...]:
        """Our names of the tensors that it holds."""
        return tuple(self._origins)

    def origin(self, name: str) -> Origin:
        """Where a tensor of ours comes from."""
        return self._origins[name]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor of ours, without reading it."""
        origin = self._origins[name]
        shape = self.weights.shape(origin.name)
        return shape if origin.parts == 1 else (shape[0] // origin.parts, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor of ours."""
        return self.weights.dtype(self._origins[name].name)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor of ours; it may be a view of the file, so copy it before changing it."""
        return self.weights.read(self._origins[name])

    def dropped_tensor(self, name: str) -> Tensor:
        """Read a tensor that is left out, under its own name (the DC-AE encoder, for one)."""
        return self.weights.read(Origin(name))


def _has_tokenizer(folder: Path) -> bool:
    return any(
        all((folder / f).is_file() for f in files) for files in (("tokenizer.json",), ("vocab.json", "merges.txt"))
    )


def open_checkpoint(source: Source = None) -> Checkpoint:
    """Find and open a checkpoint of any kind; tensors stay on disk, names and shapes are checked.

    Raises:
        CheckpointError: missing, truncated, of an unknown kind, or at odds with its own config.
    """
    path = resolve(source)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if path.is_file():
        if path.suffix not in _FILE_SUFFIXES:
            raise CheckpointError(f"{path} is no weights file ({', '.join(_FILE_SUFFIXES)}); give one, or a folder.")
        weights, data = Weights([path]), read_json(config) if config.is_file() else {}
        return Checkpoint(path, _kind(path, data, weights.names), weights, data, folder)
    if not config.is_file() and (path / "model_index.json").is_file() and (path / "transformer").is_dir():
        opened = open_checkpoint(path / "transformer")
        opened.notes.append(f"Of the pipeline {path.name} only the folder transformer is used.")
        return opened
    if not config.is_file():
        files = sorted(p.name for p in path.glob("*.pth"))
        hint = f" It holds {files[0]}: give that file." if files else ""
        raise CheckpointError(f"{path} has no config.json, so it is none of these: {_understood()}.{hint}")
    data = read_json(config)
    _kind(path, data, ())  # a folder of another kind is named as such, even when its weights have other names too
    weights = _find_weights(path)
    return Checkpoint(path, _kind(path, data, weights.names), weights, data, path)


def _kind(path: Path, data: Mapping[str, Any], names: Sequence[str]) -> str:
    """Tell the kind of a checkpoint by its config and, where that is not enough, by the names of its tensors."""
    if {"mlp1", "down_mlp"} <= {name.split(".")[0] for name in names}:
        return "tokenizer"
    if not data:
        raise CheckpointError(
            f"{path} alone does not tell what it is; give its folder, with config.json. Known are: {_understood()}."
        )
    model_type, class_name = data.get("model_type"), data.get("_class_name")
    if data.get("format") == FORMAT:
        return "unilip"
    if model_type in ("unilip_internvl", "unilip_vae_internvl"):  # their first stage may carry either
        return "authors-stage1" if any(name.startswith("model.dcae.") for name in names) else "authors"
    if model_type == "internvl":
        return "internvl"
    if class_name in ("AutoencoderDC", "SanaTransformer2DModel"):
        return "dcae" if class_name == "AutoencoderDC" else "sana"
    if model_type == "internvl_chat":
        raise CheckpointError(f"{path} is InternVL3 in its original format; use the repository whose name ends in -hf.")
    what = model_type or class_name or data.get("format") or "nothing known"
    raise CheckpointError(f"{path} is a checkpoint of {what!r}. Understood are: {_understood()}.")


# --- loading --------------------------------------------------------------------------------------------------------


def parse_dtype(dtype: DType) -> torch.dtype | None:
    """Return a floating type from its name; None (the default) is float32 and "auto" gives None, "as stored".

    As stored means float32 on a processor that has no instructions for what is stored, see `computes`.

    Raises:
        CheckpointError: not a floating type of torch.
    """
    if dtype == "auto":
        return None
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"There is no dtype {dtype!r}; allowed: float32, bfloat16, float16, auto.")
    return found


CPU_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def computes(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether DEVICE multiplies matrices in DTYPE itself; a processor without the instructions is faster in float32."""
    if torch.device(device).type != "cpu" or dtype not in CPU_INSTRUCTIONS:
        return True
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in CPU_INSTRUCTIONS[dtype])
    return dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.no_grad()
def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: DType = None,
    device: torch.device | str = "cpu",
    parts: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Give parts of a model (built on the meta device, or any) the weights of a checkpoint, one tensor at a time.

    Returns the names that the checkpoint never holds and that were drawn at random, the same every time: the queries of
    a language model that is no UniLIP yet. Buffers that are computed rather than stored are computed in float32.

    Raises:
        CheckpointError: a part is not in the checkpoint, or does not fit exactly.
    """
    target = parse_dtype(dtype)
    wanted = checkpoint.parts if parts is None else tuple(parts)
    lacking = [part for part in wanted if part not in checkpoint.parts]
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path} has no {', '.join(lacking)}; it holds: {', '.join(checkpoint.parts)}."
        )
    modules = {part: model.get_submodule(part) for part in wanted}
    tied = "mllm" in modules and checkpoint.config.text.tie_embeddings
    expected = {f"{part}.{n}": tuple(t.shape) for part, m in modules.items() for n, t in m.state_dict().items()}
    if tied:
        expected.pop(HEAD)
    found = {name: checkpoint.shape(name) for name in checkpoint.names if name.split(".")[0] in modules}
    check_shapes(found, expected, str(checkpoint.path), checkpoint.absent)

    def read(name: str, like: Tensor) -> Tensor:
        if name not in found:
            return fresh_tensor(tuple(like.shape), target or like.dtype).to(device)
        value = checkpoint.tensor(name)
        stored = value.dtype if computes(value.dtype, device) else torch.float32
        cast = (target or stored) if value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=cast, copy=True)  # a copy never depends on the file again

    for part, root in modules.items():
        for prefix, module in root.named_modules(prefix=part):
            for key, old in list(module._parameters.items()):
                name = f"{prefix}.{key}"
                if old is not None and not (tied and name == HEAD):
                    setattr(module, key, nn.Parameter(read(name, old), requires_grad=old.requires_grad))
            computed = [key for key in module._buffers if key in module._non_persistent_buffers_set]
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and key not in computed:
                    module._buffers[key] = read(f"{prefix}.{key}", buffer)
            if any(module._buffers[key] is not None for key in computed):
                for key, value in _computed_buffers(module).items():
                    module._buffers[key] = value.to(device)
    if tied:
        llm: Any = model.get_submodule("mllm.language_model")
        llm.lm_head.weight = llm.model.embed_tokens.weight
    left = [n for p in modules for n, t in _tensors(modules[p], p) if t.is_meta]
    assert not left, f"still on the meta device: {left[:4]}"
    return tuple(name for name in expected if name not in found)


def fresh_tensor(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Draw the start of a tensor that a kind of checkpoint never holds; always the same numbers, spread 0.02."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(prefix=prefix)
    yield from module.named_buffers(prefix=prefix)


def _computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Compute the buffers that no checkpoint stores, by building the small module that owns them once more."""
    with torch.device("cpu"):
        if isinstance(module, Qwen2RotaryEmbedding):
            fresh: nn.Module = Qwen2RotaryEmbedding(module.config)
        elif isinstance(module, PatchEmbed):
            fresh = PatchEmbed(
                height=module.height * module.patch_size,
                width=module.width * module.patch_size,
                patch_size=module.patch_size,
                in_channels=module.proj.in_channels,
                embed_dim=module.proj.out_channels,
                interpolation_scale=module.interpolation_scale,
            )
        else:
            raise AssertionError(f"no rule to compute the buffers of {type(module).__name__}")
    return dict(fresh.named_buffers())


# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module | Mapping[str, Tensor],
    config: UniLIPConfig,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    tokenizer: Any = None,
    dtype: DType = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint in our own format, whole or not at all; returns its folder.

    Args:
        model: a model, or its state dict (any subset of whole parts).
        folder: new, empty, or an older checkpoint, which is replaced; other files in it are kept.
        tokenizer: a transformers tokenizer, or a folder whose tokenizer files are copied.
        dtype: stored type of floating tensors; as they are by default.
        metadata: texts kept inside the weights file.

    Raises:
        CheckpointError: the folder holds something else, or the tensors do not fit the config.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    names = [name for name in state if not (name == HEAD and config.text.tie_embeddings)]
    held = {name.split(".")[0] for name in names}
    expected = expected_shapes(config, [part for part in PART_CLASSES if part in held])
    check_shapes({name: tuple(state[name].shape) for name in names}, expected, "The model to be saved")
    items = [(n, tuple(state[n].shape), state[n].dtype, partial(state.__getitem__, n)) for n in names]
    return _write_folder(folder, items, {"config.json": config.to_dict()}, max_shard_size, tokenizer, dtype, metadata)


def _write_folder(
    folder: str | os.PathLike[str],
    items: Sequence[Item],
    configs: Mapping[str, Mapping[str, Any]],
    max_shard_size: str | int,
    tokenizer: Any,
    dtype: DType,
    metadata: Mapping[str, str] | None,
) -> Path:
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    limit = parse_size(max_shard_size)
    with _replacing(folder) as new:
        stored = None if dtype is None else parse_dtype(dtype)
        _write_weights(new, items, limit, stored, {"format": "pt", **(metadata or {})})
        if isinstance(tokenizer, (str, os.PathLike)):
            for name in TOKENIZER_FILES:
                if (Path(tokenizer) / name).is_file():
                    shutil.copyfile(Path(tokenizer) / name, new / name)
        elif tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        for name, data in configs.items():
            (new / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return folder


def parse_size(size: str | int) -> int:
    """Return bytes of "5GB", "200MB" or a number.

    Raises:
        CheckpointError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|B)?\s*", str(size), re.IGNORECASE)
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    value = int(float(match[1]) * units[(match[2] or "B").upper()]) if match else 0
    if value <= 0:
        raise CheckpointError(f'max_shard_size is {size!r}; give a size like "5GB" or "200MB".')
    return value


def _write_weights(
    folder: Path, items: Sequence[Item], limit: int, dtype: torch.dtype | None, metadata: dict[str, str]
) -> None:
    def final(stored: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and stored.is_floating_point else stored

    shards: list[list[Item]] = [[]]
    room = limit
    for item in items:
        size = prod(item[1]) * final(item[2]).itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {n: get().detach().to(device="cpu", dtype=final(t), copy=True).contiguous() for n, _, t, get in shard}
        save_file(tensors, folder / name, metadata)
        table |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(prod(shape) * final(stored).itemsize for _, shape, stored, _ in items)
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling folder that takes the place of `folder` once all is written, or vanishes on any error."""
    previous = _previous(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)  # a save was interrupted between its two renames
    _check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.saving-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if not folder.exists():
            new.rename(folder)
            return
        for old in folder.iterdir():
            if not _is_ours(old) and not (new / old.name).exists():
                _link(old, new / old.name)
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        new.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise


def _is_ours(path: Path) -> bool:
    name = path.name
    return name == "config.json" or name in BESIDE or name in TOKENIZER_FILES or bool(_OWN_WEIGHTS.fullmatch(name))


def _check_destination(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise CheckpointError(f"{folder} is a file or a link; give a folder to save into.")
    if not any(folder.iterdir()):
        return
    data = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if data.get("format") != FORMAT and data.get("model_type") != "unilip_internvl":
        raise CheckpointError(f"{folder} holds something that is not a UniLIP checkpoint; give a new folder.")


def _link(old: Path, new: Path) -> None:
    """Bring a bystander along without moving it: a hard link, or a copy where there are none."""

    def one(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    if old.is_dir():
        shutil.copytree(old, new, copy_function=one)
    else:
        one(str(old), str(new))


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload UniLIP checkpoint",
) -> str:
    """Upload a checkpoint folder to the hub; returns the address of the commit.

    Raises:
        CheckpointError: the folder is no checkpoint, or the hub refused.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; save a checkpoint there first.")
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=path, revision=revision, commit_message=commit_message)
    except Exception as error:  # the client lets errors of several libraries through
        raise CheckpointError(
            f"The hub did not take {repo_id} ({_reason(error)}); check the name, the network and `hf auth login`."
        ) from error
    return str(done)


def push_model(model: Any, repo_id: str, *, dtype: DType = None, **options: Any) -> str:
    """Save a model to a temporary folder and upload it; `options` are those of `push_to_hub`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder, dtype=dtype)
        return push_to_hub(folder, repo_id, **options)


# --- converting -----------------------------------------------------------------------------------------------------


def convert(
    source: Source,
    destination: str | os.PathLike[str],
    to: str = "unilip",
    *,
    dtype: DType = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Rewrite any checkpoint in our format or in the authors'; at most one shard is in memory. Returns the folder.

    Raises:
        CheckpointError: an unknown format, or a model that the authors' format cannot hold.
    """
    if to not in ("unilip", "authors"):
        raise CheckpointError(f"There is no format {to!r} to convert to; allowed: unilip, authors.")
    opened = open_checkpoint(source)
    items: list[Item] = []
    metadata = dict(opened.metadata)
    if opened.image_token_id is not None:
        metadata["image_token_id"] = str(opened.image_token_id)
    if to == "unilip":
        configs: dict[str, dict[str, Any]] = {"config.json": opened.config.to_dict()}
        for name in opened.names:
            items.append((name, opened.shape(name), opened.dtype(name), partial(opened.tensor, name)))
        expected = expected_shapes(opened.config, opened.parts)
        for name in opened.absent:
            shape, stored = expected[name], opened.dtype(opened.names[0])
            items.append((name, shape, stored, partial(fresh_tensor, shape, stored)))
        if opened.absent:
            metadata["created"] = ",".join(opened.absent)
    else:
        lacking = [part for part in PART_CLASSES if part not in opened.parts]
        if lacking:
            raise CheckpointError(
                f"{opened.path} has no {', '.join(lacking)}; the authors' format holds whole models only."
            )
        configs = authors_configs(opened.config, opened.image_token_id)
        for theirs, group in unmap_names("authors", opened.names).items():
            first, *rest = opened.shape(group[0])
            shape = (first * len(group), *rest) if len(group) > 1 else opened.shape(group[0])
            items.append((theirs, shape, opened.dtype(group[0]), partial(_stack, opened, group)))
    return _write_folder(destination, items, configs, max_shard_size, opened.tokenizer_path, dtype, metadata)


def _stack(opened: Checkpoint, group: Sequence[str]) -> Tensor:
    tensors = [opened.tensor(name) for name in group]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
