"""A folder of one's own as a source of batches: `NAME.png` + `NAME.txt`, and for edits `NAME.input.png`,
`NAME.output.png`, `NAME.txt`; any depth of subfolders. It is what a WebDataset archive unpacks to.

Goes in: the folder. Comes out: centre-cropped uint8 pictures and texts by sample number, in an order that is a function
of (seed, epoch). What is missing is said when the folder is opened; what is broken, by name, when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from unilip.config import UniLIPConfig
from unilip.data.seeding import stable_hash
from unilip.errors import ConfigError, ImageError, PromptError
from unilip.preprocess import Processor, check_prompt, fit_square, load_image
from unilip.train.batches import Batches
from unilip.train.recipe import Flow, Recipe, Understand

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_CHARACTERS = 1000  # longer texts are left out, as the paper does


class FolderBatches(Batches):
    """Pictures with captions and edits from a folder."""

    def __init__(self, recipe: Recipe, config: UniLIPConfig, processor: Processor | None) -> None:
        super().__init__(recipe, config, processor)
        if isinstance(recipe.objective, Understand):
            raise ConfigError("data.source=folder has no questions; understanding stages need data.source=emoji.")
        folder = Path(recipe.data.path).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"data.path {folder} is not a folder.")
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        plain = [p for p in found if not p.stem.endswith((".input", ".output"))]
        inputs = [p for p in found if p.stem.endswith(".input")]
        share = recipe.data.edit_share
        self.pictures: list[tuple[Path, Path | None]] = [(p, None) for p in found]
        self.pairs: list[tuple[Path, Path, Path]] = []
        if isinstance(recipe.objective, Flow):
            _ = self.processor  # prompts need one
            self.pictures = [(p, text) for p in plain if (text := _text_of(p, p.stem))] if share < 1 else []
            outputs = {p.with_suffix(""): p for p in found if p.stem.endswith(".output")}
            self.pairs = [pair for p in inputs if (pair := _pair_of(p, outputs))] if share > 0 else []
        if share < 1 and not self.pictures:
            hint = f"; for its {len(inputs)} edits set data.edit_share=1" if inputs else ""
            raise ConfigError(
                f"data.path {folder} holds no pictures to learn from ({', '.join(IMAGE_SUFFIXES)}){hint}."
            )
        if share > 0 and not self.pairs:
            raise ConfigError(f"data.edit_share is {share}, but {folder} holds no NAME.input and NAME.output pictures.")

    def _pick(self, index: int, count: int) -> int:
        epoch, place = divmod(index, count)
        return int(_order(self.recipe.seed, epoch, count)[place])

    def caption_item(self, index: int) -> tuple[np.ndarray, str]:
        picture, text = self.pictures[self._pick(index, len(self.pictures))]
        return _read(picture, self.target_size), "" if text is None else _read_text(text)

    def edit_item(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        source, target, text = self.pairs[self._pick(index, len(self.pairs))]
        return _read(source, self.image_size), _read(target, self.target_size), _read_text(text)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(stable_hash("order", seed, epoch)).permutation(count)


def _read(path: Path, size: int) -> np.ndarray:
    try:
        return np.asarray(fit_square(load_image(path), size, "crop"))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return check_prompt(path.read_text(encoding="utf-8"), f"text in {path}")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text ({error}); save it as such.") from error


def _text_of(picture: Path, name: str) -> Path | None:
    """The text beside a picture; None, and a word in the log, if it is too long."""
    path = picture.with_name(f"{name}.txt")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{picture} has no text; put its caption or instruction in {path.name} beside it.") from error
    if size > MAX_CHARACTERS and len(_read_text(path)) > MAX_CHARACTERS:
        logger.info("%s is left out: more than %d characters", path, MAX_CHARACTERS)
        return None
    return path


def _pair_of(source: Path, outputs: Mapping[Path, Path]) -> tuple[Path, Path, Path] | None:
    """Target picture and instruction beside the source of an edit; `outputs` are all targets, without their suffix."""
    name = source.stem.removesuffix(".input")
    target = outputs.get(source.with_name(f"{name}.output"))
    if target is None:
        raise ConfigError(f"{source} has no {name}.output picture beside it.")
    text = _text_of(source, name)
    return None if text is None else (source, target, text)
