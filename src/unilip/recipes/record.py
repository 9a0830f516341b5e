"""A training run's configuration: one complete, typed record; stages differ in their values, not in code.

A `Recipe` says what trains (parameter-name prefixes with learning-rate factors), the objective with its loss weights,
the data, the optimiser and what is written when. `override` changes single fields, by "dotted.name=value".
"""

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from unilip.errors import ConfigError
from unilip.files import read_json, read_table
from unilip.method.config import TOKEN_PIXELS
from unilip.shapes import Size, nearest, parse

FREE_TO_CHANGE = (
    "log_every", "sample_every", "save_every", "keep", "note", "data.workers", "parallel", "reduce_dtype", "skip_limit",
    "compile", "checks",
)  # fmt: skip
CHECK = r"(\w+) (>=|<=) (\d+\.?\d*|\.\d+)(?: @ (\d+))?"  # "local_concept >= 0.9 @ 500"
RESTARTED = ".restarted"  # lies in a run until it has a new result; the old one stays as long
# What a field may be, by the name of its record; and what is said where fields contradict each other.
RULES: dict[str, Any] = read_table("unilip.recipes", "rules.json")


def _check(record: object, where: str, **wrong: object) -> None:
    """Refuse values that the rules do not allow, NaN and infinity too, and the first of WRONG that holds."""
    for rule in (rule for kind in type(record).__mro__ for rule in RULES.get(kind.__name__, ())):
        for name in rule["of"]:
            value = getattr(record, name)
            if "allowed" in rule and value not in rule["allowed"]:
                raise ConfigError(f"{where}{name} is {value!r}; allowed: {rule['says']}.")
            if "allowed" not in rule and not (
                rule.get("least", 0) <= value < rule.get("below", math.inf)
                and rule.get("above", -1) < value <= rule.get("most", math.inf)
            ):
                raise ConfigError(f"{where}{name} is {value}; it must be {rule['says']}.")
    for name, found in wrong.items():
        if found:
            kind = type(getattr(record, "objective", record)).__name__.lower()
            raise ConfigError(RULES["words"][name].format(record, kind=kind, found=found))


@dataclass(frozen=True)
class Optim:
    """AdamW: `warmup` (a fraction of the steps, linear), cosine to `final` (of `lr`); `grad_clip` bounds the norm."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4
    warmup: float = 0.03
    final: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "optim.")


@dataclass(frozen=True)
class Understand:
    """Stage 0: weights of image-text contrast, prediction of captions' words, next token of answers, and lessons."""

    contrastive: float = 1.0
    words: float = 1.0
    next_token: float = 0.0
    # lessons, which rest where the data are files:
    local: float = 0.0  # each image token tells concept and colour of what lies on it, its place, and the background
    # hidden states of prompts, read without a picture, tell concept, colour, count and place at the words that say
    # them, the whole at the end
    bind: float = 0.0
    # on which image tokens that lies which words of questions name, and which words image tokens say halfway through
    # the language model
    ground: float = 0.0
    turns: int = 4  # the most questions asked about one picture

    def __post_init__(self) -> None:
        weights = (self.contrastive, self.words, self.next_token, self.local, self.bind, self.ground)
        _check(self, "objective.", weights=not any(weights))


@dataclass(frozen=True)
class Reconstruct:
    """Tokenizer stages: L2 in [0,1], perceptual, distillation to the frozen original features, contrast, hinge GAN."""

    pixel: float = 1.0
    perceptual: float = 1.1
    distill: float = 0.0  # to the encoder that the stage starts from, unless `init` names a "teacher"
    anchor: float = 0.0  # holds the latents to those of the stage's start: what has learned to draw them can go on
    contrastive: float = 0.0  # with captions, read by a language model of `init`, instead of distillation (an ablation)
    gan: float = 0.0
    gan_start: int = 0  # the step at which the GAN, and its discriminator's learning rate, begin
    lecam: float = 0.001
    perceptual_source: str = "teacher"
    # share of the pictures that are turned, mirrored and moved, and whose colour channels are exchanged; in the emoji
    # world these, and drawings without a name, are not held
    augment: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "objective.", augment=self.augment and self.contrastive)


@dataclass(frozen=True)
class Shrink(Reconstruct):
    """A pixel decoder of half the widths draws what the "teacher" of `init` does: L2, perceptual, stages' `states`."""

    perceptual: float = 0.1
    states: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "objective.", smaller=self.distill or self.anchor or self.contrastive or self.gan or self.augment)


@dataclass(frozen=True)
class Flow:
    """Generation stages: velocity of the straight path in the latent space `target`.

    "unilip": features of the target picture through the latent head; "dcae": latents of a DC-AE autoencoder, which is
    what a frozen pretrained SANA knows; "separate": as "unilip", by the encoder of another tokenizer that `init` names
    as autoencoder (an ablation).
    """

    noises: int = 1  # noisy copies that share one condition
    drop_prompt: float = 0.1  # share of the prompts that are the unconditional one
    redraw: float = 0.0  # share of the edited pictures that its tokenizer draws first: it learns to edit what it drew
    target: str = "unilip"
    # what the connector's output is to tell, through noise: what words say, and at each query what lies on its latent
    # token; it rests with files
    bind: float = 0.0
    lesson_steps: int = 0  # at first, in which nothing else is learned
    repa: float = 0.0  # how much the transformer's middle resembles the encoder's features of the clean target
    repa_until: float = 0.4  # share of the run

    def __post_init__(self) -> None:
        lessons = self.lesson_steps and not self.bind
        other = self.target != "unilip"
        _check(self, "objective.", lesson_steps=lessons, repa=self.repa and other, redraw=self.redraw and other)


@dataclass(frozen=True)
class FewSteps(Flow):
    """Few-step stages (RCGM, arXiv 2512.05150): jumps of any length to where the teacher's guided velocity leads.

    The teacher is the diffusion transformer that the run starts from, or that of the "teacher" of `init`. A jump is
    compared with a short step along that velocity and jumps of the averaged weights; or, with `path` above 0, with
    where so many steps of the teacher lead.
    """

    noises: int = 3
    drop_prompt: float = 0.0
    guidance: float = 4.5  # of the teacher
    edit_guidance: float = 4.5
    stride: float = 0.01  # of the short step
    rollouts: int = 2  # jumps of the averaged weights
    path: int = 0
    steps: str = "4,2,1"  # numbers of jumps that the model is to draw in, its own first

    def __post_init__(self) -> None:
        others = self.bind or self.lesson_steps or self.repa or self.drop_prompt or self.target != "unilip"
        counts = re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", self.steps)
        jumps = not counts or len(set(self.counts)) < len(self.counts)
        uneven = not jumps and any(self.path % count for count in self.counts)
        _check(self, "objective.", few=others, jumps=jumps, uneven=uneven)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(int(count) for count in self.steps.split(","))


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in place of the weights that `trains` names: off at rank 0."""

    rank: int = 0
    alpha: float = 0.0  # the update is scaled by alpha / rank; 0: twice the rank
    dora: bool = False
    targets: str = ""  # linear layers by the last words of their names, with commas; empty: all that `trains` reaches

    def __post_init__(self) -> None:
        _check(self, "adapter.", rank=not self.rank and (self.alpha or self.dora or self.targets))


@dataclass(frozen=True)
class Data:
    """Where batches come from: the emoji world by its name, or files: `path` says where, docs/data.md how."""

    source: str = "emoji"
    world: str = "nano"
    path: str = ""
    image_size: int = 0  # in place of the model's own
    fit: str = "auto"  # to a square; auto: the centre of what is drawn, the whole of what is talked about
    shapes: str = ""  # sizes in place of the square, "336x588,448x448" (aspect buckets), one a step
    edit_share: float = 0.0  # of the steps
    edits: str = ""  # kinds of the world's edits, how often each comes: "recolour:3,background" (empty: all alike)
    joint: float = 0.0  # share of the edits' steps in which they take a thing of a second picture
    text_share: float = 0.0  # adds questions without a picture
    max_characters: int = 1000  # texts over this, or over `max_tokens`, are left out
    max_tokens: int = 0  # 0: what the model reads
    max_skipped: float = 0.01  # share of samples that cannot be read, over which the run stops
    window: int = 4  # shards that are shuffled together
    lanes: int = 1  # disjoint sets of shards that fill their own part of every step
    keep_gb: float = 50.0  # bounds remote shards on disk
    cache: str = ""  # made by `unilip data cache`
    workers: int = 0  # processes

    def __post_init__(self) -> None:
        files = self.source == "files"
        _check(
            self, "data.", path=files and not self.path, edits=self.edits and files,
            joint=self.joint and (files or not self.edit_share), cache=self.cache and not files,
            image_size=self.image_size % TOKEN_PIXELS, shapes=self.shapes and (self.cache or self.image_size),
        )  # fmt: skip
        for size in self.sizes:
            if nearest(*size) != size:
                near = "x".join(map(str, nearest(*size)))
                raise ConfigError(f"data.shapes has {size[0]}x{size[1]}; sides are multiples of 28, write {near}.")

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(parse(text) for text in self.shapes.split(",")) if self.shapes else ()


@dataclass(frozen=True)
class Recipe:
    """A whole run. A step is `accumulate` batches of `batch_size`: their product is the global batch."""

    name: str
    model: str
    objective: Understand | Reconstruct | Flow
    # prefixes of parameters' names with factors on the learning rate; the longest decides, what none names is frozen
    trains: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int  # the most that a process holds at once; processes share the global batch
    init: tuple[str, ...] = ()  # where parts start: "part,part=source", a source being a recipe, a path or a hub id
    config: tuple[tuple[str, str | int | bool], ...] = ()  # what differs from the config of the preset and the sources
    per_seed: bool = False  # every seed has a folder, and "{seed}" in a source stands for the seed
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0
    dtype: str = "float32"  # of the arithmetic
    weights_dtype: str = "float32"  # of trained weights and the optimizer's averages
    reduce_dtype: str = "float32"  # of gradients between processes
    parallel: str = "ddp"  # each process has all of the model; "fsdp": a part
    skip_limit: int = 5  # steps in a row that are not finite, and so skipped, after which the run stops
    adapter: Adapter = field(default_factory=Adapter)
    gradient_checkpointing: bool = False  # keeps only what goes into a layer, and computes it again
    selective_checkpointing: bool = False  # keeps matrix products and convolutions as well
    compile: bool = False
    measure_latents: bool = False
    log_every: int = 20
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2
    checks: tuple[str, ...] = ()  # terms whose means stop a run that goes wrong, as in "local_concept >= 0.9 @ 500"
    note: str = ""

    def __post_init__(self) -> None:
        objective, data, own = self.objective, self.data, vars(self.objective)
        flow, few = isinstance(objective, Flow), isinstance(objective, FewSteps)
        reached = {prefix.split(".")[0] for prefix, factor in self.trains if factor > 0}
        _check(
            self, "", name=not re.fullmatch(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*", self.name),
            weights_dtype=self.weights_dtype == "bfloat16" and self.dtype != "bfloat16",
            checks=[check for check in self.checks if not re.fullmatch(CHECK, check)],
            trains=not reached or not all(0 <= factor < math.inf for _, factor in self.trains),
            reached=flow and not reached & {"connector", "dit", "mllm"}, edit_share=data.edit_share and not flow,
            cached_repa=data.cache and own.get("repa"), cached_redraw=data.cache and own.get("redraw"),
            cached_augment=data.cache and own.get("augment"),
            averages=few and (not self.ema or self.weights_dtype != "float32"), few_dit=few and "dit" not in reached,
            decoder=isinstance(objective, Shrink) and reached != {"pixel_decoder"},
            text_share=data.text_share and not (isinstance(objective, Understand) and objective.next_token),
            lanes=self.batch_size * self.accumulate % data.lanes,
            selective=self.selective_checkpointing and (self.gradient_checkpointing or self.compile),
            latents=self.measure_latents and not isinstance(objective, Reconstruct),
            joint_bind=data.joint and own.get("bind"), shapes_bind=data.shapes and self.lessons and own.get("bind"),
            shapes_talk=data.shapes and isinstance(objective, Understand),
            shapes_dcae=data.shapes and own.get("target") == "dcae",
        )  # fmt: skip

    @property
    def folder(self) -> str:
        """Where the run lies in the folder of all runs."""
        return f"{self.name}/seed{self.seed}" if self.per_seed else self.name

    @property
    def lessons(self) -> bool:
        """Whether the data know what their texts and pictures mean, which `bind` and `local` need; else both rest."""
        return self.data.source == "emoji"


def leaves(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return every settable field of a recipe by dotted name."""
    found: dict[str, Any] = {}
    for name, value in vars(record).items():
        found |= leaves(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON-ready values by dotted name."""
    return json.loads(json.dumps(leaves(recipe), allow_nan=False))


def require_same(recipe: Recipe, before: Mapping[str, Any], made: object) -> None:
    """Raise ConfigError where what a run MADE had other settings BEFORE (a new one had its present default)."""
    now, before = plain(recipe), _defaults(recipe) | dict(before)
    names = [name for name in {**now, **before} if name not in FREE_TO_CHANGE and now.get(name) != before.get(name)]
    if changed := ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in names):
        raise ConfigError(f"{made} was made with other settings: {changed}. Restart the run, or use another folder.")


def finished(recipe: Recipe, runs: Path) -> Path | None:
    """Return the folder of a recipe's result; None: there is none yet, or it was restarted since.

    Raises ConfigError: it is the result of other settings; UniLIPError: what says so cannot be read.
    """
    final = runs / recipe.folder / "final"
    if not final.exists() or (final.parent / RESTARTED).exists():
        return None
    if (final / "recipe.json").exists():
        require_same(recipe, read_json(final / "recipe.json", "recipe of the result"), final)
    return final


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """The default of every setting of a recipe that has one, by dotted name."""
    found = {f.name: f.default for f in fields(recipe) if f.default is not MISSING}
    for name in ("objective", "optim", "data", "adapter"):
        found |= leaves(type(getattr(recipe, name))(), f"{name}.")
    return json.loads(json.dumps(found))


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Apply "dotted.name=value" settings, all at once; an unknown name is refused with the nearest valid one.

    Of a `data.path` on this machine, `data.source` and `data.edit_share` follow from what it holds unless they are set.
    """
    names = leaves(recipe)
    changes: dict[str, Any] = {}
    for setting in settings:
        name, sep, text = setting.partition("=")
        if not sep:
            raise ConfigError(f"--set takes NAME=VALUE, not {setting!r}.")
        if name not in names:
            ending = [one for one in names if one.split(".")[-1] == name.split(".")[-1]]  # lr: optim.lr
            near = meant(ending[0] if ending else name, names, cutoff=0.3)
            raise ConfigError(f"{recipe.name} has no setting {name!r}.{near} All of them: {', '.join(names)}.")
        changes[name] = _parse(name, text.strip(), names[name])
    parts: dict[str, dict[str, Any]] = defaultdict(dict)  # "optim": {"lr": 1e-3}; "" is the recipe itself
    for name, value in (_following(recipe, changes) | changes).items():
        part, _, own = name.rpartition(".")
        parts[part][own] = value
    top = parts.pop("", {})
    return replace(recipe, **top, **{part: replace(getattr(recipe, part), **new) for part, new in parts.items()})


def _following(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow from the place that `data.path` names: what it is, and which tasks it has."""
    path, found = changes.get("data.path") or "", dict[str, Any]()
    if changes.get("data.source") == "emoji" or path in ("", "synthetic"):
        return found
    from unilip.data.sources import local_sources

    if (sources := local_sources(path)) is None:
        return found
    found["data.source"] = "files"
    if isinstance(recipe.objective, Flow) and 0 < recipe.data.edit_share < 1:
        edits, captions = (any(sum(one.counts(kind)) for one in sources) for kind in ("edit", "caption"))
        if edits != captions:
            found["data.edit_share"] = float(edits)
    return found


def meant(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Ask whether the name was meant that looks most like what was given; nothing where none is alike enough."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]}?" if near else ""


def _parse(name: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return _number(text)
        if name == "trains":  # encoder:0.1,latent_head
            pairs = [part.partition(":") for part in text.split(",") if part]
            return tuple((prefix.strip(), _number(factor) if sep else 1.0) for prefix, sep, factor in pairs)
        if name == "config":  # condition=queries,num_queries=8
            settings = [[word.strip() for word in part.partition("=")] for part in text.split(",") if part]
            known: dict[str, str | int] = {"true": True, "false": False}
            known |= {value: int(value) for _, _, value in settings if value.isdecimal()}
            return tuple((setting, known.get(value.lower(), value)) for setting, _, value in settings)
        if name == "checks":
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if name == "init":  # encoder,mllm=nano/clip,dit=FOLDER: a source ends where the next parts begin
            return tuple(part.strip(", ") for part in re.findall(r"[^=]*=[^,]*|[^=]+$", text.strip(",")))
        return text
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={text!r} cannot be read as {type(old).__name__}, which {old!r} is.") from error


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number
