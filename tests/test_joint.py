"""Several source pictures in one instruction: prompts, drawing, server, chat and training; one picture is as ever."""

import base64
import dataclasses
import io
import logging

import pytest
import torch
from PIL import Image, ImageChops
from starlette.testclient import TestClient

from unilip import UniLIP
from unilip.errors import ConfigError, UniLIPError
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
from unilip.serve.jobs import Edit
from unilip.train.build import make_batches
from unilip.train.loop import train

QUICK = {"num_inference_steps": 1, "progress": False}


def apart(a, b):
    assert a.size == b.size
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b).getextrema())


@pytest.fixture
def pair(picture):
    return picture(60, 60, 1), picture(90, 45, 2)


def test_a_prompt_has_a_block_for_each_picture(tiny_model):
    processor = tiny_model.processor
    one, two = processor.edit_text("x", 4), processor.edit_text("x", [4, 2])
    assert processor.ids(one) == processor.ids(processor.edit_text("x", [4]))
    assert processor.tokenize([two]).image_slots.sum() == 6
    start = processor.tokenizer.token_id("<img>")
    assert processor.ids(two).count(start) == processor.ids(one).count(start) + 1


def test_both_pictures_are_read_and_one_is_as_ever(tiny_model, pair):
    a, b = pair
    plain = tiny_model.edit(a, "make it red", generator=0, **QUICK).images[0]
    assert apart(tiny_model.edit([a], "make it red", joint=True, generator=0, **QUICK).images[0], plain) == 0
    how = {"joint": True, "guidance_scale": 1.0, "output_type": "latent", "solver": "euler", **QUICK}
    both = tiny_model.edit([a, b], "make it red", generator=0, **how).images
    assert both.shape[0] == 1
    assert not torch.equal(both, tiny_model.edit([a, a], "make it red", generator=0, **how).images), "all are read"
    features, processor = [tiny_model.encode(one) for one in (a, b)], tiny_model.processor
    tokens = processor.tokenize([processor.edit_text("make it red", [one.shape[1] for one in features])])
    noise = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = tiny_model.condition(tokens, torch.cat(features, 1))
        expected = noise - tiny_model.dit(noise, torch.tensor([1000.0]), *condition)
    assert torch.allclose(both, expected, atol=1e-3)
    several = tiny_model.edit([a, b], ["make it red", "x"], generator=[0, 0], **how).images
    assert len(several) == 2 and torch.allclose(several[:1], both, atol=1e-4)


def test_what_was_not_taught_is_said_and_too_much_refused(tiny_model, fresh_model, pair, caplog):
    with caplog.at_level(logging.WARNING, "unilip"):
        tiny_model.edit(list(pair), "x", joint=True, **QUICK)
        assert "not learned from edits of several pictures" in caplog.text
        caplog.clear()
        taught = fresh_model(sampling=dataclasses.replace(tiny_model.config.sampling, joint=True))
        taught.edit(list(pair), "x", joint=True, **QUICK)
        assert not caplog.text
    with pytest.raises(UniLIPError, match=r"300 pictures have .* image tokens.*at most .*fewer pictures"):
        taught.edit([pair[0]] * 300, "x", joint=True, **QUICK)
    with pytest.raises(UniLIPError, match="joint"):
        taught.edit(list(pair), "x", joint="yes", **QUICK)


def test_server_and_chat(fresh_model, tiny_model, pair):
    model = fresh_model(sampling=dataclasses.replace(tiny_model.config.sampling, joint=True))
    expected = tiny_model.edit(list(pair), "make it red", joint=True, generator=3, **QUICK).images[0]
    chat = tiny_model.chat(seed=3, joint=True, **QUICK)
    assert apart(chat("make it red", list(pair)).images[0], expected) == 0

    def packed(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    with Engine(model) as engine:
        job = Edit(pair[0], "make it red", steps=1, seed=3, count=2, others=pair[1:])
        assert apart(engine.submit(job).result(60).images[0], expected) <= 1
        with pytest.raises(UniLIPError, match="at most 16"):
            engine.submit(Edit(pair[0], "x", others=(pair[0],) * 16))
        client = TestClient(create_app(engine, Settings("tiny", Rules(rate_limit=0))), base_url="http://localhost")
        form = {"prompt": "make it red", "steps": 1, "seed": 3, "size": "56x56"}
        files = [("image[]", packed(one)) for one in pair]
        found = client.post("/v1/images/edits", data=form, files=files).json()["data"]
        assert len(found) == 1, "a model that learned it does so unasked"
        assert apart(Image.open(io.BytesIO(base64.b64decode(found[0]["b64_json"]))), expected) <= 1
        assert len(client.post("/v1/images/edits", data=form | {"joint": "false"}, files=files).json()["data"]) == 2
        urls = [f"data:image/png;base64,{base64.b64encode(packed(one)).decode()}" for one in pair]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        said = [{"role": "user", "content": [*parts, {"type": "text", "text": "make it red"}]}]
        for joint, count in ((None, 1), (False, 2)):
            body = {"messages": said, "steps": 1, "seed": 3, "modalities": ["image"], "joint": joint}
            answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            assert len(answer["images"]) == count


def test_training_teaches_it(tiny_model, tiny_folder, tmp_path):
    given = override(
        get_recipe("tiny/shapes"),
        ["data.shapes=", "data.joint=0.5", "data.edit_share=0.7", "objective.drop_prompt=0.3"],
    )
    batches, plain = (
        make_batches(one, tiny_model.config, tiny_model.processor) for one in (given, override(given, ["data.joint=0"]))
    )
    kinds = []
    for index in range(16):
        batch, same = batches[index], plain[index]
        kinds.append(len(batch.get("sources", ())) // len(batch["targets"]))
        if kinds[-1] == 2:
            slots = tiny_model.processor.num_image_tokens * 2
            assert batch["prompts"].image_slots.sum(1).tolist() == [slots] * len(batch["targets"])
        else:
            assert torch.equal(batch["targets"], same["targets"]), "the others stay"
    assert set(kinds) == {0, 1, 2}
    settings = [f"init=all={tiny_folder}", "steps=4", "sample_every=1", "name=a/joint"]
    final = train(override(given, settings), tmp_path, progress=False)
    assert UniLIP.from_pretrained(final).config.sampling.joint
    more = override(get_recipe("tiny/sft"), [f"init=all={final}", "steps=1", "name=a/more"])
    assert UniLIP.from_pretrained(train(more, tmp_path, progress=False)).config.sampling.joint, "and stays learned"
    for words in ("data.edit_share=0", "objective.bind=0.1", "data.source=files", "data.joint=2"):
        with pytest.raises(ConfigError):
            override(given, [words, "data.path=x"])
