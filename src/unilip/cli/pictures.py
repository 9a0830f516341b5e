"""The verbs that use a model: generate, edit, ask, reconstruct."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip import __version__
from unilip.cli.options import Options
from unilip.cli.terminal import Destination, Request, describe_model, load, plural, requests, sampling, say, sides, slug

if TYPE_CHECKING:
    from unilip.model import ImageOutput, UniLIP

Work = Sequence[Request]


def paint(
    o: Options, model: UniLIP, work: Work, out: Destination, draw: Callable[[Work, dict[str, Any]], ImageOutput]
) -> None:
    """Draw the pictures of all requests in batches, write each as soon as it is there, and report."""
    settings, about = sampling(o, model), describe_model(o, model)
    o.report.loaded(**about, settings=settings)
    tell_unread(o, model, work)
    made = []
    for batch in shown(o, work):
        output = draw(batch, settings)
        for i, (request, image) in enumerate(zip(batch, output.images, strict=True)):
            named = {"prompt": request.text, "seed": request.seed} | ({"image": request.image} if request.image else {})
            named |= {"others": list(request.others)} if request.others else {}
            if output.plans:
                named["plan"] = output.plans[i]
                say(f"planned: {output.plans[i]}" if output.plans[i] != request.text else "drawn as written")
            texts = {"Software": f"unilip {__version__}", "model": about["model"], **named, **settings}
            source = [Path(request.image).stem] if request.image else []
            kept = {key: str(value) for key, value in texts.items() if value is not None} if o.metadata else {}
            path = out.write(image, out.name(*source, slug(request.text), str(request.seed)), kept)
            made.append({"path": str(path), **named})
            o.report.line(path)
    steps = settings["num_inference_steps"]
    o.report.end(f"{plural(len(made), 'picture')} of {plural(steps, 'step')}", images=made)


def tell_unread(o: Options, model: UniLIP, work: Work) -> None:
    """Say which words a model of a small world never read: it takes them for others."""
    tokenizer = model.processor.tokenizer if model.processor else None
    find = getattr(tokenizer, "unread", None)
    words = list(dict.fromkeys(word for r in work for word in find(r.text))) if find else []
    if words:
        o.report.record["unread"] = words
        say(f"never read in training: {', '.join(words[:10])}{' ...' if len(words) > 10 else ''}")


def shown(o: Options, work: Sequence[Any], unit: str = "picture") -> Iterator[Sequence[Any]]:
    """Yield batches under a bar over all that is to be done; a single batch has the bar of its steps instead."""
    from tqdm.auto import tqdm

    disable = True if not o.progress or bar_of_steps(o, work) else None
    with tqdm(total=len(work), unit=unit, leave=False, disable=disable) as bar:
        for start in range(0, len(work), o.batch_size):
            batch = work[start : start + o.batch_size]
            yield batch
            bar.update(len(batch))


def bar_of_steps(o: Options, work: Sequence[Any]) -> bool:
    """Whether the steps of a batch have a bar."""
    return o.progress and len(work) <= o.batch_size


def prepared(o: Options, what: str, image: str, joint: bool = False) -> tuple[Work, Destination]:
    """Return each request --num-images times, with seeds that count up, and where pictures go; all is checked."""
    found = requests(o, what, image, joint)
    work = [dataclasses.replace(r, seed=r.seed + i) for r in found for i in range(o.num_images)]
    sides(o)
    o.negative_prompt = (o.negative_prompt or "").strip() or None  # as everywhere, an empty one is none
    if o.negative_prompt:
        from unilip.sampling import check_prompt

        check_prompt(o.negative_prompt, "negative prompt")
    return work, Destination(o.output, o.force, len(work))


def generate(o: Options) -> None:
    """Draw pictures from words."""
    work, out = prepared(o, "prompt", "never")
    model = load(o, *(["encoder"] if o.best_of > 1 else []), "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Work, settings: dict[str, Any]) -> ImageOutput:
        return model.generate(
            [r.text for r in batch], generator=[r.seed for r in batch], progress=bar_of_steps(o, work),
            plan={"yes": True, "no": False}.get(o.plan, "auto"), **settings,
        )  # fmt: skip

    paint(o, model, work, out, draw)


def edit(o: Options) -> None:
    """Change pictures as told."""
    work, out = prepared(o, "instruction", "always", o.joint)
    model = load(o, "encoder", "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Work, settings: dict[str, Any]) -> ImageOutput:
        from unilip.model import ImageOutput

        images: list[Any] = []
        for sources, together in itertools.groupby(batch, lambda r: (r.image, *r.others) if o.joint else None):
            same = list(together)
            images += model.edit(
                list(sources or [r.image or "" for r in same]), [r.text for r in same], joint=o.joint, fit=o.fit,
                keep_aspect=o.keep_aspect, progress=bar_of_steps(o, work), generator=[r.seed for r in same], **settings,
            ).images  # fmt: skip
        return ImageOutput(images)

    paint(o, model, work, out, draw)


def reconstruct(o: Options) -> None:
    """Encode pictures and draw them again from their features."""
    from unilip.pictures import fit_picture, load_image, picture_psnr, unfit_square

    for word in o.words:
        load_image(word)
    size = sides(o)
    out = Destination(o.output, o.force, len(o.words))
    model = load(o, "encoder", "latent_head", "pixel_decoder")
    about = describe_model(o, model)
    o.report.loaded(**about, settings={**size, "fit": o.fit, "keep_aspect": o.keep_aspect})
    made = []
    for batch in shown(o, o.words):
        sources = [load_image(word) for word in batch]
        drawn = model.reconstruct(sources, fit=o.fit, **size).images
        for word, source, image in zip(batch, sources, drawn, strict=True):
            seen = fit_picture(source, image.size, o.fit)
            same = seen.tobytes() == image.tobytes()
            score = None if same else round(picture_psnr(seen, image), 3)
            texts = {"Software": f"unilip {__version__}", "model": about["model"], "image": word} if o.metadata else {}
            shaped = unfit_square(image, source.size, o.fit) if o.keep_aspect else image
            path = out.write(shaped, out.name(Path(word).stem, "reconstructed"), texts)
            made.append({"path": str(path), "image": word, "psnr": score, "equal": same})
            o.report.line(path)
    finite = [entry["psnr"] for entry in made if not entry["equal"]]
    mean = sum(finite) / len(finite) if finite else math.inf
    equal = f", and {len(made) - len(finite)} equal to the source, not in the mean" if len(finite) < len(made) else ""
    o.report.end(f"{plural(len(made), 'picture')}, PSNR {mean:.2f} dB{equal}", images=made)


def ask(o: Options) -> None:
    """Answer questions about pictures, or without any."""
    found = requests(o, "question", "maybe")
    groups: list[tuple[list[str], Request]] = [([r.image] if r.image else [], r) for r in found]
    if o.together:
        seen: dict[str, list[str]] = {}
        for request in found:
            seen.setdefault(request.text, []).extend([request.image] if request.image else [])
        groups = [(images, Request(text, None, o.seed)) for text, images in seen.items()]
    model = load(o, "encoder", "mllm")
    choices = {name: getattr(o, name) for name in ("max_new_tokens", "temperature", "top_p", "max_tiles")}
    o.report.loaded(**describe_model(o, model), settings=choices)
    tell_unread(o, model, found)
    if len(groups) == 1 and not o.json:
        images, request = groups[0]
        for piece in model.ask(images, request.text, generator=request.seed, stream=True, **choices):
            print(piece, end="", flush=True)
        print()
        return
    answers: list[dict[str, Any]] = []
    if o.temperature:
        o.batch_size = 1  # one generator serves one question
    for batch in shown(o, groups, "question"):
        pictures, texts = [images for images, _ in batch], [request.text for _, request in batch]
        said = model.ask(pictures, texts, generator=batch[0][1].seed, **choices)
        for (images, request), answer in zip(batch, said, strict=True):
            answers.append({"images": images, "question": request.text, "answer": answer})
            one_line = (" ".join(text.split()) for text in (request.text, answer))
            o.report.line("\t".join([",".join(images) or "-", *one_line]))
    o.report.end(answers=answers)
