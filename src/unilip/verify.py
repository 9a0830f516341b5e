"""Recompute recorded numbers: does this checkpoint, on this machine, still give what the authors' code gave?

In:  a checkpoint, and a safetensors file of recorded inputs and results (names are `group.entry`).
Out: one `Row` per recorded result with the largest error. An entry that is not understood is a failed row.

Groups: `t2i*` and `edit*` are generations (prompts first, then as many unconditional rows), `train_t2i*` and
`train_edit*` training steps with gradients, `recon*` reconstructions, `sampler` and `train` the schedules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import Checkpoint, Weights, load_into, open_checkpoint
from unilip.checkpoints.tables import Origin
from unilip.errors import CheckpointError
from unilip.method.decoder import resize_to_tokens
from unilip.method.flow import (
    TRAIN_TIMESTEPS,
    flow_loss,
    guide,
    interpolate,
    make_schedule,
    sample,
    train_levels,
)
from unilip.method.mllm import fill_slots
from unilip.method.model import Network
from unilip.method.text import IMG_CONTEXT, Tokens

Record = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]

INPUTS = frozenset({
    "input_ids", "attention_mask", "pixel_values", "noise", "guidance", "labels", "gen_image", "und_image", "u",
})  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What we compute for an entry; `valid` (B,L) marks the positions to compare, if not all."""

    entry: str
    value: Tensor
    valid: Tensor | None = None
    note: str = ""


Results = Iterator[Result]


@dataclass(frozen=True)
class Row:
    """One recorded entry: the largest absolute error, what is allowed, and a remark where there is one."""

    name: str
    max_abs_error: float
    tolerance: float
    ok: bool
    note: str = ""


def verify(
    checkpoint: Source,
    expected: str | os.PathLike[str],
    tolerance: float = 1e-4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    progress: Progress | None = None,
) -> list[Row]:
    """Recompute every entry of a file of recorded numbers with a checkpoint, and compare.

    Values stored in float16 are measured from the interval of numbers that round to them, so the tolerance is the
    same for them. Whole numbers must be equal. Pictures are decoded from the *recorded* final latents: a decoder of
    random weights magnifies rounding a hundredfold in places, and each step is to be judged by its own arithmetic;
    what our own latents give is in the row's note.

    Args:
        checkpoint: anything that `open_checkpoint` takes.
        expected: a safetensors file in the format described above.
        tolerance: the largest absolute error allowed.
        device, dtype: where and in what type to compute.
        progress: called as f(entries done, entries in all, name of the entry).

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = Path(expected)
    if not path.is_file() or path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no safetensors file of recorded numbers.")
    opened = open_checkpoint(checkpoint)
    weights = Weights([path])
    groups: dict[str, dict[str, Tensor]] = {}
    for name in weights.shapes:
        group, _, entry = name.rpartition(".")
        groups.setdefault(group, {})[entry] = weights.read(Origin(name))
    with torch.device("meta"):
        model = Network(opened.config, opened.parts)
    load_into(model, opened, device=device, dtype=dtype, parts=model.parts)
    model.eval()
    total = sum(entry not in INPUTS for record in groups.values() for entry in record)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if progress is not None:
            progress(len(rows), total, row.name)

    for group, record in groups.items():
        wanted = {entry for entry in record if entry not in INPUTS}
        recipe, needed = _recipe(group)
        why = "not understood"
        lacking = [part for part in needed if part not in model.parts]
        if lacking:
            why = f"the checkpoint has no {', '.join(lacking)}"
        elif recipe is not None:
            moved = _Recorded({e: value.to(device) if e in INPUTS else value for e, value in record.items()})
            try:
                for result in recipe(model, opened, moved):
                    if result.entry in wanted:
                        wanted.remove(result.entry)
                        add(_compare(f"{group}.{result.entry}", result, record[result.entry], tolerance))
            except _NotRecordedError as error:
                why = f"{group}.{error} is not recorded"
        for entry in sorted(wanted):
            add(Row(f"{group}.{entry}", math.inf, tolerance, False, why))
    return rows


def format_rows(rows: Iterable[Row]) -> str:
    """Lay rows out as a text table, with a summary as its last line."""
    rows = list(rows)
    width = max([len(row.name) for row in rows], default=4)
    lines = [f"{'entry':<{width}}  {'max error':>9}  {'allowed':>9}"]
    lines += [
        f"{r.name:<{width}}  {r.max_abs_error:>9.1e}  {r.tolerance:>9.1e}  {'ok' if r.ok else 'FAILED'}"
        + (f"  ({r.note})" if r.note else "")
        for r in rows
    ]
    failed = sum(not row.ok for row in rows)
    what = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
    lines.append(f"{what}, {failed} FAILED" if failed else f"{what}, all within tolerance")
    return "\n".join(lines)


def _compare(name: str, result: Result, stored: Tensor, tolerance: float) -> Row:
    value, valid, notes = result.value.detach().cpu(), result.valid, [result.note] if result.note else []
    if value.shape != stored.shape:
        note = f"shape {list(value.shape)} instead of {list(stored.shape)}"
        return Row(name, math.inf, tolerance, False, note)
    if valid is not None:
        value, stored = value[valid.cpu()], stored[valid.cpu()]
    error = (value.double() - stored.double()).abs()
    if not stored.is_floating_point():
        tolerance = 0.0
    elif stored.dtype == torch.float16:
        raw = float(error.max())
        _, exponent = torch.frexp(stored.float())  # |stored| in [2^(e-1), 2^e), where float16 steps by 2^(e-11)
        half_step = torch.ldexp(torch.ones_like(error), (exponent - 12).clamp(min=-25))
        error = (error - half_step).clamp(min=0)
        notes.insert(0, f"beyond float16 rounding; {raw:.1e} with it")
    worst = float(error.max()) if error.numel() else 0.0
    return Row(name, worst, tolerance, worst <= tolerance, "; ".join(notes))  # NaN compares false, so it fails


# --- recipes --------------------------------------------------------------------------------------------------------

Recipe = Callable[[Network, Checkpoint, Record], Results]


class _NotRecordedError(Exception):
    """An input that a recipe needs is missing from the file."""


class _Recorded(dict[str, Tensor]):
    def __missing__(self, entry: str) -> Tensor:
        raise _NotRecordedError(entry)


def _recipe(group: str) -> tuple[Recipe | None, tuple[str, ...]]:
    """Return how a group is recomputed and which parts of the model that takes."""
    if group == "train":
        return _train_schedule, ()
    if group == "sampler":
        return _sampler, ()
    if group.startswith("recon"):
        return _reconstruction, ("encoder", "latent_head", "pixel_decoder")
    sampling = ("encoder", "pixel_decoder", "mllm", "connector", "dit")
    if group.startswith(("t2i", "edit")):
        return _generation, sampling
    return (_training, (*sampling, "latent_head")) if group.startswith(("train_t2i", "train_edit")) else (None, ())


def _train_schedule(model: Network, opened: Checkpoint, record: Record) -> Results:
    timesteps, sigmas = train_levels(torch.arange(TRAIN_TIMESTEPS, dtype=torch.float64) / TRAIN_TIMESTEPS)
    yield Result("timesteps", timesteps)
    yield Result("sigmas", sigmas)


def _sampler(model: Network, opened: Checkpoint, record: Record) -> Results:
    sampling = opened.config.sampling
    steps = len(record["timesteps"]) if "timesteps" in record else sampling.num_inference_steps
    schedule = make_schedule(sampling.solver, sampling.flow_shift, steps)
    yield Result("timesteps", schedule.timesteps)
    yield Result("sigmas", torch.tensor(schedule.levels))


@torch.no_grad()
def _reconstruction(model: Network, opened: Checkpoint, record: Record) -> Results:
    pixels = record["pixel_values"]
    features = model.encoder(pixels)
    yield Result("features", features)
    if not {"latents", "decoded", "image"} & set(record):
        return
    latents = model.latent_head(features, pixels.shape[-2] // 28)
    yield Result("latents", latents)
    decoded = model.pixel_decoder.decode(latents)
    yield Result("decoded", decoded)
    yield Result("image", resize_to_tokens(decoded))


@torch.no_grad()
def _generation(model: Network, opened: Checkpoint, record: Record) -> Results:
    ids = record["input_ids"]
    tokens = Tokens(ids, record["attention_mask"].long(), _slots(opened, record, "pixel_values"))
    features = None
    if "pixel_values" in record:
        features = model.encoder(record["pixel_values"])
        yield Result("image_features", features)
        features = features.repeat(len(ids) // len(features), 1, 1)
    embeddings = model.mllm.embed(ids, tokens.image_slots, features)
    hidden, mask = model.mllm.read_with_queries(embeddings, tokens.attention_mask)
    valid = mask.bool()
    yield Result("llm_hidden", hidden, valid)
    if features is not None:
        hidden = fill_slots(hidden, tokens.image_slots, features)
    connected = model.connector.connect(hidden, mask)
    yield Result("connector", connected, valid)
    condition, mask = model.condition(tokens, features)
    yield Result("condition", condition, valid)

    sampling = opened.config.sampling
    guidance = float(record["guidance"])
    half = len(ids) // 2
    order = torch.cat([torch.arange(half, 2 * half), torch.arange(half)]) if guidance > 1 else torch.arange(half)
    order = order.to(ids.device)
    outputs: list[Tensor] = []

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        rows = torch.cat([latents, latents]) if guidance > 1 else latents
        outputs.append(model.dit(rows, timestep.to(rows.device).expand(len(rows)), condition[order], mask[order]))
        return guide(outputs[-1].float(), guidance) if guidance > 1 else outputs[-1].float()

    schedule = make_schedule(sampling.solver, sampling.flow_shift, sampling.num_inference_steps)
    latents = sample(velocity, record["noise"], schedule)
    yield Result("n_dit_calls", torch.tensor(len(outputs)))
    yield Result("dit_first", outputs[0])
    yield Result("dit_last", outputs[-1])
    yield Result("final_latents", latents)
    if not {"decoded", "image"} & set(record):
        return
    start = record["final_latents"].to(latents) if "final_latents" in record else latents
    image, own = model.from_latent(start)[0], model.from_latent(latents)[0]
    note = f"from the recorded latents; from ours {float((image - own).abs().max()):.1e} away"
    if "decoded" in record:
        mean, factor = model.latent_scale(start)
        yield Result("decoded", model.pixel_decoder.decode(start / factor + mean), None, note)
    yield Result("image", image.movedim(0, -1), None, note)


@torch.enable_grad()
def _training(model: Network, opened: Checkpoint, record: Record) -> Results:
    tokens, back, theirs = _without_queries(opened, record)
    features = model.encoder(record["und_image"]).detach() if "und_image" in record else None
    condition, mask = model.condition(tokens, features)
    rows = torch.arange(len(back), device=back.device)[:, None]
    yield Result("condition", condition[rows, back], theirs)
    with torch.no_grad():
        clean = model.to_latent(model.encoder(record["gen_image"]))
    noise = record["noise"].to(clean.dtype)
    timesteps, sigmas = train_levels(record["u"])
    noisy = interpolate(clean, noise, sigmas.to(clean.dtype))
    out = model.dit(noisy, timesteps, condition, mask)
    yield Result("dit_out", out)
    loss = flow_loss(out, clean, noise)
    yield Result("loss", loss)
    wanted = {
        "grad_latent_queries": model.mllm.queries,
        "grad_projector_weight": model.connector.to_dit.weight,
        "grad_dit_proj_out": model.dit.transformer.proj_out.weight,
    }
    for (entry, _), gradient in zip(wanted.items(), torch.autograd.grad(loss, list(wanted.values())), strict=True):
        yield Result(entry, gradient)


def _slots(opened: Checkpoint, record: Record, pixels: str) -> Tensor:
    """Mark the image positions of a batch; none where there are no pixels."""
    ids, mask = record["input_ids"], record["attention_mask"].bool()
    if pixels not in record:
        return torch.zeros_like(mask)
    if opened.image_token_id is None:
        raise CheckpointError(f"{opened.path} does not say which token is {IMG_CONTEXT}; add its tokenizer files.")
    return (ids == opened.image_token_id) & mask


def _without_queries(opened: Checkpoint, record: Record) -> tuple[Tokens, Tensor, Tensor]:
    """Take the query slots out of training inputs.

    Returns the prompts, where each of their positions (B,L) lies in our order [prompt][queries], and which are valid.
    """
    ids, mask, marked = record["input_ids"], record["attention_mask"].bool(), record["labels"] != -100
    count = opened.config.num_queries
    order = marked.long().cumsum(-1)
    queries = marked & (order > order[:, -1:] - count)  # the last Q marked ones; `<img>` comes before them
    prompt = mask & ~queries
    slots = _slots(opened, record, "und_image") & prompt
    length = int(prompt.sum(-1).max())
    place = (prompt.long().cumsum(-1) - 1).clamp(min=0)  # left-aligned
    back = torch.where(queries, length + queries.long().cumsum(-1) - 1, place)
    shape = (len(ids), length)
    new_ids, new_mask, new_slots = ids.new_zeros(shape), ids.new_zeros(shape), slots.new_zeros(shape)
    for row in range(len(ids)):
        size = int(prompt[row].sum())
        new_ids[row, :size] = ids[row, prompt[row]]
        new_mask[row, :size] = 1
        new_slots[row, :size] = slots[row, prompt[row]]
    return Tokens(new_ids, new_mask, new_slots), back, mask
