"""What is installed without extras suffices for what the package does by itself, and versions are pinned."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
requirements = pytest.importorskip("packaging.requirements")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)

PROGRAM = """
import sys
blocked = set(sys.argv[1].split(","))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import json, importlib
for module in json.loads(sys.argv[2]):
    importlib.import_module(module)
from unilip import cli
for words in json.loads(sys.argv[3]):
    code = cli.main(words)
    assert code == 0, (words, code)
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names: list[str], seen: dict[str, None]) -> dict[str, None]:
    """The installed packages that these need, by themselves and through others, extras left aside."""
    for text in names:
        one = requirements.Requirement(text)
        if (one.marker and not one.marker.evaluate({"extra": ""})) or plain(one.name) in seen:
            continue
        try:
            more = metadata.requires(one.name) or []
        except metadata.PackageNotFoundError:  # of another platform's wheels
            continue
        seen[plain(one.name)] = None
        needed(more, seen)
    return seen


def run(blocked: set[str], modules: list[str], commands: list[list[str]]) -> None:
    arguments = [",".join(sorted(blocked)), json.dumps(modules), json.dumps(commands)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_base_install_answers_draws_edits_reconstructs_and_converts(tiny_folder, picture, tmp_path):
    base = needed(PROJECT["dependencies"], {})
    homes = metadata.packages_distributions()
    blocked = {module for module, names in homes.items() if not {plain(n) for n in names} & {*base, "unilip"}}
    assert {"transformers", "diffusers", "peft", "fastapi"} & set(homes) <= blocked and "torch" not in blocked
    picture().save(tmp_path / "a.png")
    model, image = ["--model", str(tiny_folder)], str(tmp_path / "a.png")
    run(blocked, [], [
        ["generate", "a star", *model, "--steps", "1", "--output", str(tmp_path / "star")],
        ["edit", image, "make it red", *model, "--steps", "1", "--output", str(tmp_path / "red")],
        ["reconstruct", image, *model, "--output", str(tmp_path / "again")],
        ["ask", image, "What is it?", *model, "--max-new-tokens", "2"],
        ["info"],
        ["convert", str(tiny_folder), str(tmp_path / "theirs"), "--to", "authors"],
        ["convert", str(tiny_folder), str(tmp_path / "internvl"), "--to", "transformers"],
    ])  # fmt: skip


def test_training_serving_and_evaluation_need_no_host():
    modules = ["unilip.train.loop", "unilip.emoji.score", "unilip.pipeline", "unilip.verify", "unilip.serve.app"]
    run({"transformers", "diffusers"}, modules, [])


def test_every_package_that_is_asked_for_is_pinned():
    pins = {plain(name) for name in PINS}
    asked = [r for group in PROJECT["optional-dependencies"].values() for r in group] + PROJECT["dependencies"]
    names = {plain(requirements.Requirement(text).name) for text in asked}
    assert sorted(names - pins - {"unilip"}) == []
    assert len(pins) == len(PINS), "each once"
