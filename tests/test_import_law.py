"""The layout of the package, held by reading the source without importing it.

In: the files of src/unilip. Out: for each file, the lines that break the import law or a rule of the house.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "unilip"

# The core, in reading order: a file imports only from files above it.
ROAD = (
    "errors",
    "files",
    "machine",
    "pictures",
    "config",
    "preprocess",
    "encoder",
    "mllm",
    "connector",
    "packing",
    "dit",
    "flow",
    "decoder",
    "checkpoints",
    "adapters",
    "acceleration",
    "memory",
    "model",
)

# What stands on the core. Each may import all of it, and of its neighbours only those named here.
LAYERS = {
    "data": (),
    "emoji": ("data",),
    "recipes": (),
    "train": ("data", "emoji", "recipes"),  # data is what training reads
    "eval": ("data", "emoji"),  # and what evaluation compares with
    "serve": (),
}

# Files outside both: what they may import.
OTHERS = {
    "weights": (),
    "__init__": ROAD,
    "info": ROAD,
    "verify": ROAD,
    "pipeline": ROAD,
    "demo": (*ROAD, "weights", "__init__"),
    "cli": (*ROAD, *LAYERS, "info", "verify", "demo", "weights", "__init__"),
    "__main__": ("cli",),
}

PRINTING = ("cli/", "train/__main__.py")  # files, and folders
LIGHT = ("__init__.py", *(f"cli/{path.name}" for path in sorted((SOURCE / "cli").glob("*.py"))))
HEAVY = {"torch", "torchvision", "transformers", "diffusers"}
TOKENIZER_IDS = set(range(151665, 151668))  # <img>, </img>, <IMG_CONTEXT>: the tokenizer is asked for them by name

FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES)


def place(file: str) -> str:
    """The entry of the tables a file belongs to: 'dit.py' -> 'dit', 'train/loop.py' -> 'train'."""
    return file.split("/")[0].removesuffix(".py")


def allowed(name: str) -> set[str]:
    """The places that files of this place may import from."""
    if name in ROAD:
        return {name, "weights", *ROAD[: ROAD.index(name)]}
    if name in LAYERS:
        return {name, "weights", "__init__", *ROAD, *LAYERS[name]}
    return {name, *OTHERS[name]}


def imports(tree: ast.Module, file: str) -> Iterator[tuple[int, list[str]]]:
    """Every import in the file, wherever it stands, as (line, dotted path); relative ones are made absolute."""
    package = ["unilip", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, base + (node.module.split(".") if node.module else []) + [alias.name]
        elif isinstance(node, ast.Call) and name_of(node.func) in {"import_module", "__import__"} and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                base = package if target.value.startswith(".") else []
                yield node.lineno, base + target.value.lstrip(".").split(".")


def name_of(function: ast.expr) -> str:
    """The last name of what is called: 'load' for torch.load."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def broken_imports(source: str, file: str) -> list[str]:
    """The imports of a file that the law forbids, one sentence each."""
    known = {*ROAD, *LAYERS, *OTHERS}
    found = []
    for line, path in imports(ast.parse(source), file):
        if path[0] != "unilip" or path[1:] == ["__version__"]:
            continue
        target = path[1] if len(path) > 1 and path[1] in known else "__init__"
        if target not in allowed(place(file)):
            found.append(f"{file}:{line} imports {'.'.join(path)}, but {place(file)} stands above or beside {target}")
    return found


def broken_rules(source: str, file: str) -> list[str]:
    """The lines of a file that break a rule of the house other than the import law."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            if called == "print" and isinstance(node.func, ast.Name) and not file.startswith(PRINTING):
                found.append(f"{file}:{node.lineno} prints; library code logs, the command line speaks")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if off and keyword.arg == "strict" and called not in {"zip", "map", "batched"}:
                    found.append(f"{file}:{node.lineno} strict=False; name the keys that may be missing instead")
                if off and keyword.arg == "weights_only":
                    found.append(f"{file}:{node.lineno} weights_only=False runs whatever the file contains")
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in TOKENIZER_IDS:
            found.append(f"{file}:{node.lineno} a token id as a number; ask the tokenizer by name")
    return found


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not function bodies, not what only type checkers see."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def heavy_imports(source: str, file: str) -> list[str]:
    """The imports at module level that make starting slow."""
    found = []
    for node in at_import(ast.parse(source).body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        found += [f"{file}:{node.lineno} imports {name} on start" for name in names if name.split(".")[0] in HEAVY]
    return found


def test_the_package_is_found():
    assert "__init__.py" in FILES and "cli/__init__.py" in FILES, f"no package in {SOURCE.name}/"


def test_every_file_has_a_place():
    strangers = sorted({place(file) for file in FILES} - {*ROAD, *LAYERS, *OTHERS})
    assert not strangers, f"{strangers} are in none of the tables of this test: give them a place on the road first"


@each_file
def test_imports_follow_the_road(file):
    assert broken_imports((SOURCE / file).read_text(encoding="utf-8"), file) == []


@each_file
def test_rules_of_the_house(file):
    assert broken_rules((SOURCE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", LIGHT)
def test_starting_is_light(file):
    assert heavy_imports((SOURCE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("encoder.py", "from unilip.model import UniLIP"),
        ("encoder.py", "from unilip import model"),
        ("encoder.py", "from unilip import UniLIP"),
        ("encoder.py", "import unilip.decoder as d"),
        ("encoder.py", "from . import mllm"),
        ("encoder.py", "from .mllm import x"),
        ("encoder.py", "def f():\n    from unilip.train.loop import fit"),
        ("encoder.py", "import importlib\nimportlib.import_module('unilip.dit')"),
        ("model.py", "from unilip.data import scenes"),
        ("__init__.py", "from .serve import app"),
        ("serve/app.py", "from unilip.train import loop"),
        ("data/scenes.py", "from ..train import loop"),
        ("emoji/judge.py", "from unilip.eval.runs import read_json"),
        ("eval/judge.py", "from unilip import cli"),
        ("demo.py", "from unilip.data import scenes"),
        ("model.py", "from unilip.verify import verify"),
    ],
)
def test_the_law_catches(file, source):
    assert len(broken_imports(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("errors.py", "import torch"),
        ("model.py", "from .checkpoints import read\nfrom unilip.flow import denoise\nfrom unilip import config"),
        ("checkpoints/read.py", "from unilip import __version__"),
        ("train/loop.py", "from ..data import scenes\nfrom ..recipes import record\nfrom unilip import UniLIP"),
        ("eval/judge.py", "import unilip.data.scenes"),
        ("cli.py", "def f():\n    from unilip.train import loop\n    from unilip.serve import app"),
    ],
)
def test_the_law_allows(file, source):
    assert broken_imports(source, file) == []


@pytest.mark.parametrize(
    ("source", "breaks"),
    [
        ("print('x')", 1),
        ("logger.info('print')", 0),
        ("model.load_state_dict(s, strict=False)", 1),
        ("zip(a, b, strict=False)", 0),
        ("torch.load(f, weights_only=False)", 1),
        ("image_id = 151_667", 1),
        ("vocabulary = 151674", 0),
    ],
)
def test_the_rules_catch(source, breaks):
    assert len(broken_rules(source, "model.py")) == breaks


@pytest.mark.parametrize(
    ("source", "breaks"),
    [
        ("import torch.nn as nn", 1),
        ("try:\n    from diffusers import X\nexcept ImportError:\n    import transformers", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("def f():\n    import torch", 0),
    ],
)
def test_heavy_imports_are_seen(source, breaks):
    assert len(heavy_imports(source, "cli.py")) == breaks
