"""Asking for help is quick. A clock would make this test flaky, so it looks at what is loaded instead."""

import subprocess
import sys

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
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
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
