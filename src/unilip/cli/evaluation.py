"""The verbs of evaluation: eval NAME."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from unilip.cli.options import LOADING, TELLING, Options, Verb, whole
from unilip.cli.terminal import Report, choose_device
from unilip.errors import UniLIPError

OPTIONS: dict[str, dict[str, Any]] = {
    "--count": dict(type=whole(1, 100_000), metavar="N", help="prompts of each task and kind of edit (12)"),
    "--seeds": dict(type=whole(1, 1000), metavar="N", help="pictures of each prompt (4)"),
    "--parts": dict(metavar="NAMES", help="of recon,vqa,gen,edit,riddle, with commas between (all that the model can)"),
    "--world": dict(metavar="NAME", help="pico, nano or tiny (the one with the model's picture size)"),
}  # fmt: skip


def eval_emoji(o: Options) -> int:
    """Measure a model in the emoji world."""
    report = Report(o, "eval emoji")
    folder = Path(o.output or "results").expanduser()
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UniLIPError(f"There is no folder {folder.absolute().parent}; make it first, or give another --output.")
    device = choose_device(o.device)
    from unilip.data.world import World
    from unilip.eval import emoji

    parts = None if o.parts is None else [part.strip() for part in o.parts.split(",")]
    unknown = sorted(set(parts or ()) - set(emoji.PARTS))
    if unknown:
        raise UniLIPError(f"--parts names {', '.join(map(repr, unknown))}; allowed: {', '.join(emoji.PARTS)}.")
    if o.world is not None:
        World.preset(o.world)
    results = emoji.run(
        o.model,
        folder,
        o.world,
        parts=parts,
        count=o.count,
        seeds=o.seeds,
        steps=o.steps,
        guidance_scale=o.guidance_scale,
        device=device,
        dtype=o.dtype,
        batch_size=o.batch_size,
        progress=o.progress and sys.stderr.isatty(),
    )
    for name in ("results.md", "index.html"):
        report.line(str(folder / name))
    report.end("measured", output=str(folder), results=results)
    return 0


VERBS: dict[str, Verb] = {
    "eval emoji": Verb(
        eval_emoji,
        "[OPTIONS]",
        "Measure a model in the emoji world. The items are held out; no network judges.",
        "unilip eval emoji --model runs/pico/sft/final --output results",
        (
            "--output",
            "--count",
            "--seeds",
            "--parts",
            "--world",
            "--steps",
            "--guidance-scale",
            "--batch-size",
            *LOADING,
            *TELLING,
        ),
        changes={
            "--output": dict(metavar="DIR", help="folder of the results; a rerun goes on where one stopped (results)"),
            "--batch-size": dict(default=None, help="how many at once: speed and memory, not results (24)"),
        },
    ),
}
