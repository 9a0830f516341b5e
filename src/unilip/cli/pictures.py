"""The verbs that use a model: generate, edit, ask, reconstruct."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip.cli.options import Options
from unilip.cli.terminal import Destination, Request, bar, describe_model, load, plural, requests, say, sides, slug

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
    of_steps = o.progress and len(work) <= o.batch_size  # a single batch has the bar of its steps, see `shown`
    for batch in shown(o, work):
        output = draw(batch, settings | {"progress": of_steps})
        for i, (request, image) in enumerate(zip(batch, output.images, strict=True)):
            named: dict[str, Any] = {"prompt": request.text, "seed": request.seed}
            named |= {"image": request.images[0]} if request.images else {}
            named |= {"others": list(request.images[1:])} if request.images[1:] else {}
            if output.plans:
                named["plan"] = output.plans[i]
                say(f"planned: {output.plans[i]}" if output.plans[i] != request.text else "drawn as written")
            words = [*(Path(path).stem for path in request.images[:1]), slug(request.text), str(request.seed)]
            path = out.write(image, words, {"model": about["model"], **named, **settings})
            made.append({"path": str(path), **named})
            o.report.line(path)
    steps = settings["num_inference_steps"]
    o.report.end(f"{plural(len(made), 'picture')} of {plural(steps, 'step')}", images=made)


def sampling(o: Options, model: UniLIP) -> dict[str, Any]:
    """The settings of `generate` and `edit`, the model's own where none are given."""
    from unilip.fast.loop import Settings

    given = {"num_inference_steps": o.steps, "guidance_scale": o.guidance_scale, "solver": o.solver}
    settings = Settings.of(model.config, o.preset, **given)
    return {
        "preset": o.preset,
        **{name: getattr(settings, name) for name in given},
        "negative_prompt": o.negative_prompt,
        **({"best_of": o.best_of} if getattr(o, "best_of", 1) > 1 else {}),
        **sides(o),
    }


def tell_unread(o: Options, model: UniLIP, work: Work) -> None:
    """Say which words a model of a small world never read: it takes them for others."""
    find = getattr(model.processor and model.processor.tokenizer, "unread", None)
    words = list(dict.fromkeys(word for r in work for word in find(r.text))) if find else []
    if words:
        o.report.record["unread"] = words
        say(f"never read in training: {', '.join(words[:10])}{' ...' if len(words) > 10 else ''}")


def shown(o: Options, work: Sequence[Any], unit: str = "picture") -> Iterator[Sequence[Any]]:
    """Yield batches under a bar over all that is to be done, if there are several."""
    with bar(o.progress and len(work) > o.batch_size, unit, len(work)) as progress:
        for start in range(0, len(work), o.batch_size):
            batch = work[start : start + o.batch_size]
            yield batch
            progress(start + len(batch), len(work))


def prepared(o: Options, what: str, image: str, joint: bool = False) -> tuple[Work, Destination]:
    """Return each request --num-images times, with seeds that count up, and where pictures go; all is checked."""
    found = requests(o, what, image, joint)
    work = [r._replace(seed=r.seed + i) for r in found for i in range(o.num_images)]
    sides(o)
    o.negative_prompt = (o.negative_prompt or "").strip() or None  # as everywhere, an empty one is none
    if o.negative_prompt:
        from unilip.sampling import check_prompt

        check_prompt(o.negative_prompt, "negative prompt")
    return work, Destination(o, len(work))


def generate(o: Options) -> None:
    """Draw pictures from words."""
    work, out = prepared(o, "prompt", "never")
    model = load(o, *(["encoder"] if o.best_of > 1 else []), "mllm", "connector", "dit", "pixel_decoder")

    def draw(batch: Work, settings: dict[str, Any]) -> ImageOutput:
        return model.generate(
            [r.text for r in batch], generator=[r.seed for r in batch],
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
        for sources, together in itertools.groupby(batch, lambda r: r.images if o.joint else None):
            same = list(together)
            images += model.edit(
                list(sources or [r.images[0] for r in same]), [r.text for r in same], joint=o.joint, fit=o.fit,
                keep_aspect=o.keep_aspect, generator=[r.seed for r in same], **settings,
            ).images  # fmt: skip
        return ImageOutput(images)

    paint(o, model, work, out, draw)


def reconstruct(o: Options) -> None:
    """Encode pictures and draw them again from their features."""
    from unilip.pictures import fit_picture, load_image, picture_psnr, unfit_square

    for word in o.words:
        load_image(word)
    size = sides(o)
    out = Destination(o, len(o.words))
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
            shaped = unfit_square(image, source.size, o.fit) if o.keep_aspect else image
            path = out.write(shaped, [Path(word).stem, "reconstructed"], {"model": about["model"], "image": word})
            made.append({"path": str(path), "image": word, "psnr": score, "equal": same})
            o.report.line(path)
    finite = [entry["psnr"] for entry in made if not entry["equal"]]
    mean = sum(finite) / len(finite) if finite else math.inf
    equal = f", and {len(made) - len(finite)} equal to the source, not in the mean" if len(finite) < len(made) else ""
    o.report.end(f"{plural(len(made), 'picture')}, PSNR {mean:.2f} dB{equal}", images=made)


def ask(o: Options) -> None:
    """Answer questions about pictures, or without any."""
    work = requests(o, "question", "maybe", o.together)
    model = load(o, "encoder", "mllm")
    choices = {name: getattr(o, name) for name in ("max_new_tokens", "temperature", "top_p", "max_tiles")}
    o.report.loaded(**describe_model(o, model), settings=choices)
    tell_unread(o, model, work)
    if len(work) == 1 and not o.json:
        only = work[0]
        for piece in model.ask(only.images, only.text, generator=only.seed, stream=True, **choices):
            print(piece, end="", flush=True)
        print()
        return
    answers: list[dict[str, Any]] = []
    if o.temperature:
        o.batch_size = 1  # one generator serves one question
    for batch in shown(o, work, "question"):
        images, texts = [request.images for request in batch], [request.text for request in batch]
        said = model.ask(images, texts, generator=batch[0].seed, **choices)
        for request, answer in zip(batch, said, strict=True):
            answers.append({"images": request.images, "question": request.text, "answer": answer})
            one_line = (" ".join(text.split()) for text in (request.text, answer))
            o.report.line("\t".join([",".join(request.images) or "-", *one_line]))
    o.report.end(answers=answers)
