"""A training run's configuration: one complete, typed record; stages differ in their values, not in code.

A `Recipe` says what trains (parameter-name prefixes with learning-rate factors), the objective with its loss weights,
the data, the optimiser and what is written when. `override` changes single fields, by "dotted.name=value".
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unilip.errors import ConfigError
from unilip.files import read_table
from unilip.method.config import TOKEN_PIXELS
from unilip.shapes import Size, nearest, parse

FREE_TO_CHANGE = (
    "log_every", "sample_every", "save_every", "keep", "note", "data.workers", "parallel", "reduce_dtype", "skip_limit",
    "compile", "checks",
)  # fmt: skip
CHECK = r"(\w+) (>=|<=) ([\d.]+)(?: @ (\d+))?"  # "local_concept >= 0.9 @ 500"


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
    """Stage 0: image-text contrast, prediction of the caption's words, next token of answers. Weights of the three.

    `local` weighs what each image token is to tell: concept and colour of what lies on it, its place, and the
    background. `bind`: what hidden states of prompts, read without a picture, are to tell: concept, colour, count and
    place at the words that say them, the whole at the end. `ground`: on which image tokens that lies which words of
    questions name, and which words image tokens say halfway through the language model. All three rest where the data
    are files. `turns` is the most questions asked about one picture.
    """

    contrastive: float = 1.0
    words: float = 1.0
    next_token: float = 0.0
    local: float = 0.0
    bind: float = 0.0
    ground: float = 0.0
    turns: int = 4

    def __post_init__(self) -> None:
        weights = (self.contrastive, self.words, self.next_token, self.local, self.bind, self.ground)
        _check(self, "objective.", weights=not any(weights))


@dataclass(frozen=True)
class Reconstruct:
    """Tokenizer stages: L2 in [0,1], perceptual, distillation to the frozen original features, contrast, hinge GAN.

    Contrast with captions, read by a language model that `init` names, can stand in for distillation (an ablation). The
    GAN, and its discriminator's learning rate, begin at step `gan_start`. The original is the encoder that the stage
    starts from, unless `init` names a "teacher". `anchor` holds the latents, too, to those of the stage's start: what
    has learned to draw them can go on. Data augmentation: a share `augment` of the pictures is turned, mirrored and
    moved, and its colour channels are exchanged. In the emoji world these, and drawings without a name, are not held.
    """

    pixel: float = 1.0
    perceptual: float = 1.1
    distill: float = 0.0
    anchor: float = 0.0
    contrastive: float = 0.0
    gan: float = 0.0
    gan_start: int = 0
    lecam: float = 0.001
    perceptual_source: str = "teacher"
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
    """Generation stages: `noises` noisy copies share one condition; `target` is the latent space that is learned.

    "unilip": features of the target picture through the latent head; "dcae": latents of a DC-AE autoencoder, which is
    what a frozen pretrained SANA knows; "separate": as "unilip", by the encoder of another tokenizer that `init` names
    as autoencoder (an ablation). A share `drop_prompt` of the prompts is the unconditional one. `bind` weighs what the
    connector's output is to tell, through noise: what words say, and at each query what lies on its latent token; it
    rests with files. In the first `lesson_steps` nothing else is learned. `repa` weighs how much the middle of the
    diffusion transformer resembles the encoder's features of the clean target, in the first `repa_until` of the run.
    A share `redraw` of the sources of edits is encoded and drawn by the model's own tokenizer first, so that it learns
    to edit what it drew itself.
    """

    noises: int = 1
    drop_prompt: float = 0.1
    redraw: float = 0.0
    target: str = "unilip"
    bind: float = 0.0
    lesson_steps: int = 0
    repa: float = 0.0
    repa_until: float = 0.4

    def __post_init__(self) -> None:
        lessons = self.lesson_steps and not self.bind
        other = self.target != "unilip"
        _check(self, "objective.", lesson_steps=lessons, repa=self.repa and other, redraw=self.redraw and other)


@dataclass(frozen=True)
class FewSteps(Flow):
    """Few-step stages (RCGM, arXiv 2512.05150): jumps of any length to where the teacher's guided velocity leads.

    The teacher is the diffusion transformer that the run starts from, or that of the "teacher" of `init`, guided at
    `guidance` (edits: `edit_guidance`). A jump is compared with a step of `stride` along that velocity and `rollouts`
    jumps of the averaged weights; or, with `path` above 0, with where so many steps of the teacher lead. `steps` are
    the numbers of jumps that the model is to draw in, its own first.
    """

    noises: int = 3
    drop_prompt: float = 0.0
    guidance: float = 4.5
    edit_guidance: float = 4.5
    stride: float = 0.01
    rollouts: int = 2
    path: int = 0
    steps: str = "4,2,1"

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
    """LoRA or DoRA in place of the weights that `trains` names: off at rank 0.

    `targets` names linear layers by the last words of their names, with commas (empty: all that `trains` reaches). The
    update is scaled by alpha / rank; alpha 0 stands for twice the rank.
    """

    rank: int = 0
    alpha: float = 0.0
    dora: bool = False
    targets: str = ""

    def __post_init__(self) -> None:
        _check(self, "adapter.", rank=not self.rank and (self.alpha or self.dora or self.targets))


@dataclass(frozen=True)
class Data:
    """Where batches come from: the emoji world by its name, or files of one's own: `path` says where, docs/data.md how.

    Shares: `edit_share` of steps have edits, `joint` of those take a thing of a second picture, `text_share` adds
    questions without a picture. `edits` names kinds of the world's edits and how often each comes,
    "recolour:3,background" (empty: all alike). `image_size` replaces the model's own; `fit` makes pictures square
    (auto: the centre of what is drawn, the whole of what is talked about); `shapes` are sizes in place of the square,
    "336x588,448x448" (aspect buckets), one a step. Texts over `max_characters`, or `max_tokens` (0: what the model
    reads), are left out. Over a share `max_skipped` of samples that cannot be read the run stops. `window` shards are
    shuffled together; `lanes` are disjoint sets of shards that fill their own part of every step; `keep_gb` bounds
    remote shards on disk. `cache`: made by `unilip data cache`. `workers`: processes.
    """

    source: str = "emoji"
    world: str = "nano"
    path: str = ""
    image_size: int = 0
    fit: str = "auto"
    shapes: str = ""
    edit_share: float = 0.0
    edits: str = ""
    joint: float = 0.0
    text_share: float = 0.0
    max_characters: int = 1000
    max_tokens: int = 0
    max_skipped: float = 0.01
    window: int = 4
    lanes: int = 1
    keep_gb: float = 50.0
    cache: str = ""
    workers: int = 0

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
    """A whole run. `init` lists where parts start: "part,part=source", a source being a recipe, a path or a hub id.

    `config` pairs fields of the model's config with values that differ from the preset's and the sources'. With
    `per_seed` every seed has a folder, and "{seed}" in a source stands for the seed. A step is `accumulate` batches of
    `batch_size`, the most that a process holds at once: their product is the global batch, which processes share.
    `trains` pairs parameter-name prefixes with a factor on the learning rate; the longest prefix decides, and what none
    names is frozen.

    `parallel`: ddp (each process has all of the model) or fsdp (each a part). `dtype` is the precision of the
    arithmetic, `weights_dtype` of trained weights and the optimizer's averages, `reduce_dtype` of gradients between
    processes. A step that is not finite is skipped; `skip_limit` in a row stop the run. `gradient_checkpointing` keeps
    only what goes into a layer and computes it again; `selective_checkpointing` keeps matrix products and convolutions
    as well. `checks` stop a run that goes wrong: a term of the log and what its mean must be, as in "local_concept >=
    0.9 @ 500".
    """

    name: str
    model: str
    objective: Understand | Reconstruct | Flow
    trains: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int
    init: tuple[str, ...] = ()
    config: tuple[tuple[str, str | int | bool], ...] = ()
    per_seed: bool = False
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    weights_dtype: str = "float32"
    reduce_dtype: str = "float32"
    parallel: str = "ddp"
    skip_limit: int = 5
    adapter: Adapter = field(default_factory=Adapter)
    gradient_checkpointing: bool = False
    selective_checkpointing: bool = False
    compile: bool = False
    measure_latents: bool = False
    log_every: int = 20
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2
    checks: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        objective, data = self.objective, self.data
        flow, few = isinstance(objective, Flow), isinstance(objective, FewSteps)
        bind, repa, redraw, target = (
            flow and getattr(objective, name) for name in ("bind", "repa", "redraw", "target")
        )
        reached = {prefix.split(".")[0] for prefix, factor in self.trains if factor > 0}
        _check(
            self, "", name=not re.fullmatch(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*", self.name),
            weights_dtype=self.weights_dtype == "bfloat16" and self.dtype != "bfloat16",
            checks=[check for check in self.checks if not re.fullmatch(CHECK, check)],
            trains=not reached or not all(0 <= factor < math.inf for _, factor in self.trains),
            reached=flow and not reached & {"connector", "dit", "mllm"}, edit_share=data.edit_share and not flow,
            cached_repa=data.cache and repa, cached_redraw=data.cache and redraw,
            cached_augment=data.cache and getattr(objective, "augment", 0),
            averages=few and (not self.ema or self.weights_dtype != "float32"), few_dit=few and "dit" not in reached,
            decoder=isinstance(objective, Shrink) and reached != {"pixel_decoder"},
            text_share=data.text_share and not (isinstance(objective, Understand) and objective.next_token),
            lanes=self.batch_size * self.accumulate % data.lanes,
            selective=self.selective_checkpointing and (self.gradient_checkpointing or self.compile),
            latents=self.measure_latents and not isinstance(objective, Reconstruct), joint_bind=data.joint and bind,
            shapes_bind=data.shapes and self.lessons and getattr(objective, "bind", 0),
            shapes_talk=data.shapes and isinstance(objective, Understand), shapes_dcae=data.shapes and target == "dcae",
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
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON-ready values by dotted name."""
    return json.loads(json.dumps(leaves(recipe), allow_nan=False))


def changed_settings(recipe: Recipe, before: Mapping[str, Any]) -> str:
    """Say which settings differ from an earlier run's (a new one had its present default); empty: none."""
    now = plain(recipe)
    before = _defaults(recipe) | dict(before)
    names = [name for name in {**now, **before} if name not in FREE_TO_CHANGE and now.get(name) != before.get(name)]
    return ", ".join(f"{name} ({before.get(name)} -> {now.get(name)})" for name in names)


def require_same(recipe: Recipe, before: Mapping[str, Any], made: object) -> None:
    """Raise ConfigError where what a run MADE was made with other settings BEFORE than the recipe's."""
    if changed := changed_settings(recipe, before):
        raise ConfigError(f"{made} was made with other settings: {changed}. Restart the run, or use another folder.")


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """The default of every setting of a recipe that has one, by dotted name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            fresh: Any = type(value)
            found |= leaves(fresh(), f"{f.name}.")
        elif f.default is not dataclasses.MISSING:
            found[f.name] = f.default
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
            near = _nearest(name, names)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"{recipe.name} has no setting {name!r}.{hint} All of them: {', '.join(names)}.")
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


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that ends in what was given (lr: optim.lr), else the one that looks most like it."""
    names = list(names)
    last = name.split(".")[-1]
    inside = [n for n in names if n.split(".")[-1] == last]
    return next(iter(inside or difflib.get_close_matches(name, names, n=1, cutoff=0.3)), None)


def _parse(name: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
                raise ValueError(text)
            return text.lower() in ("true", "1", "yes")
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return _number(text)
        if name == "trains":  # encoder:0.1,latent_head
            pairs = [part.partition(":") for part in text.split(",") if part]
            return tuple((prefix.strip(), _number(factor) if sep else 1.0) for prefix, sep, factor in pairs)
        if name == "config":  # condition=queries,num_queries=8
            fields = [[word.strip() for word in part.partition("=")] for part in text.split(",") if part]
            known: dict[str, str | int] = {"true": True, "false": False}
            known |= {value: int(value) for _, _, value in fields if value.isdigit()}
            return tuple((field, known.get(value.lower(), value)) for field, _, value in fields)
        if name == "checks":
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if name == "init":  # encoder,mllm=nano/clip,dit=FOLDER: a source ends where the next parts begin
            return tuple(part.strip(", ") for part in re.findall(r"[^=]*=[^,]*|[^=]+$", text.strip(",")))
        return text
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} cannot be read as {type(old).__name__}, which {old!r} is.") from error


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number
