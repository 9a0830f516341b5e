"""Importing less, so that a command starts soon.

Goes in: a block that imports the model's code. Comes out: the same code, without what transformers, diffusers and torch
load besides: optional packages, every model they know, compilation, sharding. That takes longer than drawing a picture.
What is left out is imported as usual when something asks for it after the block. Which imports can be spared is known
of the versions in constraints.txt; with others everything is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

UNNEEDED = ("scipy", "peft", "torchao", "accelerate", "sklearn", "pandas", "trio", "torchvision")
HOLLOW = ("transformers.models", *(f"diffusers.models.{name}" for name in ("autoencoders", "transformers", "unets")))
COMPILER = "torch._dynamo"
TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "diffusers": "0.42.1"}


class HollowPackages:
    """Finds packages whose modules can be imported while their own code, which imports all of them, is not run.

    Functions that are asked of the compiler's package, decorators all of them, return what they are given.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(name for name in names if name not in sys.modules)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Answer Python's question for a module: only for the hollow packages."""
        real = PathFinder.find_spec(name, path) if name in self.names else None
        if real is None or real.submodule_search_locations is None:
            return None
        spec = ModuleSpec(name, self, origin=real.origin, is_package=True)  # type: ignore[arg-type]
        spec.submodule_search_locations = list(real.submodule_search_locations)
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of an empty module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing."""
        if module.__name__ == COMPILER:
            module.__getattr__ = decorator  # type: ignore[method-assign]

    def forget(self) -> None:
        """Take the hollow packages away, but not the modules from within them."""
        for name in self.names:
            module = sys.modules.get(name)
            if module is not None and getattr(module.__spec__, "loader", None) is self:
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if vars(sys.modules.get(parent, module)).get(child) is module:
                    delattr(sys.modules[parent], child)


def decorator(name: str) -> Callable[..., Any]:
    """Return a decorator, with or without arguments, that changes nothing."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda function=None, *_, **__: function if callable(function) else lambda f: f


def tested() -> bool:
    """Whether the libraries are those whose imports are known; a build's own mark, as in 2.13.0+cpu, is left aside."""
    found = (importlib.metadata.version(name).partition("+")[0] for name in TESTED)
    return all(ours == theirs for ours, theirs in zip(TESTED.values(), found, strict=True))


@contextlib.contextmanager
def lean(compiler: bool = False) -> Iterator[None]:
    """Import, within the block, only what a picture needs; `compiler` says that torch.compile will be used."""
    if not tested():
        yield
        return
    packages = HollowPackages(HOLLOW if compiler else (*HOLLOW, COMPILER))
    hidden = [name for name in UNNEEDED if name not in sys.modules]
    listing = importlib.metadata.packages_distributions
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    sys.meta_path.insert(0, packages)
    importlib.metadata.packages_distributions = dict  # reads every installed file's name
    try:
        with contextlib.ExitStack() as stack:
            if "transformers" not in sys.modules:
                import torch.distributed

                available = torch.distributed.is_available
                torch.distributed.is_available = lambda: False  # as in a build without it
                stack.callback(setattr, torch.distributed, "is_available", available)
            yield
    finally:
        importlib.metadata.packages_distributions = listing
        sys.meta_path.remove(packages)
        packages.forget()
        for name in hidden:
            if sys.modules.get(name, packages) is None:
                del sys.modules[name]
