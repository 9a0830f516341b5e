"""The paper's claims, tested on the ablations that have been trained: question, verdict, number.

In: a folder of runs with runs/ablation/SIZE/VARIANT/seedN/final. Out, in a folder: what was measured of each run,
results.json and results.md. A comparison is paired over the same held-out items, its error the spread of items and of
seeds; a difference within two standard errors decides nothing.
"""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from unilip.checkpoints.read import open_checkpoint
from unilip.emoji import score as emoji
from unilip.emoji.art import Atlas
from unilip.emoji.captions import canonical
from unilip.emoji.dataset import Edits, Scenes
from unilip.emoji.world import World
from unilip.errors import UniLIPError, check_choice
from unilip.files import read_json, read_table, write_json, write_text
from unilip.method.flow import logit_normal
from unilip.model import UniLIP
from unilip.pictures import to_pixels
from unilip.sampling import draw_noise

log = logging.getLogger(__name__)

PARTS = ("tokenizer", "generation")
COUNT, SEEDS = 12, 2  # prompts of each group, pictures of each prompt
NOISES = 4  # of each held-out sample of the flow loss
ORIGINAL = "original"  # stands for the encoder that no tokenizer training has touched

TABLES: dict[str, Any] = read_table("unilip.eval", "claims.json")
# The recipes whose results are the original encoder and the language model that learned to read it, by size.
ORIGINALS: dict[str, tuple[str, str]] = {size: (encoder, llm) for size, (encoder, llm) in TABLES["originals"].items()}
MEASURES: dict[str, str] = TABLES["measures"]
SHARES = ("answers", "generation", "edits", "riddles")  # of right ones, 0 to 1
LOWER = ("feature_distance", "flow", "flow_edit")  # better when they are less
SWEEPS = {"num_queries": "number of queries", "connector_layers": "layers of the connector"}


@dataclass(frozen=True)
class Statement:
    """That variant `a` is better than `b` in a measure by more than `by` (below 0: not worse by more than that)."""

    words: str
    a: str
    b: str
    measure: str
    by: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: the variants it is about, and the statements that must all hold."""

    name: str
    words: str
    variants: tuple[str, ...]
    statements: tuple[Statement, ...]


def read_claim(name: str, words: str, better: str, statements: Sequence[Sequence[Any]]) -> Claim:
    """Return the claim that variant `better` is better than others, of rows (words, the other, measure, limit)."""
    others = dict.fromkeys(row[1] for row in statements if row[1] != ORIGINAL)
    return Claim(name, words, (*others, better), tuple(Statement(said, better, *rest) for said, *rest in statements))


CLAIMS = tuple(read_claim(**record) for record in TABLES["claims"])


@dataclass
class Run:
    """A finished ablation: its recipe, and what was measured: measure -> item -> value."""

    variant: str
    seed: int
    folder: Path
    recipe: dict[str, Any]
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_tokenizer(self) -> bool:
        return "objective.pixel" in self.recipe  # it learned to reconstruct

    @property
    def samples(self) -> int:
        return int(self.recipe["steps"] * self.recipe["batch_size"] * self.recipe["accumulate"])


def find_runs(runs: Path, size: str) -> dict[str, list[Run]]:
    """Return a size's finished ablations by variant, in order of seeds. Raises UniLIPError: one has no recipe."""
    found: dict[str, list[Run]] = defaultdict(list)
    for final in sorted(runs.glob(f"ablation/{size}/*/seed*/final")):
        recipe = read_json(final / "recipe.json", "recipe of the run")
        found[final.parents[1].name].append(Run(final.parents[1].name, int(recipe["seed"]), final, recipe))
    return {name: sorted(several, key=lambda run: run.seed) for name, several in found.items()}


def budget(run: Run, runs: Mapping[str, Sequence[Run]]) -> int:
    """Return the training samples of a run, with those of the tokenizer's first stage where it is the second."""
    prefix = f"ablation/{run.folder.parents[2].name}/"
    sources = {text.partition("=")[2] for text in run.recipe["init"] if run.is_tokenizer}
    stages = [source.removeprefix(prefix).partition("/")[0] for source in sources if source.startswith(prefix)]
    return run.samples + sum(r.samples for name in stages for r in runs.get(name, ()) if r.seed == run.seed)


def wanted() -> list[str]:
    """Return the names of every variant that a claim is about."""
    return list(dict.fromkeys(name for claim in CLAIMS for name in claim.variants))


@dataclass
class Lab:
    """The held-out items of a size's world, and the measures on them."""

    size: str
    count: int
    seeds: int
    device: str
    dtype: str | None
    batch_size: int
    progress: bool = False

    def __post_init__(self) -> None:
        self.world = World.preset(self.size)
        self.atlas = Atlas.synthetic(self.world) if self.size == "tiny" else Atlas.load()

    def load(self, folder: str | os.PathLike[str], parts: Sequence[str] | None = None) -> UniLIP:
        return UniLIP.from_pretrained(folder, parts=parts, device=self.device, dtype=self.dtype)

    def judge(self, model: UniLIP, place: Path, parts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Judge parts of `unilip eval emoji`: measure -> item -> value. A folder is of these weights alone."""
        folder = place / f"emoji-{emoji.fingerprint(model)}"
        emoji.evaluate(
            model, folder, self.world, self.atlas, parts=parts, count=self.count, seeds=self.seeds,
            batch_size=self.batch_size, progress=self.progress,
        )  # fmt: skip
        return judged(folder)

    def once(self, file: Path, measure: Callable[..., dict[str, Any]], **models: UniLIP) -> dict[str, Any]:
        """Return what was measured before of models with the same weights in the same way, or measure it."""
        about = {name: emoji.fingerprint(model) for name, model in models.items()} | {
            "count": self.count, "atlas": self.atlas.fingerprint, "data_seed": emoji.DATA_SEED, "noises": NOISES,
            "dtype": str(self.dtype),
        }  # fmt: skip
        record = read_json(file, "measurement") if file.is_file() else {}
        if record.get("about") != about:
            if record:
                log.info("%s was measured of other weights or in another way; measuring again", file)
            record = {"about": about, "values": measure(*models.values())}
            write_json(file, record)
        return dict(record["values"])

    @torch.no_grad()
    def distance(self, model: UniLIP, original: UniLIP) -> dict[str, dict[str, float]]:
        """Return 1 less the cosine of two encoders' features of held-out scenes, mean over the tokens."""
        data = Scenes(self.world, self.atlas, "val", emoji.DATA_SEED, emoji.CHEAP * self.count, "tokenizer")
        found: dict[str, float] = {}
        for i in range(len(data)):
            pixels = to_pixels([Image.fromarray(data[i]["image"])])
            ours, theirs = (one.features(pixels) for one in (model, original))
            found[f"{i:04d}"] = emoji.measure_features(ours, theirs)
        return {"feature_distance": found}

    @torch.no_grad()
    def flow_loss(self, model: UniLIP) -> dict[str, dict[str, float]]:
        """Return the flow loss of held-out captions and edits, item by item, each with NOISES noises of its own."""
        size, processor = emoji.CHEAP * self.count, model.processor
        assert processor is not None, "a model that generates has a tokenizer"
        scenes = Scenes(self.world, self.atlas, "val", emoji.DATA_SEED, size, "generation")
        edits = Edits(self.world, self.atlas, "val", emoji.DATA_SEED, size)

        def pixels(picture: np.ndarray) -> Tensor:
            return to_pixels([Image.fromarray(picture)] * NOISES).to(model.device, model.dtype)

        def loss(name: str, i: int, text: Any, target: np.ndarray, source: Tensor | None = None) -> float:
            generator = emoji.noise_generator(name, i)
            tokens, targets = processor.tokenize([text] * NOISES).to(model.device), pixels(target)
            shape = model.to_latent(model.features(targets)).shape[1:]
            noise = draw_noise(NOISES, tuple(shape), [generator] * NOISES).to(targets)
            return float(model.flow_loss(tokens, targets, noise, logit_normal(NOISES, generator).to(noise), source))

        found: dict[str, dict[str, float]] = {"flow": {}, "flow_edit": {}}
        for i in tqdm(range(size), desc="flow loss", unit="item", disable=not self.progress):
            scene, task, _ = scenes.draw(i)
            text = processor.generate_text(canonical(scene, task, self.world))
            found["flow"][f"{i:04d}"] = loss("flow", i, text, scenes[i]["image"])
            edit = edits[i]
            text = processor.edit_text(edit["instruction"])
            found["flow_edit"][f"{i:04d}"] = loss("flow_edit", i, text, edit["target"], pixels(edit["source"]))
        return found


def measure_tokenizers(lab: Lab, runs: Path, found: Mapping[str, Sequence[Run]], output: Path) -> dict[str, Any] | None:
    """Measure every trained tokenizer; returns the original encoder's answers. Raises UniLIPError: no such encoder."""
    todo = [run for several in found.values() for run in several if run.is_tokenizer and run.variant in wanted()]
    if not todo:
        return None
    encoder, reader = (runs / name / "final" for name in ORIGINALS[lab.size])
    for folder, name in zip((encoder, reader), ORIGINALS[lab.size], strict=True):
        if not folder.is_dir():
            raise UniLIPError(f"There is no {folder}, which the ablations are compared with; unilip train {name}.")
    original, llm = lab.load(encoder, ("encoder",)), lab.load(reader, ("encoder", "mllm"))
    for run in todo:
        place = output / lab.size / run.variant / f"seed{run.seed}"
        model = lab.load(run.folder, ("encoder", "latent_head", "pixel_decoder"))
        run.values |= lab.once(place / "features.json", lab.distance, model=model, original=original)
        run.values |= lab.judge(joined(model, llm), place, ("recon", "vqa"))
    return lab.judge(joined(original, llm), output / lab.size / ORIGINAL, ("vqa",))


def joined(model: UniLIP, llm: UniLIP) -> UniLIP:
    """Return a model's tokenizer with the language model of another."""
    whole = UniLIP(model.config.replace(text=llm.config.text), llm.processor, parts=())
    whole.parts = (*model.parts, "mllm")
    for name in whole.parts:
        whole.add_module(name, getattr(llm if name == "mllm" else model, name))
    return whole


def measure_generators(lab: Lab, found: Mapping[str, Sequence[Run]], output: Path) -> None:
    """Judge every trained generator's pictures, edits and riddles, and measure its held-out flow loss."""
    for run in (run for several in found.values() for run in several if not run.is_tokenizer):
        place = output / lab.size / run.variant / f"seed{run.seed}"
        model = lab.load(run.folder)
        run.values |= lab.judge(model, place, ("gen", "edit", "riddle"))
        if run.recipe["objective.target"] == "unilip":  # a loss in other latents says nothing beside the rest
            run.values |= lab.once(place / "flow.json", lab.flow_loss, model=model)


def judged(folder: Path) -> dict[str, dict[str, float]]:
    """Read the judged items of a folder of `unilip eval emoji`: measure -> prompt -> mean over its pictures."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = {"vqa": "answers", "gen": "generation", "edit": "edits", "riddle": "riddles"}
    for record in emoji.read_counted(folder)[1]:
        part, prompt = record["part"], f"{record['group']}/{record['index']:04d}"
        values = {names[part]: float(record["ok"])} if part in names else {}
        values |= {key: record[key] for key in ("psnr", "ssim", "psnr_outside") if record.get(key) is not None}
        for name, value in values.items():
            found[name][prompt].append(value)
    return {name: {key: float(np.mean(v)) for key, v in values.items()} for name, values in found.items()}


def score(runs: Sequence[Run], measure: str) -> dict[str, Any] | None:
    """Return mean over items and seeds, spread over seeds and error of the item mean (None of one); None: no values."""
    means = [list(run.values[measure].values()) for run in runs if run.values.get(measure)]
    if not means:
        return None
    by_seed = [float(np.mean(values)) for values in means]
    spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    errors = [float(np.std(v, ddof=1)) / math.sqrt(len(v)) for v in means if len(v) > 1]
    error = float(np.mean(errors)) if errors else None
    return {"mean": float(np.mean(by_seed)), "spread": spread, "error": error, "seeds": len(by_seed)}


def difference(a: Sequence[Run], b: Sequence[Run], measure: str) -> tuple[float, float] | None:
    """Return by how much variant A is better than B, and the standard error: over common items, and over seeds."""
    ours, theirs = ([run.values[measure] for run in runs if run.values.get(measure)] for runs in (a, b))
    if not ours or not theirs:
        return None
    keys = sorted(set.intersection(*(set(values) for values in (*ours, *theirs))))
    if len(keys) < 2:  # one item says nothing about the rest
        return None
    table = [np.array([[values[key] for key in keys] for values in side]) for side in (ours, theirs)]  # seeds, items
    gap = table[0].mean(0) - table[1].mean(0)
    variance = float(gap.var(ddof=1)) / len(keys)
    variance += sum(float(side.mean(1).var(ddof=1)) / len(side) for side in table if len(side) > 1)
    sign = -1 if measure in LOWER else 1
    return sign * float(gap.mean()), math.sqrt(variance)


def check(statement: Statement, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return a statement's verdict, yes, no or undecided, with the numbers; "missing" where a run is."""
    found = difference(runs.get(statement.a, ()), runs.get(statement.b, ()), statement.measure)
    if found is None:
        return vars(statement) | {"verdict": "missing"}
    gap, error = found
    other = score(runs.get(statement.b, ()), statement.measure)
    # where B has so little right, A could not be worse than it by more than is allowed
    floor = other is not None and statement.measure in SHARES and statement.by < 0 and other["mean"] <= -statement.by
    decided = abs(gap - statement.by) > 2 * error and not floor
    verdict = "undecided" if not decided else "yes" if gap > statement.by else "no"
    return vars(statement) | {"difference": round(gap, 5), "error": round(error, 5), "verdict": verdict}


def conclude(claim: Claim, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return a claim's verdict: reproduced, not, undecided within the spread, or not measured; and if of one seed."""
    statements = [check(statement, runs) for statement in claim.statements]
    verdicts = {s["verdict"] for s in statements}
    budgets = {name: [budget(run, runs) for run in runs[name]] for name in claim.variants if name in runs}
    seeds = min((len(runs[name]) for name in budgets), default=0)
    if "missing" in verdicts:
        verdict = "not measured"
    elif len({samples for several in budgets.values() for samples in several}) > 1:
        verdict = "not comparable: the budgets differ"
    elif verdicts == {"yes"}:
        verdict = "reproduced"
    else:
        verdict = "not reproduced" if "no" in verdicts else "undecided within the spread"
    if seeds == 1 and verdict != "not measured":
        verdict += ", in one training run"
    return {
        "claim": claim.name, "words": claim.words, "verdict": verdict, "seeds": seeds, "budgets": budgets,
        "statements": statements, "variants": list(claim.variants),
    }  # fmt: skip


def evaluate(
    runs: Path | str,
    output: Path | str,
    size: str | None = None,
    *,
    parts: Sequence[str] | None = None,
    count: int = COUNT,
    seeds: int = SEEDS,
    device: str = "cpu",
    dtype: str | None = None,
    batch_size: int = 24,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the ablations in RUNS and write the evidence to OUTPUT; returns what results.json holds.

    In: size: of ORIGINALS; by default all that have a finished ablation. parts: of PARTS; all by default. count:
    prompts of each group; reconstructions and questions emoji.CHEAP times as many. seeds: pictures of each prompt.
    Raises UniLIPError: an unknown part or size, no ablation, or the original encoder is missing.
    """
    runs, output = Path(runs).expanduser(), Path(output)
    if count < 1 or seeds < 1:
        raise UniLIPError(f"count is {count} and seeds is {seeds}; both must be at least 1.")
    chosen = tuple(PARTS if parts is None else parts)
    for part in chosen or ("",):  # none is no choice
        check_choice("part", part, PARTS)
    if size is not None:
        check_choice("size", size, ORIGINALS)
    if not runs.is_dir():
        raise UniLIPError(f"There is no folder {runs}; give the folder of all runs (--runs of unilip train).")
    trained = {name: found for name in ORIGINALS if size in (None, name) and (found := find_runs(runs, name))}
    if not trained:
        raise UniLIPError(
            f"{runs} has no finished ablation{f' of {size}' if size else ''}; "
            f"unilip train ablation/{size or 'pico'}/recon --runs {runs} begins one, unilip train --list names all."
        )
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": device, "dtype": dtype or "float32",
        "count": count, "seeds": seeds, "data_seed": emoji.DATA_SEED, "sizes": {},
    }  # fmt: skip
    for name, found in trained.items():
        lab = Lab(name, count, seeds, device, dtype, batch_size, progress)
        original = measure_tokenizers(lab, runs, found, output) if "tokenizer" in chosen else None
        if "generation" in chosen:
            measure_generators(lab, found, output)
        if original is not None:
            found[ORIGINAL] = [Run(ORIGINAL, 0, runs / ORIGINALS[name][0] / "final", {}, original)]
        untrained = {variant: f"unilip train ablation/{name}/{variant}" for variant in wanted() if variant not in found}
        results["sizes"][name] = summarise(found) | {"missing": untrained}
    write_json(output / "results.json", results)
    write_text(output / "results.md", make_page(results))
    return results


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return scores, budgets and verdicts of a size's runs."""
    variants: dict[str, Any] = {}
    for name, several in runs.items():
        variants[name] = {m: found for m in MEASURES if (found := score(several, m)) is not None}
        if name != ORIGINAL:
            opened = open_checkpoint(several[0].folder)
            variants[name] |= {
                "seeds": [run.seed for run in several],
                "samples": budget(several[0], runs),
                "parameters": sum(math.prod(opened.shape(key)) for key in opened.names),
                **{key: getattr(opened.config, key) for key in SWEEPS},
            }
    return {"variants": variants, "claims": [conclude(claim, runs) for claim in CLAIMS]}


def make_page(results: Mapping[str, Any]) -> str:
    """Return verdicts, statements and scores as Markdown."""
    lines = [
        "# The paper's claims, tested by ablation", "",
        f"{results['count']} prompts a group, {results['seeds']} pictures a prompt, {results['dtype']} on "
        f"{results['device']}, {results['date']}. A number after ± is the standard error of a paired difference, or "
        "of a score the standard deviation over training seeds (over items, where there is one seed only).", "",
    ]  # fmt: skip
    for size, found in results["sizes"].items():
        lines += [f"## {size}", "", "| question | verdict | number |", "|---|---|---|"]
        for claim in found["claims"]:
            numbers = "; ".join(map(tell, claim["statements"]))
            lines.append(f"| {claim['claim']}. {claim['words']} | {claim['verdict']} | {numbers} |")
        measures = [m for m in MEASURES if any(m in row for row in found["variants"].values())]
        head = ["variant", *(MEASURES[m] for m in measures), "samples in all", "M parameters", "seeds"]
        lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for name, row in found["variants"].items():
            cells = [name, *(cell(m, row.get(m)) for m in measures)]
            if name != ORIGINAL:
                cells += [f"{row['samples']:,}", f"{row['parameters'] / 1e6:.1f}", str(len(row["seeds"]))]
            lines.append(f"| {' | '.join(cells)} |")
        if found["missing"]:
            lines += ["", "Not trained yet:", "", "```bash", *found["missing"].values(), "```"]
        lines.append("")
    return "\n".join(lines)


def tell(statement: Mapping[str, Any]) -> str:
    """Write a statement with its number and whether it holds."""
    if "difference" not in statement:
        return f"{statement['words']}: not measured"
    gap, error = (number(statement["measure"], statement[key]) for key in ("difference", "error"))
    return f"{statement['words']}: {gap} ± {error} ({statement['verdict']})"


def cell(measure: str, found: Mapping[str, Any] | None) -> str:
    """Write a score with its spread over seeds, or its error over items."""
    if found is None:
        return ""
    error = found["error"] if found["spread"] is None else found["spread"]
    return number(measure, found["mean"]) + ("" if error is None else f" ± {number(measure, error)}")


def number(measure: str, value: float) -> str:
    """Write a value of a measure; shares as percent."""
    if measure in SHARES:
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if measure.startswith("psnr") else f"{value:.4f}"
