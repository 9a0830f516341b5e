"""Where checkpoints come from and go to: this machine, the Hugging Face hub, or the package itself.

In:  a source as people write it. Out: a local folder or file, fetched where it must be.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from unilip.checkpoints.tokenizer import TOKENIZER_FILES
from unilip.errors import CheckpointError, check_choice, reason
from unilip.method.config import UniLIPConfig

logger = logging.getLogger(__name__)

BESIDE = ("dit_config.json", "vae_config.json", "scheduler_config.json")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CARD, INDEX = "README.md", "model_index.json"  # the second marks a pipeline of diffusers
ADAPTER = "adapter_config.json"  # marks the folder of an adapter
REMEDY = "; copy or train the adapter again"
LARGEST_JSON = 16 * 2**20  # bytes
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:/([\w.-]+\.(?:pth|pt|bin|safetensors)))?(?:@([\w./-]+))?")


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file, and the remedy if there is one."""
    about = f"{path} is damaged: it" if remedy else str(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{about} cannot be read as JSON ({error}){remedy}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{about} holds no JSON object{remedy}.")
    return data


@dataclass(frozen=True)
class Adapted:
    """A model with adapters beside it, in the place of a model's own source: pairs of a folder and its strength."""

    base: str | os.PathLike[str] | None = None
    adapters: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        named = (folder if scale == 1 else f"{folder}:{scale:g}" for folder, scale in self.adapters)
        return " + ".join(["embedded" if self.base is None else str(self.base), *named])


Source = str | os.PathLike[str] | Adapted | None


def local(source: str | os.PathLike[str]) -> Path:
    """Return where a source would be on this machine. Raises CheckpointError: no file system takes such a name."""
    path = Path(os.path.expanduser(source))  # unlike a path's own way it leaves strangers' homes as they are
    try:
        path.exists()
    except OSError as error:
        raise CheckpointError(f"{str(path)[:80]} cannot be read ({error.strerror}); give another path.") from error
    return path


def adapted(source: Source, above: tuple[Path, ...] = ()) -> Adapted:
    """Tell a model's own source from its adapters, which may stand on one another (`above` are those looked at).

    Raises CheckpointError: an adapter names no model, several, or itself.
    """
    if isinstance(source, Adapted):
        inner = adapted(source.base)
        return Adapted(inner.base, (*inner.adapters, *source.adapters))
    folder = None if source is None else local(source)
    if folder is None or not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return Adapted(source)
    named = str(read_json(folder / ADAPTER, REMEDY).get("base_model_name_or_path") or "").removeprefix("all=")
    if not named or "=" in named or folder.resolve() in above:
        raise CheckpointError(
            f"{folder} holds an adapter of {named or 'a model that it does not name'}; load that, and give this folder "
            "as --adapter, or to model.load_adapter."
        )
    place = os.path.normpath(folder / named) if named.startswith("..") else named
    inner = Adapted() if named == "embedded" else adapted(place, (*above, folder.resolve()))
    return Adapted(inner.base, (*inner.adapters, (os.path.expanduser(str(source)), 1.0)))


FETCHING: dict[str, Any] = {
    "revision": str, "token": (str, bool), "cache_dir": (str, os.PathLike), "local_files_only": bool, "variant": str,
}  # fmt: skip


def check_fetching(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given. Raises CheckpointError: none of `FETCHING`, or one of another type."""
    for name, value in options.items():
        check_choice("option for loading", name, FETCHING, CheckpointError)
        if not (value is None or isinstance(value, FETCHING[name])):
            raise CheckpointError(f"{name} is {value!r}; give a text, or True or False where it is a switch.")
    if not re.fullmatch(r"[\w-]+", options.get("variant") or "none"):  # as in model.fp16.safetensors
        raise CheckpointError(f"variant is {options['variant']!r}; give a word like fp16.")
    return {name: value for name, value in options.items() if value is not None}


def resolve(source: str | os.PathLike[str] | None = None, *, revision: str | None = None, **fetching: Any) -> Path:
    """Return the local folder or file of a source; "owner/name[@revision]" and "owner/name/file.pth" are fetched.

    Nothing, or "embedded" where no file is called so, is the model that the package carries.
    Raises CheckpointError: nothing is there.
    """
    path = local("" if source is None else source)
    if source is None or (str(source) == "embedded" and not path.exists()):
        path = embedded()
    if path.exists():
        if revision is not None:
            logger.warning("%s is here and not fetched: revision %s is ignored", path, revision)
        return path
    hub = _HUB_ID.fullmatch(str(source))
    if hub and not str(source).startswith("."):
        if hub[3] and revision not in (None, hub[3]):
            raise CheckpointError(f"{source} names one revision, and revision={revision!r} another; give one.")
        return _fetch(hub[1], hub[2], revision=revision or hub[3], **fetching)
    previous = previous_of(path)
    hint = f" An interrupted save left the old one whole in {previous}; rename it back." if previous.exists() else ""
    raise CheckpointError(f'There is no checkpoint at {path}; give a folder, a file, or a hub id "owner/name".{hint}')


def embedded() -> Path:
    """Return the folder of the model that the package carries."""
    root = Path(str(resources.files("unilip"))) / "weights"
    if not (root / "config.json").is_file():
        raise CheckpointError(f"This installation has no embedded model ({root} is empty); name a checkpoint to load.")
    return root


def previous_of(folder: Path) -> Path:
    """Where a checkpoint is for the instant in which another takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def needed_files(files: Sequence[str], variant: str | None = None) -> list[str]:
    """Choose what to fetch of a repository: configs, tokenizer and weights, each in one format, of the part we read."""
    if INDEX in files:  # of a SANA pipeline its transformer only
        chosen = [INDEX]
        for part in ("transformer", "model", "tokenizer") if "model/config.json" in files else ("transformer",):
            inner = [f.removeprefix(f"{part}/") for f in files if f.startswith(f"{part}/")]
            chosen += [f"{part}/{f}" for f in needed_files(inner, variant)]
        return chosen
    top = [f for f in files if "/" not in f]
    chosen = [f for f in top if f == "config.json" or f in BESIDE or f in TOKENIZER_FILES]
    word = f"\\.{variant}" if variant else ""
    for suffix in map(re.escape, SUFFIXES):
        stem = f"({'|'.join(STEMS)})"
        shards = re.compile(rf"{stem}{word}(-\d+-of-\d+)?{suffix}|{stem}{suffix}\.index{word}\.json")
        if weights := [f for f in top if shards.fullmatch(f)]:
            return chosen + weights
    return chosen


def _fetch(
    repo: str, file: str | None, *, local_files_only: bool = False, variant: str | None = None, **options: Any
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    options = {"token": None, "cache_dir": None} | options
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, local_files_only=local_files_only, **options))
        if local_files_only:
            return Path(snapshot_download(repo, local_files_only=True, **options))
        try:
            there = HfApi(token=options["token"]).list_repo_files(repo, revision=options["revision"])
        except Exception:  # no network: perhaps it was fetched before; if not, this is why
            with contextlib.suppress(Exception):
                return Path(snapshot_download(repo, local_files_only=True, **options))
            raise
        files = needed_files(there, variant)
        if not any(name.endswith(SUFFIXES) for name in files):
            single = [name for name in there if name.endswith(FILE_SUFFIXES)]
            hint = f"; name one of its files, for example {repo}/{single[0]}" if single else ""
            of = f" of the variant {variant}" if variant else ""
            raise CheckpointError(f"{repo} has no weights{of} under a known name{hint}.")
        return Path(snapshot_download(repo, allow_patterns=files, **options))
    except CheckpointError:
        raise
    except Exception as error:  # the client lets errors of several libraries through
        raise CheckpointError(
            f"{repo} is no folder here and could not be fetched from the hub ({reason(error, 300)}); check the name "
            "and the network, or give a folder."
        ) from error


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload UniLIP checkpoint",
) -> str:
    """Upload a checkpoint folder; returns the commit's address. Raises CheckpointError: no checkpoint, or refused."""
    path = Path(folder)
    if not any((path / name).is_file() for name in ("config.json", INDEX)):
        raise CheckpointError(f"{path} has no config.json; save a checkpoint there first.")
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=path, revision=revision, commit_message=commit_message)
    except Exception as error:  # the client lets errors of several libraries through
        raise CheckpointError(
            f"The hub did not take {repo_id} ({reason(error, 300)}); check the name, the network and `hf auth login`."
        ) from error
    return str(done)


def template(name: str) -> str:
    """Return a file of `templates/`; diffusers runs those named .py.txt when it is told to trust a pipeline folder."""
    return (resources.files("unilip.checkpoints") / "templates" / name).read_text(encoding="utf-8")


def model_card(config: UniLIPConfig, parts: Sequence[str], dtype: str, library: str = "unilip") -> str:
    """Return the README.md of a checkpoint folder: the hub's metadata, usage, what the weights are, credits."""
    ours, words = config.name in ("pico", "nano"), json.loads(template("card.json"))
    tasks = [(tag, call) for part, (tag, call) in words["tasks"].items() if part in parts]
    head = [f"library_name: {library}", f"license: {'apache-2.0' if ours else 'other'}"]
    head += [f"base_model: {words['released'][config.name]}"] if config.name in words["released"] else []
    head += [f"pipeline_tag: {tasks[0][0]}"] if tasks else []
    head += ["tags:", *(f"- {tag}" for tag in ("unilip", *(tag for tag, _ in tasks)))]
    return template("card.md").format(
        head="\n".join(head), name=config.name, parts=", ".join(parts), dtype=dtype, size=config.image_size,
        calls="\n".join([*words["loading"][library], *(call for _, call in tasks)]),
        origin=words["ours" if ours else "theirs"],
    )  # fmt: skip
