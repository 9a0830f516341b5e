"""Recompute recorded numbers: does this checkpoint, on this machine, still give what the authors' code gave?

In:  a checkpoint, and a safetensors file of recorded inputs and results (names are `group.entry`). Out: one `Row` per
recorded result with the largest error. Groups: `t2i*` and `edit*` are generations (prompts first, then as many
unconditional rows), `train_t2i*` and `train_edit*` training steps with gradients, `recon*` reconstructions, `sampler`
and `train` the schedules. An entry that is not understood is a failed row.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import Checkpoint, Weights, load_into, open_checkpoint
from unilip.checkpoints.tables import Origin
from unilip.errors import CheckpointError, reason
from unilip.fast.offload import Unmade
from unilip.method.decoder import resize_to_tokens
from unilip.method.flow import TRAIN_TIMESTEPS, make_schedule, train_levels
from unilip.method.model import Network
from unilip.method.text import IMG_CONTEXT, Tokens

Record = Mapping[str, Tensor]
Value = Tensor | tuple[Tensor, Tensor]  # a result; with the positions (B,L) that are compared, if not all are
Results = dict[str, Value]
INPUTS = {"input_ids", "attention_mask", "pixel_values", "noise", "guidance", "labels", "gen_image", "und_image", "u"}


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
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Recompute every entry of a file of recorded numbers with a checkpoint, and compare.

    `tolerance` is the largest absolute error allowed; whole numbers must be equal; float16 is measured from the
    interval that rounds to it. `progress` is f(entries done, in all, name). Raises CheckpointError: unreadable file.
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
    with Unmade():
        model = Network(opened.config, opened.parts)
    load_into(model, opened, device=device, dtype=dtype, parts=model.parts)
    model.eval()
    total = sum(entry not in INPUTS for record in groups.values() for entry in record)
    rows: list[Row] = []
    for group, record in groups.items():
        results, why = Results(), "not understood"
        recompute, needed = next(((how, parts) for names, how, parts in GROUPS if group.startswith(names)), (None, ""))
        if lacking := [part for part in needed.split() if part not in model.parts]:
            why = f"the checkpoint has no {', '.join(lacking)}"
        elif recompute is not None:
            moved = {entry: value.to(device) if entry in INPUTS else value for entry, value in record.items()}
            try:
                results = recompute(model, opened, moved)
            except KeyError as error:
                if error.args[0] not in INPUTS:
                    raise
                why = f"{group}.{error.args[0]} is not recorded"
            except (CheckpointError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, IndexError, TypeError, ValueError, ArithmeticError) as error:
                why = f"cannot be computed from what is recorded with it: {reason(error, 120)}"
        for entry in sorted(set(record) - INPUTS):
            name, ours = f"{group}.{entry}", results.get(entry)
            failed = Row(name, math.inf, tolerance, False, why)
            rows.append(failed if ours is None else compare(name, ours, record[entry], tolerance))
            if progress is not None:
                progress(len(rows), total, name)
    return rows


def format_rows(rows: Iterable[Row]) -> str:
    """Lay rows out as a text table, with a summary as its last line."""
    rows = list(rows)
    width = max([len(row.name) for row in rows], default=4)
    lines = [f"{'entry':<{width}}  {'max error':>9}  {'allowed':>9}"]
    for r in rows:
        verdict = ("ok" if r.ok else "FAILED") + (f"  ({r.note})" if r.note else "")
        lines.append(f"{r.name:<{width}}  {r.max_abs_error:>9.1e}  {r.tolerance:>9.1e}  {verdict}")
    failed = sum(not row.ok for row in rows)
    what = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
    lines.append(f"{what}, {failed} FAILED" if failed else f"{what}, all within tolerance")
    return "\n".join(lines)


def compare(name: str, ours: Value, stored: Tensor, tolerance: float) -> Row:
    """Compare a result with the recorded one."""
    value, valid = ours if isinstance(ours, tuple) else (ours, None)
    value, note = value.detach().cpu(), ""
    if value.shape != stored.shape:
        return Row(name, math.inf, tolerance, False, f"shape {list(value.shape)} instead of {list(stored.shape)}")
    if valid is not None:
        value, stored = value[valid.cpu()], stored[valid.cpu()]
    error = (value.double() - stored.double()).abs()
    if not stored.is_floating_point():
        tolerance = 0.0
    elif stored.dtype == torch.float16:
        note = f"beyond float16 rounding; {float(error.max()):.1e} with it"
        _, exponent = torch.frexp(stored.float())  # |stored| in [2^(e-1), 2^e), where float16 steps by 2^(e-11)
        error = (error - torch.ldexp(torch.ones_like(error), (exponent - 12).clamp(min=-25))).clamp(min=0)
    worst = float(error.max()) if error.numel() else 0.0
    return Row(name, worst, tolerance, worst <= tolerance, note)  # NaN compares false, so it fails


def sampling_levels(model: Network, opened: Checkpoint, record: Record) -> Results:
    """Timesteps and levels of sampling."""
    own = opened.config.sampling
    schedule = make_schedule(own.solver, own.flow_shift, len(record.get("timesteps", range(own.num_inference_steps))))
    return {"timesteps": schedule.timesteps, "sigmas": torch.tensor(schedule.levels)}


def training_levels(model: Network, opened: Checkpoint, record: Record) -> Results:
    """Timesteps and levels of training."""
    timesteps, levels = train_levels(torch.arange(TRAIN_TIMESTEPS, dtype=torch.float64) / TRAIN_TIMESTEPS)
    return {"timesteps": timesteps, "sigmas": levels}


@torch.no_grad()
def reconstruction(model: Network, opened: Checkpoint, record: Record) -> Results:
    """Pixels -> features -> latents -> pixels."""
    features = model.encoder(record["pixel_values"])
    latents = model.latent_head(features, record["pixel_values"].shape[-2] // 28)
    decoded = model.pixel_decoder.decode(latents)
    return {"features": features, "latents": latents, "decoded": decoded, "image": resize_to_tokens(decoded)}


@torch.no_grad()
def generation(model: Network, opened: Checkpoint, record: Record) -> Results:
    """Prompts, and pictures to edit -> hidden states, condition, ends of the loop, the picture of recorded latents."""
    half, results, features = len(record["input_ids"]) // 2, Results(), None
    batch = (record["input_ids"], record["attention_mask"].long(), slots(opened, record, "pixel_values"))
    tokens = Tokens(*(part.roll(half, 0) for part in batch))  # recorded prompts first, drawn unconditional rows first
    if "pixel_values" in record:
        results["image_features"] = seen = model.encoder(record["pixel_values"])
        features = seen.repeat(2 * half // len(seen), 1, 1)
    steps, guidance = opened.config.sampling.num_inference_steps, float(record["guidance"])
    parts = (model.mllm, model.connector.norm, model.connector, model.dit)
    draw = partial(model.draw, tokens, record["noise"], steps, max(guidance, 1.0), features)
    latents, (*states, velocities) = watch(parts, draw)
    valid = nn.functional.pad(batch[1], (0, opened.config.num_queries), value=1).bool()
    for name, outputs in zip(("llm_hidden", "connector", "condition"), states, strict=True):
        results[name] = (outputs[0].roll(half, 0), valid)
    rows, start = slice(half * (guidance <= 1), None), record.get("final_latents", latents).to(latents)
    mean, factor = model.latent_scale(start)
    return results | {
        "n_dit_calls": torch.tensor(len(velocities)), "dit_first": velocities[0][rows],
        "dit_last": velocities[-1][rows], "final_latents": latents,
        "decoded": model.pixel_decoder.decode(start / factor + mean),
        "image": model.from_latent(start)[0].movedim(0, -1),
    }  # fmt: skip


@torch.enable_grad()
def training(model: Network, opened: Checkpoint, record: Record) -> Results:
    """A step of flow matching: condition, velocity, loss, three gradients."""
    ids, marked = record["input_ids"], record["labels"] != -100
    mask = record["attention_mask"].bool().expand_as(ids)
    behind = marked.long().flip(-1).cumsum(-1).flip(-1)  # theirs has the queries among the prompt: the last Q marked
    queries = marked & (behind <= opened.config.num_queries)
    prompt = mask & ~queries
    order = prompt.long().argsort(dim=-1, descending=True, stable=True)[:, : prompt.sum(-1).max()]  # ours: behind it
    image = slots(opened, record, "und_image") & prompt
    tokens = Tokens(ids.gather(1, order), prompt.gather(1, order).long(), image.gather(1, order))
    inputs = (record["gen_image"], record["noise"], record["u"], record.get("und_image"))
    loss, (conditions, velocities) = watch((model.connector, model.dit), partial(model.flow_loss, tokens, *inputs))
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    place = torch.where(queries, order.shape[1] + queries.long().cumsum(-1), prompt.long().cumsum(-1).clamp(min=1)) - 1
    weights = (model.mllm.queries, model.connector.to_dit.weight, model.dit.transformer.proj_out.weight)
    names = ("grad_latent_queries", "grad_projector_weight", "grad_dit_proj_out")
    gradients = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    return {"condition": (conditions[0][rows, place], mask), "dit_out": velocities[0], "loss": loss, **gradients}


def watch(parts: Iterable[nn.Module], run: Callable[[], Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """Run something; return its result, and what each part gave meanwhile."""
    seen = []
    with contextlib.ExitStack() as hooks:
        for part in parts:
            seen.append(outputs := list[Tensor]())
            hooks.enter_context(part.register_forward_hook(lambda *call, kept=outputs: kept.append(call[-1])))
        return run(), seen


def slots(opened: Checkpoint, record: Record, pixels: str) -> Tensor:
    """Mark the image positions of a batch; none where there are no pixels."""
    mask = record["attention_mask"].bool()
    if pixels not in record:
        return torch.zeros_like(mask)
    if opened.image_token_id is None:
        raise CheckpointError(f"{opened.path} does not say which token is {IMG_CONTEXT}; add its tokenizer files.")
    return (record["input_ids"] == opened.image_token_id) & mask


TOKENIZER, SAMPLING = "encoder latent_head pixel_decoder", "encoder pixel_decoder mllm connector dit"
GROUPS = (  # starts of the name, how, which parts that takes
    (("train_t2i", "train_edit"), training, f"{SAMPLING} latent_head"), (("t2i", "edit"), generation, SAMPLING),
    ("recon", reconstruction, TOKENIZER), ("train", training_levels, ""), ("sampler", sampling_levels, ""),
)  # fmt: skip
