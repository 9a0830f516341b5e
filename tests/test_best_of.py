"""The best of several pictures is the one in which the model itself most surely sees the prompt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from unilip import cli
from unilip.errors import UniLIPError
from unilip.model import UniLIP
from unilip.pictures import normalise
from unilip.sampling import SEEN
from unilip.serve.engine import Engine, Generate

PROMPTS = ["a red star", "two long green trains on a hill."]


def draw(model: UniLIP, prompt: Any = PROMPTS, generator: Any = (3, 4), **settings: Any) -> Tensor:
    settings = {"num_inference_steps": 2, "output_type": "latent", "progress": False, **settings}
    chosen = list(generator) if isinstance(generator, tuple) else generator
    images: Tensor = model.generate(prompt, generator=chosen, **settings).images
    return images


@torch.no_grad()
def surest(model: UniLIP, prompt: str, latents: Tensor) -> int:
    """Which of latents the model likes best, one by one, by `ask`'s own prompt."""
    processor, found = model.processor, []
    assert processor is not None
    for latent in latents:
        features = model.features(normalise(model.from_latent(latent[None])))
        from unilip.method.text import Message

        tokens = processor.tokenize([processor.chat_text([Message("user", SEEN.format(prompt.rstrip(".")), (1,))])])
        hidden = model.mllm(model.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask)
        odds = model.mllm.logits(hidden[:, -1]).softmax(-1)[0]
        yes, no = ({processor.ids(word)[0] for word in words} for words in (("yes", "Yes"), ("no", "No")))
        found.append(float(odds[sorted(yes)].sum() / odds[sorted(no)].sum()))
    return int(torch.tensor(found).argmax())


def test_the_surest_of_a_generators_pictures_is_kept(tiny_model: UniLIP) -> None:
    """The same alone and in a batch, by seed; the first candidate is the picture that comes without a choice."""
    candidates = torch.stack(
        [draw(tiny_model, p, s, num_images_per_prompt=4) for p, s in zip(PROMPTS, (3, 4), strict=True)]
    )
    wanted = [surest(tiny_model, prompt, rows) for prompt, rows in zip(PROMPTS, candidates, strict=True)]
    assert set(wanted) != {0}, "a choice that matters"
    kept = draw(tiny_model, best_of=4)
    for i, (rows, chosen) in enumerate(zip(candidates, wanted, strict=True)):
        torch.testing.assert_close(kept[i], rows[chosen], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(draw(tiny_model, PROMPTS[i], 3 + i, best_of=4)[0], kept[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(draw(tiny_model, PROMPTS[i], 3 + i)[0], rows[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(draw(tiny_model, best_of=1), draw(tiny_model))
    assert len(draw(tiny_model, "a dog", 1, num_images_per_prompt=3, best_of=2)) == 3
    assert draw(tiny_model, "a dog", 1, width=84, height=56, best_of=2).shape == (1, 32, 2, 3)


def test_the_server_keeps_the_best(tiny_model: UniLIP) -> None:
    expected = tiny_model.generate("a dog", generator=7, num_inference_steps=2, best_of=3, progress=False)[0]
    with Engine(tiny_model) as engine:
        jobs = [Generate("a dog", seed=7, steps=2, best_of=3), Generate("a cat", seed=8, steps=2, best_of=3)]
        tickets = [engine.submit(job) for job in jobs]
        done, _ = (ticket.result() for ticket in tickets)
        assert done.images[0].tobytes() == expected.tobytes() and done.settings["best_of"] == 3
        for wrong in (Generate("a", best_of=0), Generate("a", best_of=99), Generate("a", best_of=2, partials=1)):
            with pytest.raises(UniLIPError, match="best_of"):
                engine.submit(wrong)


def test_the_command_line_and_what_is_refused(
    tiny_model: UniLIP, tiny_folder: Path, tmp_path: Path, capsys: Any, fresh_model: Callable[..., UniLIP]
) -> None:
    expected = tiny_model.generate("a dog", generator=7, num_inference_steps=2, best_of=3, progress=False)[0]
    words = [
        "generate",
        "a dog",
        "--model",
        str(tiny_folder),
        "--seed",
        "7",
        "--steps",
        "2",
        "--best-of",
        "3",
        "--json",
    ]
    assert cli.main([*words, "--device", "cpu", "--output", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["best_of"] == 3
    assert Image.open(tmp_path / "a.png").convert("RGB").tobytes() == expected.tobytes()
    for wrong in (0, 65, 1.5, "two"):
        with pytest.raises(UniLIPError, match="best_of"):
            draw(tiny_model, best_of=wrong)
    with pytest.raises(UniLIPError, match="leave no choice"):
        draw(tiny_model, "a dog", 1, best_of=2, latents=torch.zeros(1, 32, 2, 2))
    blind = fresh_model(parts=("mllm", "connector", "dit", "pixel_decoder"))
    with pytest.raises(UniLIPError, match="needs encoder"):
        draw(blind, best_of=2)
