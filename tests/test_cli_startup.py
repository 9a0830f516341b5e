"""Asking for help is quick, and a picture loads only what it needs.

A clock would make these tests flaky, so they look at what is loaded instead.
"""

import json
import subprocess
import sys
from pathlib import Path

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
    text = run("-m", "unilip", "--help")
    assert "usage" in text.lower()
    for command in ("ask", "generate", "edit", "reconstruct", "demo"):
        assert command in text, f"help does not name the command {command!r}"


def test_importing_the_command_line_loads_nothing_heavy():
    assert run("-c", LOADED_AFTER_IMPORT) == ""


def test_help_loads_nothing_heavy():
    assert run("-c", LOADED_AFTER_HELP) == ""


NOT_FOR_A_PICTURE = (
    "transformers", "diffusers", "torchvision", "scipy", "peft", "torchao", "pandas", "datasets",
)  # fmt: skip

LOADED_AFTER_A_PICTURE = f"""
import sys
import unilip.cli
assert unilip.cli.main(["generate", "three yellow stars", "--steps", "1", "--output", sys.argv[1]]) == 0
print(*[name for name in {NOT_FOR_A_PICTURE} if name in sys.modules])
"""


def test_a_picture_loads_only_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "stars.png"
    assert run("-c", LOADED_AFTER_A_PICTURE, str(path)).splitlines() == [str(path)]
    assert path.stat().st_size > 1000


TOLD_BEFORE_TORCH = """
import sys
import unilip.cli
assert unilip.cli.main(["train", "tiny/recon", "--runs", sys.argv[1]]) == 2
assert unilip.cli.main(["train", "tiny/instruct", "--runs", sys.argv[2]]) == 0
print("torch" in sys.modules)
"""


def test_a_missing_predecessor_and_a_finished_recipe_are_told_at_once(tmp_path: Path) -> None:
    from unilip.recipes.catalog import get_recipe
    from unilip.recipes.record import plain

    final = tmp_path / "runs/tiny/instruct/final"
    final.mkdir(parents=True)
    (final / "recipe.json").write_text(json.dumps(plain(get_recipe("tiny/instruct"))))
    assert run("-c", TOLD_BEFORE_TORCH, str(tmp_path / "none"), str(tmp_path / "runs")).split() == [str(final), "False"]
