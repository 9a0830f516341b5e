"""The verbs that use a model: generate, edit, ask, reconstruct."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip import __version__
from unilip.cli.options import DRAWING, LOADING, SAVING, TELLING, WRITING, Options, Verb
from unilip.cli.terminal import (
    Destination,
    Report,
    Request,
    batches,
    describe_model,
    load,
    plural,
    requests,
    sampling,
    seeded,
    slug,
)

if TYPE_CHECKING:
    from unilip.model import UniLIP


def paint(
    o: Options, report: Report, model: UniLIP, work: Sequence[Request], out: Destination,
    draw: Callable[[Sequence[Request], dict[str, Any]], Sequence[Any]],
) -> int:  # fmt: skip
    """Draw the pictures of all requests in batches, write each as soon as it is there, and report."""
    settings, about = sampling(o, model), describe_model(o, model)
    report.record |= {**about, "settings": settings}
    made = []
    for batch in batches(work, o.batch_size):
        for request, image in zip(batch, draw(batch, settings), strict=True):
            named = {"prompt": request.text, "seed": request.seed} | ({"image": request.image} if request.image else {})
            texts = {"Software": f"unilip {__version__}", "model": about["model"], **named, **settings}
            stem = f"{Path(request.image).stem}-{slug(request.text)}" if request.image else slug(request.text)
            kept = {key: str(value) for key, value in texts.items() if value is not None} if o.metadata else {}
            path = out.write(image, f"{stem}-{request.seed}", kept)
            made.append({"path": str(path), **named})
            report.line(str(path))
    steps = settings["num_inference_steps"]
    report.end(f"{plural(len(made), 'picture')} of {plural(steps, 'step')}", images=made)
    return 0


def each_image(o: Options, found: Sequence[Request]) -> list[Request]:
    """Repeat every request --num-images times, with seeds that count up."""
    return [Request(r.text, r.image, r.seed + i) for r in found for i in range(o.num_images)]


def check_negative(o: Options) -> None:
    """Complain about a negative prompt before the model is loaded."""
    if o.negative_prompt is not None:
        from unilip.sampling import check_prompt

        check_prompt(o.negative_prompt, "negative prompt")


def generate(o: Options) -> int:
    """Draw pictures from words."""
    report = Report(o, "generate")
    work = each_image(o, requests(o, "prompt", "never"))
    check_negative(o)
    out = Destination(o.output, o.force, len(work))
    model = load(o, "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Sequence[Request], settings: dict[str, Any]) -> Sequence[Any]:
        generators = [seeded(r.seed) for r in batch]
        texts = [r.text for r in batch]
        images: list[Any] = model.generate(texts, generator=generators, progress=o.progress, **settings).images
        return images

    return paint(o, report, model, work, out, draw)


def edit(o: Options) -> int:
    """Change pictures as told."""
    report = Report(o, "edit")
    work = each_image(o, requests(o, "instruction", "always"))
    check_negative(o)
    out = Destination(o.output, o.force, len(work))
    model = load(o, "encoder", "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Sequence[Request], settings: dict[str, Any]) -> Sequence[Any]:
        sources = [r.image or "" for r in batch]
        images: list[Any] = model.edit(
            sources, [r.text for r in batch], generator=[seeded(r.seed) for r in batch], progress=o.progress,
            fit=o.fit, keep_aspect=o.keep_aspect, **settings,  # type: ignore[arg-type]
        ).images  # fmt: skip
        return images

    return paint(o, report, model, work, out, draw)


def reconstruct(o: Options) -> int:
    """Encode pictures and draw them again from their features."""
    report = Report(o, "reconstruct")
    from unilip.pictures import fit_square, load_image, unfit_square

    for word in o.words:
        load_image(word)
    out = Destination(o.output, o.force, len(o.words))
    model = load(o, "encoder", "latent_head", "pixel_decoder")
    from unilip.pictures import picture_psnr

    size = o.image_size or model.config.image_size
    about = describe_model(o, model)
    report.record |= {**about, "settings": {"image_size": size, "fit": o.fit, "keep_aspect": o.keep_aspect}}
    made = []
    for batch in batches(o.words, o.batch_size):
        sources = [load_image(word) for word in batch]
        squares = [fit_square(source, size, o.fit) for source in sources]  # type: ignore[arg-type]
        for word, source, square, image in zip(
            batch, sources, squares, model.reconstruct(squares, image_size=size).images, strict=True
        ):
            score = picture_psnr(square, image)
            texts = {"Software": f"unilip {__version__}", "model": about["model"], "image": word} if o.metadata else {}
            shaped = unfit_square(image, source.size, o.fit) if o.keep_aspect else image  # type: ignore[arg-type]
            path = out.write(shaped, f"{Path(word).stem}-reconstructed", texts)
            made.append({"path": str(path), "image": word, "psnr": round(score, 3)})
            report.line(str(path))
    mean = sum(entry["psnr"] for entry in made) / len(made)
    report.end(f"{plural(len(made), 'picture')}, PSNR {mean:.2f} dB,", images=made)
    return 0


def ask(o: Options) -> int:
    """Answer questions about pictures, or without any."""
    report = Report(o, "ask")
    found = requests(o, "question", "maybe")
    groups: list[tuple[list[str], Request]] = [([r.image] if r.image else [], r) for r in found]
    if o.together:
        seen: dict[str, list[str]] = {}
        for request in found:
            seen.setdefault(request.text, []).extend([request.image] if request.image else [])
        groups = [(images, Request(text, None, o.seed)) for text, images in seen.items()]
    model = load(o, "encoder", "mllm")
    choices = {
        "max_new_tokens": o.max_new_tokens,
        "temperature": o.temperature,
        "top_p": o.top_p,
        "max_tiles": o.max_tiles,
    }
    report.record |= {**describe_model(o, model), "settings": choices}
    if len(groups) == 1 and not o.json:
        images, request = groups[0]
        for piece in model.ask(images, request.text, generator=seeded(request.seed), stream=True, **choices):  # type: ignore[arg-type]
            print(piece, end="", flush=True)
        print()
        return 0
    answers: list[dict[str, Any]] = []
    for batch in batches(groups, 1 if o.temperature else o.batch_size):  # one generator serves one question
        pictures, texts = [images for images, _ in batch], [request.text for _, request in batch]
        generator = seeded(batch[0][1].seed)
        for (images, request), answer in zip(
            batch, model.ask(pictures, texts, generator=generator, **choices), strict=True  # type: ignore[arg-type]
        ):  # fmt: skip
            answers.append({"images": images, "question": request.text, "answer": answer})
            report.line("\t".join([",".join(images) or "-", request.text, answer]))
    report.end(answers=answers)
    return 0


VERBS: dict[str, Verb] = {
    "generate": Verb(
        generate,
        "[OPTIONS] PROMPT",
        "Draw pictures from words. Every file is named after its prompt and seed.",
        'unilip generate "three yellow stars"\n'
        'unilip generate "a blue car" --num-images 4 --seed 7 --output pictures/\n'
        "unilip generate --prompts prompts.txt --output pictures --json",
        ("--prompts", *DRAWING, "--seed", *WRITING, *LOADING, *SAVING, "--compile", *TELLING),
        (0, math.inf),
    ),
    "edit": Verb(
        edit,
        "[OPTIONS] IMAGE [IMAGE ...] INSTRUCTION",
        "Change pictures as told. One instruction is followed on every image.",
        'unilip edit car.png "change the color of the car to blue"\n'
        'unilip edit wide.jpg "change the background to pink" --fit pad --keep-aspect --output pink.png',
        ("--prompts", *DRAWING, "--fit", "--keep-aspect", "--seed", *WRITING, *LOADING, *SAVING, "--compile", *TELLING),
        (0, math.inf),
    ),
    "ask": Verb(
        ask,
        "[OPTIONS] [IMAGE ...] QUESTION",
        "Answer a question about pictures. Each image is asked about by itself; without one only the words count.",
        'unilip ask cat.png "What is this?"\nunilip ask a.png b.png "How many stars are there?" --json',
        (
            "--prompts",
            "--together",
            "--max-new-tokens",
            "--temperature",
            "--top-p",
            "--max-tiles",
            "--batch-size",
            "--seed",
            *LOADING,
            *SAVING,
            *TELLING,
        ),
        (0, math.inf),
        {"--seed": dict(help="of sampled answers, at a temperature above 0 (0)")},
    ),
    "reconstruct": Verb(
        reconstruct,
        "[OPTIONS] IMAGE [IMAGE ...]",
        "Encode pictures to CLIP features and draw them again. What is lost is what the encoder does not know.",
        "unilip reconstruct photo.jpg --output again.png",
        ("--batch-size", "--image-size", "--fit", "--keep-aspect", *WRITING, *LOADING, *SAVING, *TELLING),
        (1, math.inf),
    ),
}
