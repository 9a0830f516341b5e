"""The layout of the package: the import contracts of pyproject.toml, and rules of the house that no linter knows."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "unilip"
PRINTING = ("cli/",)  # files, and folders
LIGHT = ("__init__.py", "cli/")  # what starting imports
HEAVY = {"torch", "torchvision", "transformers", "diffusers"}
TOKENIZER_IDS = set(range(151665, 151668))  # <img>, </img>, <IMG_CONTEXT>: the tokenizer is asked for them by name


def broken_rules(source: str, file: str) -> list[str]:
    """The lines of a file that break a rule, one sentence each."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called == "print" and isinstance(function, ast.Name) and not file.startswith(PRINTING):
                found.append(f"{file}:{node.lineno} prints; library code logs, the command line speaks")
            if called == "open" and ast.unparse(function) == "Image.open" and file != "pictures.py":
                found.append(f"{file}:{node.lineno} opens a picture of any format; use unilip.pictures.open_picture")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if off and keyword.arg == "strict" and called not in {"zip", "map", "batched"}:
                    found.append(f"{file}:{node.lineno} strict=False; name the keys that may be missing instead")
                if off and keyword.arg == "weights_only":
                    found.append(f"{file}:{node.lineno} weights_only=False runs whatever the file contains")
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in TOKENIZER_IDS:
            found.append(f"{file}:{node.lineno} a token id as a number; ask the tokenizer by name")
    for node in at_import(tree.body) if file.startswith(LIGHT) else ():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        found += [f"{file}:{node.lineno} imports {name} on start" for name in names if name.split(".")[0] in HEAVY]
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


def test_the_import_contracts_are_kept():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def test_the_rules_are_kept():
    files = [path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.rglob("*.py"))]
    assert {"__init__.py", "cli/__init__.py"} <= set(files)
    assert [line for file in files for line in broken_rules((SOURCE / file).read_text(encoding="utf-8"), file)] == []


def test_the_rules_catch():
    cases = {
        "print('x')": 1,
        "logger.info('print')": 0,
        "model.load_state_dict(s, strict=False)": 1,
        "zip(a, b, strict=False)": 0,
        "torch.load(f, weights_only=False)": 1,
        "image_id = 151_667": 1,
        "Image.open(path)": 1,
        "vocabulary = 151674": 0,
    }
    assert {source: len(broken_rules(source, "model.py")) for source in cases} == cases
    starting = {
        "import torch.nn as nn": 1,
        "try:\n    from diffusers import X\nexcept ImportError:\n    import transformers": 2,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch": 0,
        "def f():\n    import torch": 0,
    }
    assert {source: len(broken_rules(source, "cli/x.py")) for source in starting} == starting
