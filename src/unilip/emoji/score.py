"""Evaluation of a model in the emoji world: reconstructions, answers, generations, edits and riddles, all held out.

Out, in a folder: items.jsonl (one judged item a line), pictures/, results.json, results.md and index.html. Every item
is seeded by its own key, so a rerun goes on, and no picture depends on its batch.
"""

import contextlib
import hashlib
import json
import logging
import math
import platform
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from unilip.adapters import adapter_names, adapter_scale
from unilip.chat import joined
from unilip.emoji.art import Atlas
from unilip.emoji.captions import canonical
from unilip.emoji.dataset import Edits, Questions, Scenes, pixels
from unilip.emoji.edits import COMBINING, Edit, sample_chain
from unilip.emoji.judge import VERSION, Judge, Reading, judge_edit, judge_prompt, psnr_outside
from unilip.emoji.knowledge import riddles
from unilip.emoji.questions import KINDS
from unilip.emoji.render import change_mask
from unilip.emoji.report import Record, write_report
from unilip.emoji.world import COMPOSITIONAL, TASKS, Scene, World
from unilip.errors import UniLIPError, check_choice, differences
from unilip.fast.loop import Settings
from unilip.fast.offload import HEAD
from unilip.files import generator, lines_of, read_json, read_lines, read_text, stable_hash, write_json, write_lines
from unilip.method.config import TOKEN_PIXELS
from unilip.model import DRAWING, UniLIP
from unilip.pictures import picture_psnr, picture_ssim, to_pixels
from unilip.shapes import Size

log = logging.getLogger(__name__)

PARTS = ("recon", "vqa", "gen", "edit", "riddle", "chain", "shapes", "joint")
NEEDS = {
    "recon": ("encoder", "latent_head", "pixel_decoder"),
    "vqa": ("encoder", "mllm"),
    "chain": ("encoder", "latent_head", *DRAWING),
    **dict.fromkeys(("gen", "riddle"), DRAWING),
    **dict.fromkeys(("edit", "shapes", "joint"), ("encoder", *DRAWING)),
}
DEPTHS = (1, 3, 5)  # edits in a row after which a chain is looked at
ORIGINAL = "from the original"
COUNT, SEEDS = 12, 4  # prompts of each group, and pictures of each prompt
CHEAP = 5  # reconstructions and questions cost little: so many times COUNT
DATA_SEED = 20_000  # of the held-out items; training and its probes use other seeds
SWAPPED = "swapped prompts"
UNGUIDED = "no guidance"
WRITTEN = "as people write"
ASIDE = (UNGUIDED, WRITTEN)  # groups that draw the other groups' prompts again
UNSEEN_PICTURE = "another picture"
# forms in which people write a prompt; the words stay those of the caption
FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text[:1].upper() + text[1:],
    lambda text: f"{text}.",
    str.upper,
    lambda text: re.sub("^(a|an) ", "", text),
    lambda text: f"draw {text}",
    lambda text: f"{text}, please",
    lambda text: text.replace(" ", "  "),
    lambda text: f"\u201c{text[:1].upper()}{text[1:]}.\u201d",
)
Shown = tuple[Record, np.ndarray]  # with a picture to look at
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One thing to do; ``group``: row of the table; ``index`` of the prompt in it; a ``mode`` goes through together."""

    key: str
    group: str
    index: int
    data: dict[str, Any] = field(default_factory=dict)
    mode: str = ""

    @property
    def part(self) -> str:
        return self.key.partition("/")[0]


def normalise(answer: str) -> str:
    """Lower case, no punctuation at the ends, single spaces: what counts of an answer."""
    return re.sub(r"\s+", " ", answer.lower()).strip(" .,!?;:\"'")


def accepts(answer: str, accepted: Sequence[str]) -> bool:
    """Whether ANSWER is one of the accepted forms, after ``normalise`` and without a leading article."""
    said, *forms = (re.sub(r"^(a|an|the) ", "", normalise(text)) for text in (answer, *accepted))
    return said in forms


class Bench:
    """A model on a world: plans the items of each part and performs them batch by batch."""

    def __init__(
        self,
        model: UniLIP,
        world: World,
        atlas: Atlas,
        count: int = COUNT,
        seeds: int = SEEDS,
        steps: int | None = None,
        guidance_scale: float | None = None,
        preset: str = "quality",
    ) -> None:
        if count < 1 or seeds < 1:
            raise UniLIPError(f"count is {count} and seeds is {seeds}; both must be at least 1.")
        if model.config.image_size != world.image_size:
            raise UniLIPError(
                f"The model draws {model.config.image_size} pixels a side, world {world.name!r} has "
                f"{world.image_size}; take the world that the model was trained in."
            )
        self.model, self.world, self.atlas = model, world, atlas
        self.count, self.seeds = count, seeds
        own = Settings.of(model.config, preset, num_inference_steps=steps, guidance_scale=guidance_scale)
        self.preset, self.steps, self.guidance_scale = preset, own.num_inference_steps, float(own.guidance_scale)

    @cache  # noqa: B019 - a bench lives as long as its run
    def judge_of(self, size: Size) -> Judge:
        return Judge(self.world.shaped(size), self.atlas)

    @property
    def judge(self) -> Judge:
        return self.judge_of(self.world.size)

    def plan(self, part: str) -> list[Item]:
        """Return the items of PART, always the same ones in the same order."""
        return list(getattr(self, f"_plan_{part}")())

    def perform(self, items: Sequence[Item]) -> list[Shown]:
        """Put items of one part and mode through the model; returns for each its record and a picture to look at."""
        return list(getattr(self, f"_perform_{items[0].part}")(items))

    def _held_out(self, kind: Callable[..., T], size: int = 0, world: World | None = None, **more: Any) -> T:
        return kind(world or self.world, self.atlas, "val", DATA_SEED, size or self.count, **more)

    def _plan_recon(self) -> Iterator[Item]:
        size = CHEAP * self.count
        held_out = partial(self._held_out, Scenes, size, purpose="tokenizer")
        data = {"held-out scenes": held_out()}
        if self.world.extra:
            data["held-out concepts"] = held_out(tasks=("single",), pool=self.world.extra)
        groups = {group: [scenes.draw(i)[:2] for i in range(size)] for group, scenes in data.items()}
        if "recolour" in self.world.edits:  # what a perfect edit to an unseen pair would have to draw
            edits = self._held_out(Edits, size, kinds=("recolour",), seen=False)
            groups["recolourings, unseen"] = [(edits.draw(i).target, "recolour") for i in range(size)]
        for group, drawn in groups.items():
            for i, (scene, task) in enumerate(drawn):
                yield Item(f"recon/{group}/{i:04d}", group, i, wish(scene, task, self.world))

    def _plan_vqa(self) -> Iterator[Item]:
        for kind in KINDS if len(self.world.styles) > 1 else [kind for kind in KINDS if kind != "style"]:
            for i in range(CHEAP * self.count):
                yield Item(f"vqa/{kind}/{i:04d}", kind, i)

    def _plan_gen(self) -> Iterator[Item]:
        once = []
        for group, data in self._generation_groups().items():
            for i in range(self.count):
                scene, task, _ = data.draw(i)
                for seed in range(self.seeds):
                    asked = wish(scene, task, self.world) | {"seed": seed}
                    item = Item(f"gen/{group}/{i:04d}/{seed}", group, i, asked)
                    yield item
                    once += [item] if seed == 0 else []
        for n, item in enumerate(item for item in once if item.group.endswith(", seen")):
            prompt = item.data["prompt"]
            written = item.data | {"noise": prompt, "prompt": FORMS[n % len(FORMS)](prompt)}
            yield Item(f"gen/{WRITTEN}/{item.key}", WRITTEN, n, written)
        for n, item in enumerate(once if self.guidance_scale > 1 else ()):
            yield Item(f"gen/{UNGUIDED}/{item.key}", UNGUIDED, n, item.data, UNGUIDED)

    def _generation_groups(self) -> dict[str, Scenes]:
        held_out, groups = partial(self._held_out, Scenes, purpose="generation"), dict[str, Scenes]()
        for task in TASKS:
            for seen in (True, False) if task in COMPOSITIONAL else (True,):
                groups[f"{task}, {'seen' if seen else 'unseen'}"] = held_out(tasks=(task,), seen=seen)
        if pool := self.world.generation_held_out:
            groups["concepts never generated"] = held_out(tasks=("single",), pool=pool)
        return groups

    def _plan_edit(self) -> Iterator[Item]:
        for kind in self.world.edits:
            for seen in (True, False) if kind in COMBINING else (True,):
                group = f"{kind}, {'seen' if seen else 'unseen'}"
                for i, seed in product(range(self.count), range(max(1, self.seeds // 2))):
                    yield Item(f"edit/{group}/{i:04d}/{seed}", group, i, {"kind": kind, "seen": seen})

    def _plan_riddle(self) -> Iterator[Item]:
        known = [riddle for riddle in riddles(self.world) if riddle.concept not in self.world.generation_held_out]
        known.sort(key=lambda riddle: stable_hash("riddle", DATA_SEED, riddle.caption))
        chosen = [riddle for met in (True, False) for riddle in [r for r in known if r.met == met][: self.count]]
        for (i, riddle), seed in product(enumerate(chosen), range(self.seeds)):
            group = f"riddles {'met' if riddle.met else 'never met'} in training"
            asked = {"prompt": riddle.caption, "concept": riddle.concept, "seed": seed}
            yield Item(f"riddle/{i:04d}/{seed}", group, i, asked)

    def _plan_chain(self) -> Iterator[Item]:
        for mode, depths in (("", DEPTHS), (ORIGINAL, DEPTHS[1:])):
            for i, depth in product(range(self.count), depths):
                group = f"{depth} in a row{mode and f', {mode}'}"
                yield Item(f"chain/{i:04d}/{mode or 'last'}/{depth}", group, i, {"depth": depth}, mode)

    def _perform_chain(self, items: Sequence[Item]) -> Iterator[Shown]:
        """Follow edits one after the other, each on the last picture; or all at once, on the first."""
        numbers = {item.index for item in items}
        rows = {i: sample_chain(self.world, generator("chain", DATA_SEED, i), DEPTHS[-1]) for i in numbers}
        first = {i: pixels(edits[0].source, self.atlas, self.world) for i, edits in rows.items()}
        drawn, copies = ({(i, 0): picture for i, picture in first.items()} for _ in range(2))
        whole = items[0].mode == ORIGINAL
        for depth in DEPTHS[1:] if whole else range(1, max(item.data["depth"] for item in items) + 1):
            before = 0 if whole else depth - 1
            texts = [joined([edit.instruction for edit in edits[before:depth]]) for edits in rows.values()]
            noises = [("chain", i, depth) for i in rows]
            results = self._sample(self.model.edit, noises, [drawn[i, before] for i in rows], texts)
            again = self.model.reconstruct([copies[i, before] for i in rows]).images
            for i, result, copy in zip(rows, results, again, strict=True):
                drawn[i, depth], copies[i, depth] = result, np.asarray(copy)
        for item in items:
            i, depth = item.index, item.data["depth"]
            edits, result, original = rows[i][:depth], drawn[i, depth], first[i]
            record, shown = judged_edit(self.judge, edits[-1], [original], result)
            touched = [change_mask(edit.source, edit.target, self.atlas, self.world) for edit in edits]
            outside = ~np.logical_or.reduce(touched)
            record |= {
                "text": joined([edit.instruction for edit in edits]),
                "psnr_outside": round(picture_psnr(result, original, outside), 3),
                "psnr_outside_reconstruction": round(picture_psnr(copies[i, depth], original, outside), 3),
            }
            yield record, shown

    def _plan_shapes(self) -> Iterator[Item]:
        for size in other_shapes(self.world):
            world, named = self.world.shaped(size), "{}x{}".format(*size)
            scenes = self._held_out(Scenes, world=world, purpose="generation", seen=True)
            for i in range(self.count):
                scene, task, _ = scenes.draw(i)
                asked = wish(scene, task, world) | {"size": size, "seed": 0}
                yield Item(f"shapes/{named}/{i:04d}", f"pictures, {named}", i, asked, named)
            edits = self._held_out(Edits, world=world)
            for i in range(self.count):
                asked = {"size": size, "edit": edits.draw(i)}
                yield Item(f"shapes/{named}/edit/{i:04d}", f"edits, {named}", i, asked, f"{named} edit")

    def _perform_shapes(self, items: Sequence[Item]) -> Iterator[Shown]:
        size = items[0].data["size"]
        judge, sides = self.judge_of(size), {"width": size[0], "height": size[1]}
        if "edit" not in items[0].data:
            for item, picture in zip(items, self._draw(items, **sides), strict=True):
                yield judged(judge, judge.read(picture), item), picture
            return
        edits = [item.data["edit"] for item in items]
        sources = [pixels(edit.source, self.atlas, judge.world) for edit in edits]
        texts, noises = [edit.instruction for edit in edits], [(item.key,) for item in items]
        results = self._sample(self.model.edit, noises, sources, texts, **sides)
        for edit, source, result in zip(edits, sources, results, strict=True):
            yield judged_edit(judge, edit, [source], result)

    def _plan_joint(self) -> Iterator[Item]:
        return (Item(f"joint/{i:04d}", "a thing of picture 2", i) for i in range(self.count))

    def _perform_joint(self, items: Sequence[Item]) -> Iterator[Shown]:
        for item in items:
            pair = self._held_out(Edits).joint(item.index)
            sources = [pair["source"], pair["other"]]
            result = self._sample(self.model.edit, [(item.key,)], sources, [pair["instruction"]], joint=True)[0]
            yield judged_edit(self.judge, pair["edit"], sources, result)

    def _sample(self, ability: Callable[..., Any], noises: Sequence[Any], *given: Any, **how: Any) -> list[np.ndarray]:
        """Let the model draw or edit what is GIVEN, one noise a picture."""
        generators = [noise_generator(*parts) for parts in noises]
        how = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps, "preset": self.preset, **how}
        return [np.asarray(image) for image in ability(*given, generator=generators, progress=False, **how).images]

    def _draw(self, items: Sequence[Item], **how: Any) -> list[np.ndarray]:
        # the noise belongs to prompt and seed: without guidance, and as people write, it is the same again
        noises = [(item.data.get("noise", item.data["prompt"]), item.data["seed"]) for item in items]
        how |= {"guidance_scale": 1.0} if items[0].mode == UNGUIDED else {}
        return self._sample(self.model.generate, noises, [item.data["prompt"] for item in items], **how)

    def _perform_recon(self, items: Sequence[Item]) -> Iterator[Shown]:
        truths = [pixels(item.data["scene"], self.atlas, self.world) for item in items]
        results = [np.asarray(image) for image in self.model.reconstruct(truths).images]
        with torch.no_grad():
            images = [Image.fromarray(picture) for picture in (*truths, *results)]
            before, after = self.model.features(to_pixels(images)).split(len(items))  # B N D each
        for n, (item, truth, result) in enumerate(zip(items, truths, results, strict=True)):
            measured = {
                "psnr": round(picture_psnr(result, truth), 3),
                "ssim": round(picture_ssim(result, truth), 4),
                "feature_distance": round(measure_features(after[n], before[n]), 5),
            }
            yield judged(self.judge, self.judge.read(result), item) | measured, np.concatenate([truth, result], axis=1)

    def _perform_vqa(self, items: Sequence[Item]) -> Iterator[Shown]:
        size = CHEAP * self.count + 1  # the control asks about the next one's picture
        data = {kind: self._held_out(Questions, size, kinds=(kind,)) for kind in {item.group for item in items}}
        asked, others = ([data[item.group][item.index + step] for item in items] for step in (0, 1))
        texts = [entry["question"] for entry in asked]
        answers, blind = (
            self.model.ask([entry["image"] for entry in shown], texts, max_new_tokens=48) for shown in (asked, others)
        )
        for entry, answer, guess in zip(asked, answers, blind, strict=True):
            ok, control = (accepts(said, entry["accepted"]) for said in (answer, guess))
            reason = f"{answer!r}" if ok else f"{answer!r}, not {entry['answer']!r}"
            yield {"ok": ok, "control": control, "text": entry["question"], "reason": reason}, entry["image"]

    def _perform_gen(self, items: Sequence[Item]) -> Iterator[Shown]:
        for item, picture in zip(items, self._draw(items), strict=True):
            reading = self.judge.read(picture)
            about = {"reading": reading.to_dict(), "scene": item.data["scene"].to_dict(), "task": item.data["task"]}
            yield judged(self.judge, reading, item) | about, picture

    def _perform_riddle(self, items: Sequence[Item]) -> Iterator[Shown]:
        for item, picture in zip(items, self._draw(items), strict=True):
            reading, meant = self.judge.read(picture), item.data["concept"]
            seen = sorted({found.concept for found in reading.objects})
            ok = seen == [meant]
            reason = str(reading) if ok else f"saw {reading}, meant was {meant}"
            yield {"ok": ok, "text": item.data["prompt"], "reason": reason, "concept": meant, "seen": seen}, picture

    def _perform_edit(self, items: Sequence[Item]) -> Iterator[Shown]:
        asked = [{"kinds": (item.data["kind"],), "seen": item.data["seen"]} for item in items]
        entries = [self._held_out(Edits, **how)[item.index] for how, item in zip(asked, items, strict=True)]
        sources = [entry["source"] for entry in entries]
        texts, noises = [entry["instruction"] for entry in entries], [(item.key,) for item in items]
        results = self._sample(self.model.edit, noises, sources, texts)
        copies = self.model.reconstruct(sources).images
        for entry, result, copy in zip(entries, results, copies, strict=True):
            record, shown = judged_edit(self.judge, entry["edit"], [entry["source"]], result)
            record["psnr_outside_reconstruction"] = psnr_outside(self.judge, np.asarray(copy), entry["edit"])
            yield record, shown


def wish(scene: Scene, task: str, world: World) -> dict[str, Any]:
    """Return what an item asks for: a scene, and the prompt that says it."""
    return {"scene": scene, "task": task, "prompt": canonical(scene, task, world)}


def judged(judge: Judge, reading: Reading, item: Item) -> Record:
    """Return the verdict on what was read off a picture of the scene that an item asks for."""
    verdict = judge_prompt(reading, item.data["scene"], item.data["task"], judge.world)
    return {**vars(verdict), "text": item.data["prompt"]}


def judged_edit(judge: Judge, edit: Edit, sources: Sequence[np.ndarray], result: np.ndarray) -> Shown:
    """Return what is kept of the verdict on an edit, and a picture to look at: sources, result, exact target."""
    verdict, target = judge_edit(judge, result, edit), pixels(edit.target, judge.atlas, judge.world)
    record = {**vars(verdict), "text": edit.instruction, "psnr_outside": psnr_outside(judge, result, edit)}
    return record, np.concatenate([*sources, result, target], axis=1)


def other_shapes(world: World) -> tuple[Size, Size]:
    """Return an upright and a lying size: three fourths and five fourths of the square's sides."""
    short, long = (math.ceil(share * world.image_size / TOKEN_PIXELS) * TOKEN_PIXELS for share in (0.75, 1.25))
    return (short, long), (long, short)


def measure_features(features: torch.Tensor, truth: torch.Tensor) -> float:
    """Return 1 less the cosine of two pictures' features (N, D), mean over the N tokens: 0 is the same meaning."""
    return float(1 - F.cosine_similarity(features.float(), truth.float(), dim=-1).mean())


def noise_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by the text of PARTS: one picture's noise, whatever the batch."""
    return torch.Generator().manual_seed(stable_hash("noise", *parts) % 2**63)


class Folder:
    """The output folder: what the run is of, and the items done so far."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._items = path, path / "items.jsonl"
        self.records: dict[str, Record] = {}
        file = path / "run.json"
        if not file.is_file():
            if self._items.exists():
                raise UniLIPError(f"{path} holds items but no run.json; give an empty folder.")
            write_json(file, identity)
        before = read_json(file, "manifest")
        if other := differences(before, dict.fromkeys(before) | identity):
            raise UniLIPError(f"{path} holds another run: {other}. Give an empty folder, or remove this one.")
        if self._items.is_file():
            for line in lines_of(read_text(self._items)):
                with contextlib.suppress(json.JSONDecodeError):  # of a run that was killed while it wrote
                    record = json.loads(line)
                    self.records[record["key"]] = record
            self.write()

    def has(self, item: Item) -> bool:
        """Whether an item is done, with these words: with another count, a key can be that of another prompt."""
        record = self.records.get(item.key)
        return record is not None and record["text"] == item.data.get("prompt", record["text"])

    def write(self) -> None:
        """Write the list of items anew, each once."""
        write_lines(self._items, self.records.values())

    def add(self, item: Item, record: Record, picture: np.ndarray) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", item.key.split("/", 1)[1].lower())
        file = self.path / "pictures" / item.part / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
        about = {"key": item.key, "part": item.part, "group": item.group, "index": item.index}
        record = {**about, **record, "picture": file.relative_to(self.path).as_posix()}
        with self._items.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records[item.key] = record


def read_counted(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the results of a folder, and the items that are counted in them: no controls, and none of other runs.

    Raises UniLIPError: the items are not those of the results, as where a run with more of them was killed.
    """
    results, items = read_json(folder / "results.json", "results"), folder / "items.jsonl"
    groups = {part: found["groups"] for part in PARTS if (found := results.get(f"emoji-{part}"))}
    seeds = {"gen": results["seeds"], "riddle": results["seeds"], "edit": max(1, results["seeds"] // 2)}

    def counts(record: Record) -> bool:
        part, own = record["part"], groups.get(record["part"], {})
        if record["group"] not in own or int(record["key"].rpartition("/")[2]) >= seeds.get(part, math.inf):
            return False
        numbered = own.values() if part == "riddle" else [own[record["group"]]]  # riddles have numbers of all groups
        return bool(record["index"] < sum(row["prompts"] for row in numbered))

    rows = [record for record in read_lines(items, "list of judged items") if counts(record)]
    found = Counter((record["part"], record["group"]) for record in rows)
    if found != {(part, name): row["items"] for part, own in groups.items() for name, row in own.items()}:
        raise UniLIPError(
            f"{items} is not what results.json was made of; let the evaluation of {folder} run to its end."
        )
    return results, rows


def fingerprint(model: UniLIP) -> str:
    """Return sixteen hex digits of configuration and weights."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name in adapter_names(model):
        digest.update(f"{name} {adapter_scale(model, name)}".encode())
    for part in model.parts:
        with model.using(part, *((HEAD,) if part == "mllm" else ())):
            for name, value in model.get_submodule(part).state_dict(prefix=f"{part}.").items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evaluate(
    model: UniLIP,
    output: Path | str,
    world: World | None = None,
    atlas: Atlas | None = None,
    *,
    parts: Sequence[str] | None = None,
    count: int = COUNT,
    seeds: int = SEEDS,
    steps: int | None = None,
    guidance_scale: float | None = None,
    preset: str = "quality",
    batch_size: int = 24,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate MODEL on held-out items and write everything to the folder OUTPUT; returns what results.json holds.

    In: world, atlas: of the model's picture size, and of ``data_dir()``, by default. parts: of PARTS; all that the
    model's own parts allow. count: prompts of each group; reconstructions and questions CHEAP times as many. seeds:
    pictures of each prompt; of each edit half as many. steps, guidance_scale, preset: of the sampler. batch_size: speed
    and memory only.
    Raises UniLIPError: an unknown part, another size of world, another run's folder, or (DataError) no atlas.
    """
    chosen = check_parts(parts, model)
    world = world if world is not None else world_of(model)
    atlas = atlas if atlas is not None else (Atlas.synthetic(world) if world.name == "tiny" else Atlas.load())
    bench = Bench(model, world, atlas, count, seeds, steps, guidance_scale, preset)
    identity = {
        "model": fingerprint(model), "world": world.name, "atlas": atlas.fingerprint, "judge": VERSION,
        "steps": bench.steps, "guidance_scale": bench.guidance_scale,
        "dtype": str(model.dtype).removeprefix("torch."), "data_seed": DATA_SEED,
        **({"tokenizer": model.processor.tokenizer.fingerprint} if model.processor else {}),
        **({} if preset == "quality" else {"preset": preset}),
    }  # fmt: skip
    folder = Folder(Path(output), identity)
    planned = {part: bench.plan(part) for part in chosen}
    for part, items in planned.items():
        _perform(bench, folder, part, items, batch_size, progress)
    folder.write()
    records = {part: [folder.records[item.key] for item in items] for part, items in planned.items()}
    seconds = round(sum(record["seconds"] for entries in records.values() for record in entries), 1)
    device = f"{model.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    results: dict[str, Any] = {
        "model": model.config.name,
        **{"fingerprint" if name == "model" else name: value for name, value in identity.items()},
        "count": count, "seeds": seeds, "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else device,
        "seconds": seconds, "torch": torch.__version__,
    }  # fmt: skip
    results |= {f"emoji-{part}": summarise(part, entries, world) for part, entries in records.items()}
    write_json(folder.path / "results.json", results)
    write_report(folder.path, results, records)
    log.info("wrote %s", folder.path / "index.html")
    return results


def check_parts(parts: Sequence[str] | None, model: UniLIP) -> tuple[str, ...]:
    """Return the parts to run in their order; raises UniLIPError for one that does not exist or that MODEL lacks."""
    if parts is None:
        joint = model.config.sampling.joint
        able = tuple(part for part in PARTS if set(NEEDS[part]) <= set(model.parts) and (joint or part != "joint"))
        if not able:
            raise UniLIPError(f"A model with {', '.join(model.parts)} only can do none of {', '.join(PARTS)}.")
        return able
    for part in parts or ("",):  # none is no choice
        check_choice("part", part, PARTS)
        model.require(*NEEDS[part])
    return tuple(part for part in PARTS if part in parts)


def world_of(model: UniLIP) -> World:
    """Return the world whose pictures have the model's size."""
    worlds = {world.image_size: world for world in (World.pico(), World.nano(), World.tiny())}
    if model.config.image_size in worlds:
        return worlds[model.config.image_size]
    sizes = ", ".join(f"{world.name} {size}" for size, world in worlds.items())
    raise UniLIPError(
        f"No emoji world has pictures of {model.config.image_size} pixels ({sizes}); only the embedded models can be "
        "evaluated here."
    )


def _perform(bench: Bench, folder: Folder, part: str, items: Sequence[Item], batch_size: int, progress: bool) -> None:
    left = [item for item in items if not folder.has(item)]
    before = len(items) - len(left)
    with tqdm(total=len(items), initial=before, desc=f"emoji-{part}", unit="item", disable=not progress) as bar:
        for batch in _batches(left, batch_size):
            started = time.monotonic()
            done = bench.perform(batch)
            seconds = round((time.monotonic() - started) / len(batch), 4)
            for item, (record, picture) in zip(batch, done, strict=True):
                folder.add(item, {**record, "seconds": seconds}, picture)
                bar.update()


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for _, run in groupby(items, key=lambda item: item.mode):
        same = list(run)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def summarise(part: str, records: Sequence[Record], world: World) -> dict[str, Any]:
    """Return what the records of PART come to: by group, and over all that are no control."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    found: dict[str, Any] = {"groups": {name: _sum_up(entries) for name, entries in groups.items()}}
    proper = {name: row for name, row in found["groups"].items() if name not in ASIDE}
    for kind in ("seen", "unseen") if part in ("gen", "edit") else ():
        shares = [row["right"] for name, row in proper.items() if name.endswith(f", {kind}")]
        found |= _mean(kind, shares)
    found["right"] = _share([row["right"] for row in proper.values()])
    if part == "gen":
        for name, entries in groups.items():
            found["groups"][name] |= _swap_prompts(entries, world)
        found |= _mean(SWAPPED, [row[SWAPPED] for row in proper.values() if SWAPPED in row])
        found |= {name: found["groups"].pop(name) for name in ASIDE if name in groups}
        if WRITTEN in groups:
            plain = {record["key"]: record["ok"] for record in records}
            pairs = [plain.get(record["key"].removeprefix(f"gen/{WRITTEN}/")) for record in groups[WRITTEN]]
            found[WRITTEN]["as captions"] = _share([ok for ok in pairs if ok is not None])
    if part == "riddle":
        concepts = [record["concept"] for record in records]
        moved = concepts[len(concepts) // 2 :] + concepts[: len(concepts) // 2]
        swapped = [r["seen"] == [c] for r, c in zip(records, moved, strict=True) if r["concept"] != c]
        found |= _mean(SWAPPED, swapped)
    if part == "vqa":
        found[UNSEEN_PICTURE] = _share([record["control"] for record in records])
    return found


def _sum_up(entries: Sequence[Record]) -> dict[str, Any]:
    prompts = len({record["index"] for record in entries})
    right = _share([record["ok"] for record in entries])
    row: Record = {"right": right, "interval": _bound(right, prompts), "prompts": prompts, "items": len(entries)}
    parts: dict[str, list[bool]] = defaultdict(list)
    for record in entries:
        for name, value in record.get("parts", {}).items():
            parts[name].append(value)
    if parts:
        row["parts"] = {name: _share(values) for name, values in parts.items()}
    if "control" in entries[0]:
        row[UNSEEN_PICTURE] = _share([record["control"] for record in entries])
    for name in ("psnr", "ssim", "feature_distance", "psnr_outside", "psnr_outside_reconstruction"):
        if numbers := [record[name] for record in entries if record.get(name) is not None]:
            row[name] = _share(numbers)
    return row


def _bound(share: float, prompts: int) -> list[float]:
    """Return the 95 % Wilson interval, as if the pictures of one prompt were one: they are not independent."""
    z = 1.96
    middle = (share + z**2 / (2 * prompts)) / (1 + z**2 / prompts)
    reach = z * math.sqrt(share * (1 - share) / prompts + z**2 / (4 * prompts**2)) / (1 + z**2 / prompts)
    return [round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)]


def _share(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean under its name; nothing where there is none to be had."""
    return {name: _share(values)} if values else {}


def _swap_prompts(entries: Sequence[Record], world: World) -> dict[str, float]:
    """Judge every picture against the next prompt of its group that asks for something else, if there is one."""
    right = []
    for n, record in enumerate(entries):
        other = next((e for e in (*entries[n + 1 :], *entries[:n]) if e["text"] != record["text"]), None)
        if other is not None:
            asked, reading = Scene.from_dict(other["scene"]), Reading.from_dict(record["reading"])
            right.append(judge_prompt(reading, asked, other["task"], world).ok)
    return _mean(SWAPPED, right)
