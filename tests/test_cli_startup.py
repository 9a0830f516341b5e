"""Asking for help is quick, and a picture loads only what it needs.

A clock would make these tests flaky, so they look at what is loaded instead.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from unilip.cli import lean

ROOT = Path(__file__).parent.parent

HEAVY = ("torch", "torchvision", "transformers", "diffusers", "numpy", "matplotlib")

LOADED_AFTER_IMPORT = f"""
import sys
import unilip, unilip.cli
print(*[name for name in {HEAVY} if name in sys.modules])
"""

LOADED_AFTER_HELP = f"""
import contextlib, io, sys
import unilip.cli
sys.argv = ["unilip", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    unilip.cli.main()
print(*[name for name in {HEAVY} if name in sys.modules])
"""


def run(*arguments: str) -> str:
    """What a fresh interpreter prints; its complaint, if it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_answers():
    text = run("-m", "unilip.cli", "--help")
    assert "usage" in text.lower()
    for command in ("ask", "generate", "edit", "reconstruct", "demo"):
        assert command in text, f"help does not name the command {command!r}"


def test_importing_the_command_line_loads_nothing_heavy():
    assert run("-c", LOADED_AFTER_IMPORT) == ""


def test_help_loads_nothing_heavy():
    assert run("-c", LOADED_AFTER_HELP) == ""


NOT_FOR_A_PICTURE = (
    "torch._dynamo.eval_frame", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "scipy", "peft",
    "torchao", "pandas", "gradio", "datasets", "diffusers.models.unets.unet_3d_blocks",
    "diffusers.models.autoencoders.autoencoder_kl",
)  # fmt: skip

LOADED_AFTER_A_PICTURE = f"""
import sys
import unilip.cli
assert unilip.cli.main(["generate", "three yellow stars", "--steps", "1", "--output", sys.argv[1]]) == 0
print(*[name for name in {NOT_FOR_A_PICTURE} if name in sys.modules])
"""

ASKED_FOR_AFTERWARDS = """
from unilip.cli.lean import lean
with lean():
    from unilip.model import UniLIP
import torch
import diffusers, transformers, torch._dynamo, torch.distributed
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import AutoTokenizer, Qwen2Model, T5Config
assert torch.distributed.is_available() and callable(torch._dynamo.optimize)
assert issubclass(diffusers.models.autoencoders.AutoencoderDC, diffusers.ModelMixin)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


@pytest.mark.skipif(not lean.tested(), reason="other versions than those in constraints.txt are imported whole")
def test_a_picture_loads_only_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "stars.png"
    assert run("-c", LOADED_AFTER_A_PICTURE, str(path)).splitlines() == [str(path)]
    assert path.stat().st_size > 1000


def test_the_imports_are_known_of_the_pinned_versions(monkeypatch) -> None:
    pins = re.findall(r"^(\S+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(lean.TESTED.items()) <= set(pins)
    monkeypatch.setattr(lean.importlib.metadata, "version", lambda name: lean.TESTED[name] + "+cpu")
    assert lean.tested()
    monkeypatch.setattr(lean.importlib.metadata, "version", lambda name: "5.17.0")
    with lean.lean():
        assert not any(isinstance(finder, lean.HollowPackages) for finder in sys.meta_path)


@pytest.mark.slow
def test_what_was_left_out_is_there_for_who_asks() -> None:
    assert run("-c", ASKED_FOR_AFTERWARDS) == ""
