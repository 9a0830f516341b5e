"""What README and docs tell people to type exists: commands parse, make targets are there, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from unilip import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(program):
    for path in PAGES:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == program:
                    yield pytest.param(words[1:], id=f"{path.name}: {line.split('#')[0].strip()}")


@pytest.mark.parametrize("words", list(commands("unilip")))
def test_commands_parse(words):
    name, options = cli.parse(words)
    if name == "train" and options.words:
        from unilip.recipes.catalog import get_recipe
        from unilip.recipes.record import override

        override(get_recipe(options.words[0]), options.settings)


@pytest.mark.parametrize("words", list(commands("make")))
def test_make_targets_exist(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words[0] in targets


def test_readme_starts_with_the_two_commands():
    first = blocks(ROOT / "README.md", "bash")[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]


def test_readme_and_usage_name_every_verb_and_option():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    usage = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    assert [name for name in cli.VERBS if f"unilip {name}" not in readme] == []
    assert [option for option in cli.OPTIONS if option not in usage] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            place = (path.parent / target).resolve()
            assert place.exists(), target


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/usage.md"], ids=lambda path: path.name)
def test_python_blocks_compile(path):
    for block in blocks(path, "python"):
        compile(block, str(path), "exec")


def test_the_python_quickstart_runs(tiny_folder, tmp_path, monkeypatch):
    from unilip.model import UniLIP

    load = UniLIP.from_pretrained
    monkeypatch.setattr(UniLIP, "from_pretrained", lambda: load(tiny_folder))
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {})
    assert (tmp_path / "again.png").is_file()
