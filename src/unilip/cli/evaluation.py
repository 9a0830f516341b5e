"""The verbs of evaluation: eval NAME."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip.cli.options import LOADING, TELLING, Options, Verb, number, pixels, whole
from unilip.cli.terminal import Report, plural, say
from unilip.errors import UniLIPError
from unilip.machine import choose_device

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


JUDGE: dict[str, tuple[Callable[[str], Any], str]] = {  # of --judge-set: reader, and what it is
    "workers": (whole(1, 1024), "questions under way at once, 8"),
    "rate": (number(0, above=True), "questions a minute at most, no limit"),
    "retries": (whole(0, 100), "after timeouts, 429 and 5xx, with growing pauses, 6"),
    "timeout": (number(0, above=True), "seconds for an answer, 120"),
    "prices": (prices, "IN,OUT of a million tokens, to count the cost"),
    "cache": (lambda text: Path(text).expanduser(), "folder of the answers, judge-cache in the run's"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "--count": dict(type=whole(1, 100_000), metavar="N", help="prompts of each task and kind of edit (12)"),
    "--seeds": dict(type=whole(1, 1000), metavar="N", help="pictures of each prompt (4)"),
    "--parts": dict(metavar="NAMES", help="of recon,vqa,gen,edit,riddle,chain, with commas (all that the model can)"),
    "--world": dict(metavar="NAME", help="pico, nano or tiny (the one with the model's picture size)"),
    "--protocol": dict(metavar="NAME", help="how it is measured; scores of two protocols are never comparable"),
    "--own-prompts": dict(
        action="store_true", help="take a prompt file whose hash is not the published one; every score says so"
    ),
    "--sources": dict(metavar="DIR", help="folder of the pictures to edit (ImgEdit's Benchmark.tar, unpacked)"),
    "--no-generate": dict(
        action="store_false", dest="drawing", help="make no pictures; only score those that are there"
    ),
    "--judge": dict(metavar="URL", help="an OpenAI-compatible API that judges; its key is in OPENAI_API_KEY"),
    "--judge-model": dict(metavar="NAME", help="the judge's name there"),
    "--judge-set": dict(
        action="append", default=[], metavar="NAME=VALUE",
        help=f"how it is asked; repeatable: {', '.join(f'{name} ({text})' for name, (_, text) in JUDGE.items())}",
    ),
    "--rubric": dict(metavar="PATH", help="the authors' wording: their file or checkout (our own wording)"),
    "--official": dict(metavar="DIR", help="checkout of the authors' repository, whose own program scores"),
    "--official-python": dict(metavar="FILE", help="Python of the environment that it needs (this one)"),
    "--official-args": dict(metavar="WORDS", default="", help="more words for it, such as '--model-path weights'"),
    "--measures": dict(
        metavar="NAMES", default="psnr,ssim,ssim_paper", help="of psnr,ssim,ssim_paper,lpips,rfid (the first three)"
    ),
    "--features": dict(
        metavar="NAME", default="torch-fidelity",
        help="of rfid: torch-fidelity, a TorchScript file (inception-2015-12-05.pt), or encoder, the model's own, "
        "which is no rFID and named so",
    ),
    "--images": dict(metavar="DIR", help="folder that the pictures' paths are relative to (the file's)"),
    "--pictures": dict(type=whole(0, 64), default=8, metavar="N", help="prompts whose pictures are shown (8)"),
}  # fmt: skip


def eval_emoji(o: Options) -> int:
    """Measure a model in the emoji world."""
    report = Report(o, "eval emoji")
    folder = output_of(o, "results", "results")
    device = choose_device(o.device)
    from unilip.emoji import score as emoji
    from unilip.emoji.world import World
    from unilip.model import UniLIP

    parts = names_of(o.parts)
    unknown = sorted(set(parts or ()) - set(emoji.PARTS))
    if unknown:
        raise UniLIPError(f"--parts names {', '.join(map(repr, unknown))}; allowed: {', '.join(emoji.PARTS)}.")
    world = None if o.world is None else World.preset(o.world)
    model = UniLIP.from_pretrained(o.model, device=device, dtype=o.dtype)
    given = {"parts": parts, **pick(o, "count", "seeds", "steps", "guidance_scale", "preset", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None}
    results = emoji.evaluate(model, folder, world, progress=bars(o), **given)
    for name in ("results.md", "index.html"):
        report.line(str(folder / name))
    report.end("measured", output=str(folder), results=results)
    return 0


def eval_claims(o: Options) -> int:
    """Test the paper's claims on the ablations that have been trained."""
    report = Report(o, "eval claims")
    output = output_of(o, "claims")
    device = choose_device(o.device)
    from unilip.eval import claims

    given = pick(o, "count", "seeds", "dtype", "batch_size")
    found = claims.evaluate(
        o.words[0], output, o.world, parts=names_of(o.parts), device=device, progress=bars(o), **given
    )
    for size, record in found["sizes"].items():
        for claim in record["claims"]:
            report.line(f"{size} {claim['claim']}. {claim['words']} | {claim['verdict']}")
            for statement in claim["statements"]:
                report.line(f"    {claims.tell(statement)}")
        for command in record["missing"].values():
            report.line(f"not trained: {command}")
    report.line(str(output / "results.md"))
    report.end(f"evidence in {output}", output=str(output), results=found)
    return 0


def pick(o: Options, *names: str) -> dict[str, Any]:
    """Return options by their names, for a function that calls them so, too."""
    return {name: getattr(o, name) for name in names}


def names_of(text: str | None) -> list[str] | None:
    """Return names with commas between as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def output_of(o: Options, name: str, usual: str = "") -> Path:
    """Return the run folder, which may be new, but not its parent."""
    folder = Path(o.output or usual or f"eval-{name}").expanduser()
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another --output.")
    return folder


def bars(o: Options) -> bool:
    """Whether progress bars are shown."""
    return o.progress and sys.stderr.isatty()


def judge_terms(o: Options) -> Terms | None:
    """Return whom to ask and how, or None where no judge was named."""
    if getattr(o, "judge", None) is None:
        if getattr(o, "judge_model", None) is not None or getattr(o, "judge_set", None):
            raise UniLIPError(
                "--judge-model (and --judge-set) needs --judge: its address, such as http://127.0.0.1:8000/v1."
            )
        return None
    from unilip.eval.vlm import Terms

    given: dict[str, Any] = {}
    for text in o.judge_set:
        name, _, value = text.partition("=")
        if name not in JUDGE or not value:
            raise UniLIPError(f"--judge-set {text} is not understood; give NAME=VALUE, with one of {', '.join(JUDGE)}.")
        try:
            given[name] = JUDGE[name][0](value)
        except argparse.ArgumentTypeError as error:
            raise UniLIPError(f"--judge-set {name}: {error}.") from error
    return Terms(o.judge or "", o.judge_model or "", **given)


def tell_scores(o: Options, report: Report, summaries: Sequence[Mapping[str, Any]], output: Path, **more: Any) -> int:
    """Print scores, each under its protocol and scorer; returns 1 where an item is without one."""
    from unilip.eval.scores import column, tell

    left = 0
    for summary in summaries:
        for line in tell(summary):
            report.line(line)
        left += sum(n for status, n in summary["statuses"].items() if status != "ok")
    told = [{"column": column(summary), **summary} for summary in summaries]
    report.end(f"results in {output}", output=str(output), scores=told, open=left, **more)
    if left:
        say(f"{plural(left, 'item')} could not be scored; run the command again to ask for these alone.")
    return 1 if left else 0


def eval_benchmark(name: str, o: Options) -> int:
    """Make a benchmark's pictures, and score them where a scorer is named."""
    report = Report(o, f"eval {name}")
    output = output_of(o, name)
    terms = judge_terms(o)
    from unilip.eval.benchmarks import open_benchmark

    source = {"name": name, **pick(o, "prompts", "own_prompts")}
    source |= {key: getattr(o, key, None) for key in ("protocol", "sources")}  # only some verbs have them
    benchmark = open_benchmark(**source).first(o.count)
    from unilip.eval.rubrics import read_rubric

    has_rubric = "--rubric" in VERBS[f"eval {name}"].options
    rubric = read_rubric(name, benchmark.protocol, o.rubric if has_rubric else None)
    from unilip.machine import Place

    place = Place.of_environment()
    made: dict[str, Any] = {}
    if o.drawing:
        made = draw(o, benchmark, source, output)
        if place.rank == 0:
            done, there = made["made"], made["there"]
            say(f"{plural(done, 'file')} made, {there} there before, {made['missing']} missing, in {output}")
    else:
        from unilip.eval.scoring import check_complete

        check_complete(benchmark, output)
    counts = {key: made[key] for key in ("made", "there", "missing") if key in made}
    scorers = [getattr(o, "official", None), getattr(o, "judge", None)]
    if place.rank or not any(scorers):
        if not place.rank:
            report.line(str(output))
            report.end("", output=str(output), scores=[], **counts)
        return 0
    if o.drawing and place.world > 1:
        wait_for_others(benchmark, output)
    return tell_scores(o, report, list(score(o, benchmark, output, rubric, terms)), output, **counts)


def draw(o: Options, benchmark: Any, source: dict[str, Any], output: Path) -> dict[str, Any]:
    """Make what is missing of a benchmark's pictures, in this process or by Ray."""
    from unilip.eval.generation import Settings, generate, generate_with_ray

    device = choose_device(o.device)
    given = pick(o, "steps", "guidance_scale", "image_size", "seed", "dtype")
    settings = Settings.resolve(o.model, fit=getattr(o, "fit", None), **given)
    given = {"output": output, "source": o.model, "settings": settings, "batch_size": o.batch_size}
    if o.ray is None:
        return generate(benchmark, device=device, progress=bars(o), **given)
    if "WORLD_SIZE" in os.environ:
        raise UniLIPError("--ray starts its own workers; do not start it with torchrun as well.")
    gpus = 1.0 if device.startswith("cuda") else 0.0
    return generate_with_ray(o.ray, gpus, benchmark=source, count=o.count, device=device, **given)


def wait_for_others(benchmark: Any, output: Path) -> None:
    """Return once the other processes of this run have made their pictures."""
    import time

    from unilip.eval.generation import finish, missing

    while left := missing(benchmark, output):
        say(f"waiting for {plural(len(left), 'file')} of other processes")
        time.sleep(5)
    finish(benchmark, output)


def score(o: Options, benchmark: Any, output: Path, rubric: Any, terms: Terms | None) -> Any:
    """Yield the summary of every scorer that the options name."""
    from unilip.eval import scoring

    if getattr(o, "official", None) is not None:
        given: dict[str, Any] = {"python": o.official_python, "arguments": o.official_args, "terms": terms}
        yield scoring.score_officially(benchmark, output, o.official or "", prompts=o.prompts or "", **given)
    elif terms is not None:
        yield scoring.score_by_judge(benchmark, output, terms, rubric=rubric, progress=bars(o))


def eval_recon(o: Options) -> int:
    """Measure how much of pictures survives the tokenizer."""
    report = Report(o, "eval recon")
    output = output_of(o, "recon")
    device = choose_device(o.device)
    from unilip.eval import recon
    from unilip.eval.pictures import open_pictures

    pictures = open_pictures(o.words[0], o.count)
    given = pick(o, "features", "batch_size", "dtype") | {"device": device, "progress": bars(o)}
    summary = recon.evaluate(
        pictures, output, o.model, protocol=o.protocol or "256", measures=names_of(o.measures) or (), **given
    )
    return 0 if summary is None else tell_scores(o, report, [summary], output)


def eval_understand(o: Options) -> int:
    """Ask the questions of a file about pictures."""
    report = Report(o, "eval understand")
    output = output_of(o, "understand")
    device = choose_device(o.device)
    from unilip.eval import understand

    sheet = understand.open_questions(o.words[0], o.images)
    given = pick(o, "count", "max_tiles", "max_new_tokens", "batch_size", "dtype")
    name = Path(o.words[0]).stem
    summaries = understand.evaluate(sheet, output, o.model, name=name, device=device, progress=bars(o), **given)
    if summaries is None:
        return 0
    report.line(str(output / "answers.jsonl"))
    return tell_scores(o, report, summaries, output)


def eval_compare(o: Options) -> int:
    """Put runs side by side."""
    report = Report(o, "eval compare")
    output = output_of(o, "compare")
    from unilip.eval.compare import compare, to_markdown

    found = compare(o.words, output, o.pictures)
    report.line(to_markdown(found["tables"], found["pictures"]))
    report.end(f"comparison in {output}", output=str(output), tables=found["tables"])
    return 0


MODEL = ("--batch-size", *LOADING, *TELLING)
RUN = ("--output", *MODEL)
RUN_CHANGES: dict[str, dict[str, Any]] = {
    "--output": dict(metavar="DIR", help="the run's folder; a rerun goes on where one stopped (eval-NAME)"),
    "--batch-size": dict(default=8, help="how many at once: speed and memory (8)"),
    "--count": dict(help="only the first N, in the file's order (all)"),
    "--size": dict(
        type=pixels, dest="image_size", metavar="PX", help="side of the squares, a multiple of 28 (the model's own)"
    ),
}
DRAWN = (
    "--prompts", "--own-prompts", "--count", "--steps", "--guidance-scale", "--size", "--seed", "--no-generate",
    "--ray",
)  # fmt: skip
JUDGED = ("--judge", "--judge-model", "--judge-set")
RUBRIC = (*JUDGED, "--rubric")
OFFICIAL = ("--official", "--official-python", "--official-args")
# The name of a benchmark -> what it is, what its prompts are, more words of an example, options of its own.
BENCHMARKS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "geneval": (
        "GenEval: 553 prompts, four pictures each. Scored by its authors' program, or by a judge.", "FILE",
        "evaluation_metadata.jsonl --official geneval", (*OFFICIAL, *JUDGED),
    ),
    "geneval2": (
        "GenEval 2: 800 prompts, a picture each. Scored by its authors' program.", "FILE",
        "geneval2_data.jsonl --official GenEval2", OFFICIAL,
    ),
    "dpg": (
        "DPG-Bench: 1065 long prompts, four pictures tiled in a file. Scored by its authors' program.", "DIR",
        "ELLA/dpg_bench/prompts --official ELLA", OFFICIAL,
    ),
    "wise": (
        "WISE: 1000 prompts that need knowledge. Scored by a judge, in two protocols.", "PATH",
        "WISE/data_verified --judge http://127.0.0.1:8000/v1 --judge-model Qwen3.5-35B-A3B --rubric WISE",
        ("--protocol", *OFFICIAL, *RUBRIC),
    ),
    "imgedit": (
        "ImgEdit: 737 single-turn edits. Scored by a judge from 1 to 5.", "FILE",
        "basic_edit.json --sources singleturn --judge https://api.openai.com/v1 --judge-model gpt-4o --rubric ImgEdit",
        ("--sources", "--fit", *RUBRIC),
    ),
    "gedit": (
        "GEdit-Bench: 1212 edits in English and Chinese. Scored by a judge from 0 to 10.", "PATH",
        "GEdit-Bench --judge https://api.openai.com/v1 --judge-model gpt-4.1", ("--fit", *RUBRIC),
    ),
}  # fmt: skip


def _benchmark_verb(name: str) -> Verb:
    title, kind, example, own = BENCHMARKS[name]
    changes = {
        **RUN_CHANGES,
        "--prompts": dict(metavar=kind, help="the published prompts, on this machine; none are in this package"),
        "--protocol": dict(
            help="verified (0 or 1 each) or legacy (GPT-4o, three scores), prompts of its own (verified)"
        ),
        "--seed": dict(help="of the run; a picture's own follows from it and its key, whatever the batch (0)"),
    }
    example = f"unilip eval {name} --prompts {example}"
    options = (*DRAWN, *own, *RUN)
    return Verb(partial(eval_benchmark, name), f"[OPTIONS] --prompts {kind}", title, example, options, changes=changes)


VERBS: dict[str, Verb] = {
    "eval recon": Verb(
        eval_recon,
        "[OPTIONS] IMAGES",
        "Measure how much of pictures survives the tokenizer. IMAGES: a folder, .tar or .parquet files, a dataset.",
        "unilip eval recon imagenet/val --model kanashi6/UniLIP-1B --protocol 256 --measures psnr,ssim,ssim_paper,rfid "
        "--features inception-2015-12-05.pt --device cuda --batch-size 64",
        ("--protocol", "--measures", "--features", "--count", *RUN),
        (1, 1),
        {
            **RUN_CHANGES,
            "--protocol": dict(choices=("224", "256", "448", "native"), help="side; 256 is padded to 280 (256)"),
        },
    ),
    **{f"eval {name}": _benchmark_verb(name) for name in BENCHMARKS},
    "eval understand": Verb(
        eval_understand,
        "[OPTIONS] QUESTIONS",
        "Ask questions about pictures. QUESTIONS is a .jsonl of question, image and, if known, answer.",
        "unilip eval understand questions.jsonl --model kanashi6/UniLIP-1B --max-tiles 12 --device cuda",
        ("--images", "--count", "--max-tiles", "--max-new-tokens", *RUN),
        (1, 1),
        {**RUN_CHANGES, "--max-new-tokens": dict(default=16, help="longest answer (16)")},
    ),
    "eval compare": Verb(
        eval_compare,
        "[OPTIONS] RUN [RUN ...]",
        "Put runs side by side. Tables with intervals, differences to the first run, and pictures of the same prompts.",
        "unilip eval compare eval-wise-a eval-wise-b --output comparison",
        ("--output", "--pictures", *TELLING),
        (1, math.inf),
        {"--output": dict(metavar="DIR", help="folder of the comparison (eval-compare)")},
    ),
    "eval emoji": Verb(
        eval_emoji,
        "[OPTIONS]",
        "Measure a model in the emoji world. The items are held out; no network judges.",
        "unilip eval emoji --model runs/pico/sft/final --output results",
        ("--output", "--count", "--seeds", "--parts", "--world", "--steps", "--guidance-scale", "--preset", *MODEL),
        changes={
            "--output": dict(metavar="DIR", help="folder of the results; a rerun goes on where one stopped (results)"),
            "--batch-size": dict(default=None, help="how many at once: speed and memory, not results (24)"),
        },
    ),
    "eval claims": Verb(
        eval_claims,
        "[OPTIONS] RUNS",
        "Test the paper's claims on the ablations in RUNS. Question, verdict and number of each.",
        "unilip eval claims runs --output claims\nunilip eval claims runs --world pico --parts tokenizer",
        ("--output", "--parts", "--world", "--count", "--seeds", "--batch-size", "--device", "--dtype", *TELLING),
        (1, 1),
        {
            "--output": dict(metavar="DIR", help="folder of the evidence; a rerun goes on (eval-claims)"),
            "--parts": dict(help="of tokenizer,generation, with commas between (both)"),
            "--world": dict(help="the size whose ablations are meant: tiny, pico or nano (all that there are)"),
            "--seeds": dict(help="pictures of each prompt (2)"),
            "--batch-size": dict(default=None, help="how many at once: speed and memory, not results (24)"),
        },
    ),
}
