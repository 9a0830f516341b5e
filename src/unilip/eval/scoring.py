"""Score the pictures of a run: by a judge behind an address, or by the benchmark authors' own program.

In: a benchmark and its run folder. Out: scores/NAME.json and .jsonl, whose "scorer" says who judged and by
what wording. Pictures that are missing are an error; nothing is scored in their place.
"""

import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from unilip.errors import UniLIPError, differences, reason
from unilip.eval.benchmarks import KNOWN, Benchmark, wise_files
from unilip.eval.generation import check_pictures, missing
from unilip.eval.rubrics import JUDGED, Rubric, judged_row
from unilip.eval.runs import PICTURES, read_manifest
from unilip.eval.scores import FOLDER, Row, write_scores
from unilip.eval.vlm import STATUSES, RemoteJudge, Terms
from unilip.files import read_lines

log = logging.getLogger(__name__)

CHUNK = 64  # items whose pictures are in memory at once
OURS = Rubric()
PROGRAMS: dict[str, list[str]] = KNOWN["programs"]


def check_complete(benchmark: Benchmark, output: Path) -> dict[str, Any]:
    """Return the manifest of a run whose pictures are all there. Raises UniLIPError: another run, missing pictures."""
    manifest = read_manifest(output)
    identity = manifest["identity"]
    if other := differences(identity, benchmark.identity):
        raise UniLIPError(f"{output} holds another run: {other}. Give the prompts and protocol that it was made with.")
    if left := missing(benchmark, output):
        raise UniLIPError(
            f"{len(left)} of {len(benchmark.items)} pictures are missing in {output}, the first is {left[0].path}; run "
            "the command without --no-generate to make them."
        )
    check_pictures(output, benchmark.items, identity)
    return manifest


def _about(benchmark: Benchmark, manifest: Mapping[str, Any], scorer: str) -> dict[str, Any]:
    return {
        "task": benchmark.name, "protocol": benchmark.protocol, "scorer": scorer, "model": manifest["model"],
        "model_hash": manifest["identity"]["model"], "prompts": benchmark.prompts,
        "prompts_scored": len({item.cluster for item in benchmark.items}), "settings": manifest["identity"]["settings"],
    }  # fmt: skip


def score_by_judge(
    benchmark: Benchmark, output: Path, terms: Terms, *, rubric: Rubric = OURS, progress: bool = False
) -> dict[str, Any]:
    """Ask a judge about a run's pictures; returns scores/judge-NAME.json. Raises UniLIPError: no pictures, no judge."""
    if benchmark.name not in JUDGED:
        raise UniLIPError(f"{benchmark.name} is scored by its authors' program: --official CHECKOUT, not by a judge.")
    manifest = check_complete(benchmark, output)
    judge = RemoteJudge(replace(terms, cache=terms.cache or output / "judge-cache"))
    rows: list[Row] = []
    with tqdm(total=len(benchmark.items), desc=f"judge {terms.model}", unit="item", disable=not progress) as bar:
        for start in range(0, len(benchmark.items), CHUNK):
            items = benchmark.items[start : start + CHUNK]
            lists = [JUDGED[benchmark.name][0](benchmark, rubric, item, output / item.path) for item in items]
            answers = iter(judge.ask([question for questions in lists for question in questions]))
            for item, questions in zip(items, lists, strict=True):
                rows.append(judged_row(benchmark, item, [next(answers) for _ in questions]))
                bar.update()
    about = _about(benchmark, manifest, f"judge {terms.model}, rubric {rubric.name}")
    about["cost"] = judge.tally.to_dict(terms.prices)
    came = {name: judge.tally[name] for name in STATUSES if judge.tally[name]}
    about["questions"] = {"asked": sum(came.values()), **came}
    return write_scores(output, f"judge-{terms.model}-{rubric.name}", rows, benchmark.rule, about)


# The program's words come on its stdin: a key among them would be in every list of processes.
LAUNCH = (
    "import json, os, runpy, sys; sys.argv = json.loads(sys.stdin.readline()); "
    "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def find_program(
    benchmark: Benchmark, checkout: str | Path, *, python: str | None = None, arguments: str = "",
    terms: Terms | None = None,
) -> tuple[Path, str, list[str]]:  # fmt: skip
    """Return the checkout, the interpreter and more words of the authors' program. Raises UniLIPError: there is none.

    In: checkout: of the authors' repository. python: the scorer's interpreter; this one by default. arguments: more
    words for it, such as GenEval's --model-path. terms: wise only, the judge that it asks.
    """
    name, folder = benchmark.name, Path(checkout).expanduser().resolve()
    if name not in PROGRAMS:
        raise UniLIPError(
            f"The scorer of {name} has its judge's address and key written into its source, so it cannot be run as it "
            "is; use --judge with --rubric, which asks the same questions."
        )
    if not (folder / PROGRAMS[name][0]).is_file():
        raise UniLIPError(f"There is no {PROGRAMS[name][0]} in {folder}; give a checkout of {name}'s repository.")
    if name == "wise" and (benchmark.protocol != "verified" or terms is None):
        raise UniLIPError("WISE's official scorer is for --protocol verified, and needs --judge and --judge-model.")
    interpreter = shutil.which(python or sys.executable)
    if interpreter is None:
        raise UniLIPError(f"There is no program {python}; give the scorer's Python as --official-python.")
    try:
        return folder, os.path.abspath(interpreter), shlex.split(arguments)
    except ValueError as error:
        raise UniLIPError(f"--official-args {arguments} cannot be split ({error}); close its quotes.") from error


def score_officially(
    benchmark: Benchmark, output: Path, checkout: str | Path, *, prompts: str | Path, terms: Terms | None = None,
    **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run the scorer of a benchmark's authors on a run; returns the summary that scores/official.json holds.

    In: prompts: the prompt file of the run. The rest is as for `find_program`.
    Raises UniLIPError: no such program, it failed, or its results lack items.
    """
    name = benchmark.name
    folder, python, more = find_program(benchmark, checkout, terms=terms, **given)
    inside, *form = PROGRAMS[name]  # in the checkouts, and the words that they are called with
    program = folder / inside
    manifest = check_complete(benchmark, output)
    root, made = output.resolve(), output.resolve() / FOLDER / "official-files"
    shutil.rmtree(made, ignore_errors=True)  # results of an earlier call are not those of this one
    made.mkdir(parents=True)
    size = manifest["identity"]["settings"]["image_size"]
    judge, given = "", {"images": root / PICTURES, "made": made, "size": size, "checkout": folder, "terms": terms}
    if name == "wise" and terms is not None:
        given["timeout"], judge = math.ceil(terms.timeout), f", judge {terms.model}"
        more += ["--api_key", terms.key or os.environ.get("OPENAI_API_KEY") or "none"]
    source = Path(prompts).expanduser().resolve()
    for file in wise_files(source) if name == "wise" and source.is_dir() else [source]:
        words = [str(program), *(word.format(prompts=file, stem=file.stem, **given) for word in form), *more]
        log.info("running %s", program)
        talk: dict[str, Any] = {"input": json.dumps(words) + "\n", "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run([python, "-c", LAUNCH], cwd=root, capture_output=True, **talk)
        with (made / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(done.stdout + done.stderr)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UniLIPError(
                f"{program.name} ended with code {done.returncode}: {last[:200]}; all that it said is in "
                f"{made / 'log.txt'}. It may need its own environment: --official-python."
            )
    try:
        rows = _READERS[name](benchmark, made)
    except UniLIPError:
        raise
    except (OSError, LookupError, TypeError, ArithmeticError, ValueError) as error:
        raise UniLIPError(
            f"{program.name} left no results that can be read ({reason(error, 200)}); all that it said is in "
            f"{made / 'log.txt'}."
        ) from error
    full = [item.row(rows.get(item.key), "ok" if item.key in rows else "failed") for item in benchmark.items]
    if lacking := sum(row["scores"] is None for row in full):
        log.warning("%s gave no score for %d of %d items", program.name, lacking, len(full))
    about = _about(benchmark, manifest, f"official {inside}{judge}")
    return write_scores(output, "official", full, benchmark.rule, about)


Found = dict[str, dict[str, float]]


def _read_geneval(benchmark: Benchmark, made: Path) -> Found:
    rows = {Path(row["filename"]): row for row in read_lines(made / "results.jsonl", "results of GenEval")}
    return {f"{path.parents[1].name}/{path.stem}": {"correct": float(row["correct"])} for path, row in rows.items()}


def _read_geneval2(benchmark: Benchmark, made: Path) -> Found:
    lists = json.loads((made / "lists.json").read_text(encoding="utf-8"))
    if len(lists) != len(benchmark.items):
        raise UniLIPError(f"evaluation.py scored {len(lists)} prompts, not {len(benchmark.items)}; run all of them.")
    return {
        item.key: {
            "soft_tifa_gm": math.exp(sum(math.log(v) for v in values) / len(values)) if min(values) > 0 else 0.0,
            "soft_tifa_am": sum(values) / len(values),
        }
        for item, values in zip(benchmark.items, lists, strict=True)
    }


def _read_dpg(benchmark: Benchmark, made: Path) -> Found:
    found = {}
    for line in (made / "results.txt").read_text(encoding="utf-8").splitlines():
        name, *values = line.rsplit(", ", 5)
        if name.endswith(".png") and len(values) == 5:
            found[Path(name).stem] = {"dpg": float(values[-1])}
    return found


def _read_wise(benchmark: Benchmark, made: Path) -> Found:
    rows = [row for file in sorted(made.glob("*_scores.jsonl")) for row in read_lines(file, "results of WISE")]
    return {str(row["prompt_id"]): {"wiscore": float(row["score"])} for row in rows if row["score"] is not None}


_READERS = {"geneval": _read_geneval, "geneval2": _read_geneval2, "dpg": _read_dpg, "wise": _read_wise}
