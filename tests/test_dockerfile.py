"""The Dockerfile, read without Docker: its stages and files exist, versions are pinned, its commands are ours.

In: Dockerfile and .dockerignore. Out: one sentence for each thing that a build or a run would stumble over.
"""

import fnmatch
import json
import re
from pathlib import Path

import pytest

from unilip import cli

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def instructions(text):
    """The instructions as (word, rest), continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.strip().partition(" ")[::2]) for line in joined.splitlines()]


def stages(text):
    """Each stage's name, base and instructions, those of its base first."""
    found, name = {}, ""
    for word, rest in instructions(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, list(found[base][1]) if base in found else [])
        elif name:
            found[name][1].append((word, rest))
    return found


def ignored(path):
    """Whether .dockerignore leaves a path of the top level out."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.removeprefix("!")):
            verdict = not pattern.startswith("!")
    return verdict


def problems(text):
    """What is wrong with a Dockerfile."""
    wrong = [f"unknown instruction {word}" for word, _ in instructions(text) if word not in KNOWN]
    every = stages(text)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for target in ("cpu", "cuda"):
        if target not in every:
            wrong.append(f"no target {target}")
            continue
        if [rest for word, rest in every[target][1] if word == "USER"] in ([], ["root"]):
            wrong.append(f"{target} runs as root")
    for name, (base, steps) in every.items():
        if base not in every and not re.fullmatch(r"python:(\$\{PYTHON\}|3\.\d+\S*)", base):
            wrong.append(f"{name} stands on {base}")
        for word, rest in steps:
            if word == "COPY":
                words = rest.split()
                source = next((w.removeprefix("--from=") for w in words if w.startswith("--from=")), None)
                if source is not None and source not in every:
                    wrong.append(f"there is no stage {source}")
                for path in [] if source else words[:-1]:
                    if not (ROOT / path).exists() or ignored(path):
                        wrong.append(f"{path} is not there to copy")
            if word == "RUN" and "pip install" in rest:
                if not any(w == "ENV" and "PIP_CONSTRAINT=/build/constraints.txt" in r for w, r in steps):
                    wrong.append(f"{name} installs without constraints")
                for extra in re.findall(r"\.\[([^\]]+)\]", rest):
                    wrong += [f"there is no extra {e}" for e in extra.split(",") if e not in extras]
            if word == "CMD":
                try:
                    cli.parse(json.loads(rest))
                except (ValueError, SystemExit) as error:
                    wrong.append(f"CMD: {error}")
    return wrong


def test_the_dockerfile_is_in_order():
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ("COPY src ./src", "COPY sources ./src", "sources is not there"),
        ("COPY src ./src", "COPY tests ./src", "tests is not there"),
        ("[serve]", "[magic]", "no extra magic"),
        ("USER unilip", "", "runs as root"),
        ("PIP_CONSTRAINT=/build/constraints.txt ", "", "without constraints"),
        ("--from=build-cpu", "--from=build-gpu", "no stage build-gpu"),
        ('"serve", "--host"', '"serve", "--hots"', "CMD"),
        ("EXPOSE", "EXPORT", "unknown instruction EXPORT"),
        ("FROM python:${PYTHON} AS runtime", "FROM ubuntu:latest AS runtime", "stands on ubuntu:latest"),
        ("AS cuda", "AS gpu", "no target cuda"),
    ],
)
def test_the_check_finds_what_is_wrong(before, after, wrong):
    assert before in TEXT
    assert any(wrong in line for line in problems(TEXT.replace(before, after)))


def test_the_default_target_is_the_cpu():
    assert list(stages(TEXT))[-1] == "cpu"


def test_both_targets_install_the_same_but_for_pytorch():
    every = stages(TEXT)
    runs = {
        name: [rest for word, rest in every[name][1] if word in ("RUN", "COPY") and " torch" not in rest]
        for name in ("build-cpu", "build-cuda")
    }
    assert runs["build-cpu"] == runs["build-cuda"]


def test_python_is_one_that_the_package_supports():
    wanted = re.search(r"ARG PYTHON=3\.(\d+)-", TEXT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = int(re.search(r">=3\.(\d+)", project["requires-python"]).group(1))
    assert wanted and int(wanted.group(1)) >= least


def test_pytorch_is_pinned_to_an_exact_version():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==\d+\.\d+\.\d+$", pins, re.MULTILINE)


def test_the_health_check_asks_what_the_server_answers():
    path = re.search(r"127\.0\.0\.1:(\d+)(/\w+)", TEXT)
    assert path.group(1) in re.search(r"CMD \[\"serve\".*", TEXT).group()
    assert f'"{path.group(2)}"' in (ROOT / "src/unilip/serve/app.py").read_text(encoding="utf-8")
