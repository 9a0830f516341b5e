"""What README and docs tell people to type exists: commands parse, make targets are there, links lead somewhere."""

import re
import shlex
from pathlib import Path

from unilip import cli
from unilip.cli.options import TABLE
from unilip.errors import UniLIPError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(program):
    """Every command of the pages that starts with a program, with the page."""
    for path in PAGES:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == program:
                    yield path.name, words[1:]


def complaint(words):
    """What is wrong with a command; nothing if it parses, its recipe and settings included."""
    try:
        name, options = cli.parse(words)
        if name == "train" and options.words:
            override(get_recipe(options.words[0]), options.settings)
    except (UniLIPError, SystemExit) as error:
        return f"{' '.join(words)}: {error}"
    return ""


def test_commands_parse():
    told = list(commands("unilip"))
    assert len(told) > 100
    assert [(page, wrong) for page, words in told if (wrong := complaint(words))] == []
    assert complaint(["generate", "--stepz", "3"]) and complaint(["train", "tiny/clip", "--set", "stepz=3"])


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [(page, words) for page, words in commands("make") if not set(words) & set(targets)] == []


def test_readme_starts_with_the_two_commands():
    first = blocks(ROOT / "README.md", "bash")[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]


def test_readme_and_usage_name_every_verb_and_option():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    usage = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    assert [name for name in cli.VERBS if f"unilip {name}" not in readme] == []
    assert [option for option in TABLE["options"] if option not in usage] == []


def test_links_lead_somewhere():
    links = [(path, link) for path in PAGES for link in LINK.findall(path.read_text(encoding="utf-8"))]
    missing = [(path.name, link) for path, link in links if not leads(path, link)]
    assert len(links) > 50 and missing == []
    assert not leads(ROOT / "README.md", "docs/none.md") and not leads(ROOT / "README.md", "docs/usage.md#none")


def leads(page, link):
    """Whether a link of a page leads to a file, and to a heading in it."""
    target, _, heading = link.partition("#")
    place = (page.parent / target).resolve() if target else page
    if link.startswith("http"):
        return True
    if not place.exists() or not heading:
        return place.exists()
    titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_python_blocks_compile():
    for path in PAGES:
        for block in blocks(path, "python"):
            compile(block, str(path), "exec")


def test_the_python_quickstart_runs(tiny_folder, tmp_path, monkeypatch):
    from unilip.model import UniLIP

    load = UniLIP.from_pretrained
    monkeypatch.setattr(UniLIP, "from_pretrained", lambda: load(tiny_folder))
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {})
    assert (tmp_path / "again.png").is_file()
