"""Open checkpoints of every kind, and load them into a model part by part.

In:  a folder, a file, a hub id or nothing (the embedded model), in any format that `tables.KINDS` names. Out: a
`Checkpoint` whose tensors have our names and are read one at a time; or a model with nothing left on the meta device.
Every tensor is accounted for in both directions; nothing is loaded loosely.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unilip.checkpoints import hub, tables
from unilip.checkpoints.infer import check_sizes, expected_shapes, infer_config
from unilip.checkpoints.tokenizer import Tokenizer, load_tokenizer
from unilip.errors import CheckpointError, ConfigError, reason
from unilip.fast.products import computes, shape_of
from unilip.fast.quantise import FewBits, few_bits
from unilip.method.config import FORMAT, UniLIPConfig
from unilip.method.text import IMG_CONTEXT

DType = torch.dtype | str | None

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
DAMAGES = (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)


# --- tensors --------------------------------------------------------------------------------------------------------


class SafeFile:
    """A safetensors file: checked as a whole when opened, then closed; tensors are read into fresh memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt", device="cpu") as checked:
            self.metadata: dict[str, str] = checked.metadata() or {}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
            self._stamp = _stamp(file)
        entries.pop("__metadata__", None)
        self.shapes: dict[str, tables.Shape] = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        self.dtypes = {name: DTYPES.get(entry["dtype"]) for name, entry in entries.items()}
        self._places = {name: [8 + size + n for n in entry["data_offsets"]] for name, entry in entries.items()}

    def read(self, name: str, part: int, parts: int) -> Tensor:
        """Read one of several equal pieces of a tensor, along its first dimension."""
        begin, end = self._places[name]
        shape, size = self.shapes[name], (end - begin) // parts
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        with self.path.open("rb") as file:
            _require_same(file, self._stamp, self.path)
            file.seek(begin + part * size)
            if size and file.readinto(data.numpy().data) != size:
                raise CheckpointError(f"{self.path} was cut off while it was read; fetch or save it again.")
        typed = data.view(self.dtypes[name])  # type: ignore[arg-type]  # `Weights` has refused what is not known
        return typed.reshape(shape if parts == 1 else (shape[0] // parts, *shape[1:]))


def _stamp(file: BinaryIO) -> tuple[int, int, int]:
    known = os.fstat(file.fileno())
    return known.st_ino, known.st_size, known.st_mtime_ns


def _require_same(file: BinaryIO, before: tuple[int, int, int], path: Path) -> None:
    if _stamp(file) != before:
        raise CheckpointError(f"{path} was replaced after it had been opened; load the model again.")


class TorchFile:
    """A file of torch.save with tensors only, whatever else it would like to be: code inside it is never run."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, dict[str, str]()
        try:
            with path.open("rb") as file:
                mapped = file.read(4) == b"PK\3\4"  # else it has the format before 2020
                self._stamp = _stamp(file)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            why = f"{path} holds more than tensors, and loading it could run code; it was refused"
            raise CheckpointError(f"{why}. Save its tensors alone.") from error
        for wrapper in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} is not a dictionary of tensors.")
        for name, value in state.items():
            whole = (value.layout, value.is_quantized, value.is_meta) == (torch.strided, False, False)
            plain = isinstance(name, str) and whole
            if not plain or value.nbytes > value.untyped_storage().nbytes():  # a view may repeat few numbers endlessly
                why = f"{path} holds {str(name)[:120]} in a form that is not supported"
                raise CheckpointError(f"{why}; save it as plain.")
        self._state: dict[str, Tensor] = dict(state)
        self.shapes: dict[str, tables.Shape] = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.dtypes: dict[str, torch.dtype | None] = {name: tensor.dtype for name, tensor in self._state.items()}

    def read(self, name: str, part: int, parts: int) -> Tensor:
        tensor = self._state[name]
        with self.path.open("rb") as file:  # which is mapped: what is written over it, the tensor has become
            _require_same(file, self._stamp, self.path)
        return (tensor if parts == 1 else tensor.chunk(parts)[part]).detach().clone()


class Weights:
    """Named tensors in one file or several; only names, shapes and types are known until a tensor is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}  # stored with them
        self.shapes: dict[str, tables.Shape] = {}
        self._where: dict[str, SafeFile | TorchFile] = {}
        for path in files:
            try:
                with path.open("rb") as file:
                    pointer = file.read(40).startswith(b"version https://git-lfs")
                if pointer:
                    raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there.")
                opened = SafeFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            except CheckpointError:  # says it itself
                raise
            except DAMAGES as error:
                why = f"{path} is truncated or damaged ({reason(error, 300)})"
                raise CheckpointError(f"{why}; fetch or save it again.") from error
            self.metadata |= opened.metadata
            self.shapes |= opened.shapes
            self._where |= dict.fromkeys(opened.shapes, opened)
        if not self.shapes:
            raise CheckpointError(f"{tables.listed([str(path) for path in files]) or 'Its index'} names no tensor.")
        self.quantized: dict[str, FewBits] = {}  # in torchao's layout: each in pieces, one tensor to callers
        self.quantized = few_bits(self.metadata, self._meta, str(self.files[0].parent))
        pieces = {piece: name for name, tensor in self.quantized.items() for piece in tensor.pieces.values()}
        whole = {name: tensor.shape for name, tensor in self.quantized.items()}
        self.shapes = {n: whole.get(n, s) for n, s in ((pieces.get(n, n), s) for n, s in self.shapes.items())}
        self._where |= {name: self._where[piece] for piece, name in pieces.items()}

    def _meta(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtype(name), device="meta")

    def file_of(self, name: str) -> Path | None:
        return self._where[name].path if name in self._where else None

    def dtype(self, name: str) -> torch.dtype:
        if name in self.quantized:
            return self.quantized[name].dtype
        if (found := self._where[name].dtypes[name]) is None:
            raise CheckpointError(f"{self.file_of(name)} holds {name} in a type that is not known; convert it to BF16.")
        return found

    def few(self, origin: tables.Origin, dtype: torch.dtype | None, damaged: str) -> Tensor:
        """Read a quantised tensor, which computes in `dtype`, or in the type that it was saved with."""
        few = self.quantized[origin.name]
        if origin.parts != 1:
            raise CheckpointError(f"{self.file_of(origin.name)} holds {origin.name} stacked; save it in our format.")
        stored = {key: check_weights(self._where[n].read(n, 0, 1), n, damaged) for key, n in few.pieces.items()}
        return few.tensor(stored, dtype)

    def read(self, origin: tables.Origin) -> Tensor:
        """Read a tensor, or one part of a stacked one, into memory of its own."""
        name, parts = origin.name, origin.parts
        rows = (self.shapes[name] or (1,))[0]
        if rows % parts:
            raise CheckpointError(f"{self.file_of(name)} holds {name} with {rows} rows, no multiple of {parts}.")
        self.dtype(name)
        return self._where[name].read(name, origin.part, parts)


def _find_weights(folder: Path, variant: str | None) -> Weights:
    word = f".{variant}" if variant else ""
    for suffix in hub.SUFFIXES:
        for stem in hub.STEMS:
            index, single = folder / f"{stem}{suffix}.index{word}.json", folder / f"{stem}{word}{suffix}"
            if index.is_file() and single.is_file():
                raise CheckpointError(
                    f"{folder} holds {single.name} and {index.name}: one of the two is left from another model. "
                    "Delete what is out of date (an index goes with its shards)."
                )
            if index.is_file():
                return _open_shards(index)
            if single.is_file():
                return Weights([single])
    only = sorted(folder.glob("*.safetensors"))
    if len(only) == 1 and not variant:
        return Weights(only)
    names = ", ".join(f"{stem}{word}{suffix}" for suffix in hub.SUFFIXES for stem in hub.STEMS)
    raise CheckpointError(f"{folder} has config.json but no weights; expected one of {names}, or shards and index.")


def _open_shards(index: Path) -> Weights:
    table = hub.read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) and "/" not in v for v in table.values()):
        raise CheckpointError(f"{index} has no weight_map of file names; fetch or save it again.")
    files = [index.parent / name for name in sorted(set(table.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index.parent} lacks {', '.join(missing)} of {index.name}; fetch or save it again.")
    weights = Weights(files)
    wrong = [name for name, file in table.items() if weights.file_of(name) != index.parent / file]
    wrong += [name for name in weights.shapes if name not in table and name not in weights.quantized]
    if wrong:
        raise CheckpointError(f"{index} and its shards disagree about {wrong[0]} ({len(wrong)} in all); fetch again.")
    return weights


def check_weights(tensor: Tensor, name: str, remedy: str) -> Tensor:
    """Return weights that are numbers, or say which are not; a small part of the time that reading them takes."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no comparison
    if tensor.is_floating_point() and tensor.numel() and not all(bool(end.isfinite()) for end in values.aminmax()):
        raise CheckpointError(f"{name} holds NaN or infinite values in {tensor.dtype}. {remedy}.")
    return tensor


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return finite weights in another type, or say that they do not fit into it."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    wider = torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max
    return found if wider else check_weights(found, name, "They are too large for it: choose bfloat16 or float32")


# --- opening --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened checkpoint: what it is, and its tensors under our names, read when asked for."""

    def __init__(self, path: Path, weights: Weights, data: Mapping[str, Any]) -> None:
        self.path, self.weights, self._data = path, weights, data
        self.kind = kind = _kind(path, data, weights.shapes)  # a key of `tables.KINDS`
        folder = path if path.is_dir() else path.parent
        about_tensors = {"format", "tensor_names", *weights.shapes}
        self.metadata = {k: v for k, v in weights.metadata.items() if k not in about_tensors}
        self._origins, self.dropped = tables.map_names(kind, weights.shapes)  # dropped: their name -> why
        self.notes: list[str] = []  # remarks for people
        self.adapters: tuple[tuple[str, float], ...] = ()  # that belong beside it: folders and strengths
        for name, origin in self._origins.items():
            if not (found := weights.dtype(origin.name)).is_floating_point:
                raise CheckpointError(f"{weights.file_of(origin.name)} holds {name} in {found}; convert it to BF16.")
        self._untie()
        shapes = {name: self.shape(name) for name in self._origins}
        if kind == "unilip" or data.get("format") == FORMAT:
            try:
                self.config = UniLIPConfig.from_dict(data)
            except ConfigError as error:
                raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        else:
            beside = {name: hub.read_json(folder / name) for name in hub.BESIDE if (folder / name).is_file()}
            self.config = infer_config(kind, data, shapes, beside, path.stem if path.is_file() else path.name)
        held = {name.split(".")[0] for name in shapes}
        allowed = tables.KINDS[kind].parts
        self.parts = tuple(p for p in allowed if p in held) if kind == "unilip" else allowed
        try:
            check_sizes(self.config, self.parts, len(shapes))
            expected = expected_shapes(self.config, self.parts)
        except (CheckpointError, RuntimeError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
            raise CheckpointError(f"{path} does not fit its config: {reason(error, 300)}") from error
        # what its kind never holds although its parts have it: new queries
        self.absent = tuple(name for name in tables.KINDS[kind].absent if name in expected and name not in shapes)
        tables.check_shapes(shapes, expected, str(path), self.absent)
        self.tokenizer_path = folder if _has_tokenizer(folder) else None

    def __deepcopy__(self, memo: Any) -> "Checkpoint":
        return self  # a copy of a model reads the same files

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside the weights, read when first asked for."""
        return None if self.tokenizer_path is None else load_tokenizer(self.tokenizer_path)

    @property
    def image_token_id(self) -> int | None:
        """The id of the image slots: by the tokenizer, else as the config or the weights' metadata say."""
        found = self.tokenizer.token_id(IMG_CONTEXT) if self.tokenizer else None
        said = self._data.get("image_token_id", self.metadata.get("image_token_id"))
        return found if found is not None or not str(said).isdecimal() else int(str(said))

    def _untie(self) -> None:
        """Drop a stored language head that the config calls tied, if it really equals the embedding."""
        data, text = self._data, self._data.get("text_config")
        said = data.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))
        if data.get("format") == FORMAT or not said or not {tables.HEAD, tables.EMBEDDING} <= self._origins.keys():
            return
        if self.same(tables.HEAD, tables.EMBEDDING):
            self.dropped[self._origins.pop(tables.HEAD).name] = "tied: the same numbers as the token embedding"
        else:
            self.notes.append("The language head is called tied, but differs from the embedding: both are used.")

    @property
    def quantized(self) -> set[str]:
        """Our names of the tensors that are stored in few bits."""
        return {name for name, origin in self._origins.items() if origin.name in self.weights.quantized}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._origins)

    def shape(self, name: str) -> tables.Shape:
        origin = self._origins[name]
        shape = self.weights.shapes[origin.name]
        if tables.POINTWISE.fullmatch(name) and shape[2:] == (1, 1):
            return shape[:2]
        return shape if origin.parts == 1 else (shape[0] // origin.parts, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(self._origins[name].name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor of ours into memory of its own; a quantised one computes in `dtype`, or as it was saved.

        Raises CheckpointError: the file has changed or is cut off, or a value is NaN or infinite.
        """
        origin = self._origins[name]
        damaged = f"{self.weights.file_of(origin.name)} is damaged: fetch or save it again"
        if origin.name in self.weights.quantized:
            return self.weights.few(origin, dtype, damaged)
        tensor = check_weights(self.weights.read(origin), origin.name, damaged)
        return tensor.flatten(1) if tables.POINTWISE.fullmatch(name) else tensor

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored with the same type and numbers; one in few bits is like no other."""
        if {one, other} & self.quantized or self.dtype(one) != self.dtype(other):
            return False
        return self.shape(one) == self.shape(other) and torch.equal(self.tensor(one), self.tensor(other))

    def require_plain(self, why: str, alone: bool = True) -> None:
        """Raise an error where plain weights are needed, and these are quantised or, if ALONE, have adapters."""
        if self.adapters and alone:
            raise CheckpointError(
                f"{self.adapters[0][0]} is an adapter of {self.path}, and {why}; merge the two into a model first: "
                "`unilip convert`."
            )
        if self.weights.quantized:
            raise CheckpointError(f"{self.path} is quantised, and {why}; take the model that it was made from.")


def _has_tokenizer(folder: Path) -> bool:
    there = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return there[0] or all(there[1:])


def open_checkpoint(source: hub.Source = None, **fetching: Any) -> Checkpoint:
    """Find and open a checkpoint of any kind, tensors left on disk; `fetching` as of `hub.check_fetching`.

    Raises CheckpointError: missing, truncated, of an unknown kind, or at odds with its own config.
    """
    fetching = hub.check_fetching(fetching)
    if (whole := hub.adapted(source)).adapters:
        opened = open_checkpoint(whole.base, **fetching)
        opened.adapters = whole.adapters
        return opened
    path = hub.resolve(whole.base, **fetching)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_file():
        if path.suffix not in hub.FILE_SUFFIXES:
            raise CheckpointError(f"{path} is no weights file ({', '.join(hub.FILE_SUFFIXES)}); give one, or a folder.")
        return Checkpoint(path, Weights([path]), hub.read_json(config) if config.is_file() else {})
    pipeline = not config.is_file() and (path / hub.INDEX).is_file()
    if pipeline and (path / "model" / "config.json").is_file():
        opened = open_checkpoint(path / "model", variant=fetching.get("variant"))
        opened.tokenizer_path = path / "tokenizer" if _has_tokenizer(path / "tokenizer") else opened.tokenizer_path
        return opened
    if pipeline and (path / "transformer").is_dir():
        opened = open_checkpoint(path / "transformer", variant=fetching.get("variant"))
        opened.notes.append(f"Of the pipeline {path.name} only the folder transformer is used.")
        return opened
    if not config.is_file():
        files = sorted(p.name for p in path.glob("*.pth"))
        hint = f" It holds {files[0]}: give that file." if files else ""
        raise CheckpointError(f"{path} has no config.json, so it is none of these: {tables.UNDERSTOOD}.{hint}")
    data = hub.read_json(config)
    _kind(path, data, ())  # a folder of another kind is named as such, even when its weights have other names too
    return Checkpoint(path, _find_weights(path, fetching.get("variant")), data)


SMALL = "small_decoder"  # the folder beside a model's weights


def open_decoder(model: Checkpoint, decoder: str | os.PathLike[str]) -> Checkpoint:
    """Open another pixel decoder, of a folder, or as "small" the one beside the weights. Raises CheckpointError."""
    if not isinstance(decoder, (str, os.PathLike)):
        raise CheckpointError(f'decoder is {decoder!r}; give "small" or a folder.')
    beside = (model.path if model.path.is_dir() else model.path.parent) / SMALL
    if decoder == "small" and not beside.is_dir():
        raise CheckpointError(
            f"{model.path} has no small decoder; train the recipe SIZE/{SMALL} on it and name the result's folder, or "
            f"put that there as {SMALL}."
        )
    opened = open_checkpoint(beside if decoder == "small" else decoder)
    if "pixel_decoder" not in opened.parts:
        raise CheckpointError(f"{opened.path} has no pixel_decoder; it holds: {', '.join(opened.parts)}.")
    ours, theirs = ((c.decoder.latent_channels, c.latent_mean, c.latent_factor) for c in (model.config, opened.config))
    if ours != theirs:
        raise CheckpointError(f"The decoder of {opened.path} was trained for other latents than those of {model.path}.")
    return opened


def _kind(path: Path, data: Mapping[str, Any], names: Iterable[str]) -> str:
    """Tell the kind of a checkpoint by its config and, where that is not enough, by the names of its tensors."""
    if {"mlp1", "down_mlp"} <= {name.split(".")[0] for name in names}:
        return "tokenizer"
    if not data:
        raise CheckpointError(
            f"{path} alone does not tell what it is; give its folder, with config.json. Known are: {tables.UNDERSTOOD}."
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
    raise CheckpointError(f"{path} is a checkpoint of {what!r}. Understood are: {tables.UNDERSTOOD}.")


# --- loading --------------------------------------------------------------------------------------------------------


def parse_dtype(dtype: DType) -> torch.dtype | None:
    """Return a floating type from its name; None is float32. Raises CheckpointError: none that is computed in."""
    if isinstance(dtype, str) and dtype == "auto":
        return None  # as stored, or float32 where that is as fast
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:  # none computes in fp8
        raise CheckpointError(f"There is no dtype {dtype!r}; allowed: float32, bfloat16, float16, auto.")
    return found


@torch.no_grad()
def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: DType = None,
    device: torch.device | str = "cpu",
    parts: Sequence[str] | None = None,
    leave: Sequence[str] = (),
    settle: Callable[[str, nn.Module], None] | None = None,
) -> tuple[str, ...]:
    """Give parts of a model (on the meta device, or any) the weights of a checkpoint, one tensor at a time.

    A part may be a module inside one. Tensors named in `leave` are not read; `settle` is called with name and module of
    each linear layer as soon as it has its own. Returns the names that were drawn at random, the same every time, as
    the checkpoint never holds them: the queries of a language model that is no UniLIP yet.
    Raises CheckpointError: a part is not in the checkpoint, does not fit exactly, or holds what is no number.
    """
    target = parse_dtype(dtype)
    wanted = checkpoint.parts if parts is None else tuple(parts)
    if lacking := [part for part in wanted if part.split(".")[0] not in checkpoint.parts]:
        raise CheckpointError(f"{checkpoint.path} has no {', '.join(lacking)}; it holds {', '.join(checkpoint.parts)}.")
    modules, tied = {part: model.get_submodule(part) for part in wanted}, checkpoint.config.text.tie_embeddings
    left = {*leave, *[tables.HEAD] * tied}
    expected = {f"{part}.{n}": tuple(t.shape) for part, m in modules.items() for n, t in m.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if name not in left}
    inside = tuple(f"{part}." for part in modules)
    found = {n: checkpoint.shape(n) for n in checkpoint.names if n.startswith(inside) and n not in leave}
    tables.check_shapes(found, expected, str(checkpoint.path), checkpoint.absent)

    quantized, shape = checkpoint.quantized, shape_of(checkpoint.config)

    def read(name: str, like: Tensor) -> Tensor:
        if name not in found:
            return fresh_tensor(tuple(like.shape), target or like.dtype).to(device)
        if name in quantized:
            return checkpoint.tensor(name, target).to(device)
        value = checkpoint.tensor(name)
        keep = target or (value.dtype if computes(value.dtype, device, shape) else torch.float32)
        return cast(value, keep, name).to(device)

    for part, root in modules.items():
        for prefix, module in root.named_modules(prefix=part):
            for key, old in list(module._parameters.items()):
                name = f"{prefix}.{key}"
                if old is not None and name not in left:
                    trained = old.requires_grad and name not in quantized
                    setattr(module, key, nn.Parameter(read(name, old), requires_grad=trained))
            if settle is not None and type(module) is nn.Linear and not module.weight.is_meta:
                settle(prefix, module)
    if tied and "mllm" in modules:
        llm: Any = model.get_submodule("mllm.language_model")
        llm.lm_head.weight = llm.model.embed_tokens.weight
    empty = [n for p in modules for n, t in modules[p].named_parameters(p) if t.is_meta and n not in leave]
    assert not empty, f"still on the meta device: {empty[:4]}"
    return tuple(name for name in expected if name not in found)


def fresh_tensor(shape: tables.Shape, dtype: torch.dtype) -> Tensor:
    """Draw the start of a tensor that a kind of checkpoint never holds; always the same numbers, spread 0.02."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return (drawn * 0.02).to(dtype)
