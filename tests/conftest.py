"""What every test gets: no network, few threads, a fixed seed, GPU tests only where there is a GPU, and a tiny model.

`tiny_model` and `tiny_folder` are shared by the whole session: read them, never change them. A test that needs another
precision, training mode or weights builds its own with `fresh_model`.
"""

import os

# Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from unilip.model import UniLIP

os.environ["UNILIP_CACHE"] = tempfile.mkdtemp(prefix="unilip-tests-")  # never the home of who runs the tests

SEED = 0
MAX_THREADS = 1  # tiny tensors gain nothing from more, and lose much where another program holds a core

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VOCABULARY = 400  # of the tiny preset
SENTENCES = (
    "user\nGenerate an image: three yellow stars above a blue house",
    "user\nEdit the image: make the red apple green\n",
    "assistant\nThere are two dogs and one cat in the picture. The dogs are brown.",
    "What colour is the car? How many birds are there? Describe the image.",
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and this machine offers none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights drawn in a test are the same in every run and in any order of the tests."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator, always from the same seed."""
    return torch.Generator().manual_seed(SEED)


def train_tiny_tokenizer(sentences: tuple[str, ...] = SENTENCES, special: tuple[str, ...] = SPECIAL_TOKENS) -> Any:
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens, with the special tokens of the released models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from unilip.checkpoints.tokenizer import Tokenizer as Ours

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return Ours({"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(names).encode()})


@pytest.fixture(scope="session")
def fresh_tokenizer() -> Callable[[tuple[str, ...]], Any]:
    """Train a tokenizer that the test may change, with these special tokens: f(("<|im_start|>", ...))."""
    return lambda special: train_tiny_tokenizer(special=special)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A tokenizer that fits the tiny preset."""
    return train_tiny_tokenizer()


@pytest.fixture(scope="session")
def fresh_model(tiny_tokenizer: Any) -> Callable[..., "UniLIP"]:
    """Build a tiny model with its processor that the test may change: f(seed=0, parts=all, **changes of the config)."""
    from unilip.method.text import Processor
    from unilip.model import PARTS, UniLIP
    from unilip.sizes import preset

    def build(seed: int = 0, parts: tuple[str, ...] = tuple(PARTS), **changes: Any) -> "UniLIP":
        model = UniLIP.from_config(preset("tiny").replace(**changes), seed=seed, parts=parts)
        model.processor = Processor(tiny_tokenizer, model.config)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_model(fresh_model: Callable[..., "UniLIP"]) -> "UniLIP":
    """The tiny preset with random weights and a tokenizer. Shared: do not change it."""
    return fresh_model()


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: "UniLIP", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model saved by `save_pretrained`. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """Paint an RGB picture of smooth colours, different for each seed: f(width=56, height=56, seed=0)."""

    def paint(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)

    return paint
