"""What every test gets: no network, few threads, a fixed seed, and GPU tests only where there is a GPU."""

import os

# Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch

SEED = 0
MAX_THREADS = 2  # the models under test are tiny: more threads only get in each other's way


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
