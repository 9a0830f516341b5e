"""The verbs of evaluation: eval NAME."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip.cli.options import Options, number, whole
from unilip.cli.terminal import bars, pick, plural, say, source_of
from unilip.errors import UniLIPError, check_choice
from unilip.machine import Place, choose_device

if TYPE_CHECKING:
    from unilip.eval.vlm import Terms


def prices(text: str) -> tuple[float, float]:
    """Read two prices, of a million tokens in and out."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = -1.0
    if min(low, high) < 0 or not math.isfinite(low + high):
        raise argparse.ArgumentTypeError(f"{text!r} is not two prices, such as 2.5,10")
    return low, high


JUDGE: dict[str, Callable[[str], Any]] = {  # of --judge-set, which says what they are
    "workers": whole(1, 1024), "retries": whole(0, 100),
    "timeout": number(0, above=True), "prices": prices, "cache": lambda text: Path(text).expanduser(),
}  # fmt: skip


def eval_emoji(o: Options) -> None:
    """Measure a model in the emoji world."""
    folder = output_of(o, "results")
    device = choose_device(o.device)
    from unilip.emoji import score as emoji
    from unilip.emoji.world import World
    from unilip.model import UniLIP

    parts = names_of(o.parts)
    for part in parts or ():  # before the model is read
        check_choice("part", part, emoji.PARTS)
    world = None if o.world is None else World.preset(o.world)
    model = UniLIP.from_pretrained(source_of(o), device=device, dtype=o.dtype)
    given = pick(o, "count", "seeds", "steps", "guidance_scale", "preset", "batch_size")
    results = emoji.evaluate(model, folder, world, parts=parts, progress=bars(o), **given)
    o.report.line(folder / "results.md", folder / "index.html")
    o.report.end("measured", output=str(folder), results=results)


def eval_claims(o: Options) -> None:
    """Test the paper's claims on the ablations that have been trained."""
    output = output_of(o, "eval-claims")
    device = choose_device(o.device)
    from unilip.eval import claims

    given = pick(o, "count", "seeds", "dtype", "batch_size") | {"parts": names_of(o.parts), "device": device}
    found = claims.evaluate(o.words[0], output, o.world, progress=bars(o), **given)
    for size, record in found["sizes"].items():
        for claim in record["claims"]:
            o.report.line(f"{size} {claim['claim']}. {claim['words']} | {claim['verdict']}")
            o.report.line(*(f"    {claims.tell(statement)}" for statement in claim["statements"]))
        o.report.line(*(f"not trained: {command}" for command in record["missing"].values()))
    o.report.line(output / "results.md")
    o.report.end(f"evidence in {output}", output=str(output), results=found)


def names_of(text: str | None) -> list[str] | None:
    """Return names with commas between as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def output_of(o: Options, usual: str) -> Path:
    """Return the run folder, which may be new, but not its parent."""
    folder = Path(o.output or usual)
    if folder.exists() and not folder.is_dir():
        raise UniLIPError(f"{folder} is a file, not a folder; give another --output.")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another --output.")
    return folder


def judge_terms(o: Options) -> Terms | None:
    """Return whom to ask and how, or None where no judge was named."""
    if getattr(o, "judge", None) is None:
        if getattr(o, "judge_model", None) is not None or getattr(o, "judge_set", None):
            raise UniLIPError("--judge-model (and --judge-set) needs --judge, its address: http://127.0.0.1:8000/v1.")
        return None
    from unilip.eval.vlm import Terms

    given: dict[str, Any] = {}
    for text in o.judge_set:
        name, _, value = text.partition("=")
        if name not in JUDGE or not value:
            raise UniLIPError(f"--judge-set {text} is not understood; give NAME=VALUE, with one of {', '.join(JUDGE)}.")
        try:
            given[name] = JUDGE[name](value)
        except argparse.ArgumentTypeError as error:
            raise UniLIPError(f"--judge-set {name}: {error}.") from error
    return Terms(o.judge or "", o.judge_model or "", **given)


def tell_scores(o: Options, summaries: Sequence[Mapping[str, Any]], output: Path, **more: Any) -> int:
    """Print scores, each under its protocol and scorer; returns 1 where an item is without one."""
    from unilip.eval.scores import column, tell

    o.report.line(*(line for summary in summaries for line in tell(summary)))
    left = sum(n for summary in summaries for status, n in summary["statuses"].items() if status != "ok")
    told = [{"column": column(summary), **summary} for summary in summaries]
    o.report.end(f"results in {output}", output=str(output), scores=told, open=left, **more)
    if left:
        say(f"{plural(left, 'item')} could not be scored; run the command again to ask for these alone.")
    return 1 if left else 0


def eval_benchmark(name: str, o: Options) -> int:
    """Make a benchmark's pictures, and score them where a scorer is named."""
    output, terms = output_of(o, f"eval-{name}"), judge_terms(o)
    official, judge, rubric_of, fit = (getattr(o, key, None) for key in ("official", "judge", "rubric", "fit"))
    some = {key: getattr(o, key, None) for key in ("protocol", "sources")}  # only some verbs have any of these
    from unilip.eval.benchmarks import open_benchmark
    from unilip.eval.rubrics import read_rubric

    benchmark = open_benchmark(name, o.prompts, own_prompts=o.own_prompts, **some).first(o.count)
    rubric = read_rubric(name, benchmark.protocol, rubric_of)
    from unilip.eval import generation, scoring, vlm

    if official:  # complains before anything is drawn
        called = {"python": o.official_python, "arguments": o.official_args, "terms": terms}
        scoring.find_program(benchmark, official, **called)
    elif terms is not None:
        vlm.RemoteJudge(terms)
    place, counts = Place.of_environment(), dict[str, Any]()
    if o.drawing:
        device, source = choose_device(o.device), source_of(o)
        given = pick(o, "steps", "guidance_scale", "image_size", "seed", "dtype")
        settings = generation.Settings.resolve(source, fit=fit, **given)
        given = pick(o, "batch_size") | {"device": device, "progress": bars(o)}
        made = generation.generate(benchmark, output, source, settings, **given)
        counts = {key: made[key] for key in ("made", "there", "missing")}
        if place.rank == 0:
            done, there = plural(made["made"], "file"), made["there"]
            say(f"{done} made, {there} there before, {made['missing']} missing, in {output}")
    else:
        scoring.check_complete(benchmark, output)
    if place.rank:
        return 0
    if not (official or judge):
        o.report.line(output)
        o.report.end("", output=str(output), scores=[], **counts)
        return 0
    while o.drawing and place.world > 1 and (left := generation.missing(benchmark, output)):
        say(f"waiting for {plural(len(left), 'file')} of other processes")
        time.sleep(5)
    if official:
        scored = scoring.score_officially(benchmark, output, official, prompts=o.prompts or "", **called)
    else:
        assert terms is not None
        scored = scoring.score_by_judge(benchmark, output, terms, rubric=rubric, progress=bars(o))
    return tell_scores(o, [scored], output, **counts)


def eval_recon(o: Options) -> int:
    """Measure how much of pictures survives the tokenizer."""
    output = output_of(o, "eval-recon")
    device = choose_device(o.device)
    from unilip.eval import recon
    from unilip.eval.pictures import open_pictures

    pictures = open_pictures(o.words[0], o.count)
    given = pick(o, "protocol", "features", "batch_size", "dtype") | {"measures": names_of(o.measures) or ()}
    summary = recon.evaluate(pictures, output, source_of(o), device=device, progress=bars(o), **given)
    return 0 if summary is None else tell_scores(o, [summary], output)


def eval_understand(o: Options) -> int:
    """Ask the questions of a file about pictures."""
    output = output_of(o, "eval-understand")
    device = choose_device(o.device)
    from unilip.eval import understand

    sheet = understand.open_questions(o.words[0], o.images)
    given = pick(o, "count", "max_tiles", "max_new_tokens", "batch_size", "dtype") | {"name": Path(o.words[0]).stem}
    summaries = understand.evaluate(sheet, output, source_of(o), device=device, progress=bars(o), **given)
    if summaries is None:
        return 0
    o.report.line(output / "answers.jsonl")
    return tell_scores(o, summaries, output)


def eval_compare(o: Options) -> None:
    """Put runs side by side."""
    output = output_of(o, "eval-compare")
    from unilip.eval.compare import compare, to_markdown

    found = compare(o.words, output, o.pictures)
    o.report.line(to_markdown(found["tables"], found["pictures"]))
    o.report.end(f"comparison in {output}", output=str(output), tables=found["tables"])
