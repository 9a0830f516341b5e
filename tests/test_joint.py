"""Several source pictures in one instruction: prompts, drawing, server, chat and training; one picture is as ever."""

import base64
import dataclasses
import io
import json
import logging

import pytest
import torch
from PIL import Image, ImageChops
from starlette.testclient import TestClient

from unilip import UniLIP, cli
from unilip.errors import ConfigError, UniLIPError
from unilip.pipeline import UniLIPPipeline
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
    assert apart(tiny_model.edit([a], "make it red", generator=0, **QUICK).images[0], plain) == 0
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
    for images, joint in ((list(pair), "yes"), (pair[0], True), ([pair[0]], True)):
        with pytest.raises(UniLIPError, match="joint"):
            taught.edit(images, "x", joint=joint, **QUICK)


def test_the_command_and_the_pipeline_know_it(tiny_model, tiny_folder, pair, tmp_path, monkeypatch, capsys):
    expected = tiny_model.edit(list(pair), "make it red", joint=True, generator=3, **QUICK).images[0]
    made = UniLIPPipeline(tiny_model)("make it red", list(pair), joint=True, generator=3, num_inference_steps=1).images
    assert len(made) == 1 and apart(made[0], expected) == 0
    monkeypatch.chdir(tmp_path)
    for name, image in zip("ab", pair, strict=True):
        image.save(f"{name}.png")
    lines = [{"prompt": "make it red", "seed": 3}, {"prompt": "make it red", "seed": 3, "image": ["b.png", "a.png"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    always = ["--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--joint", "--json"]

    def run(*words):
        code = cli.main(["edit", *words, *always])
        return code, *capsys.readouterr()

    code, out, err = run("a.png", "b.png", "make it red", "--seed", "2", "--num-images", "2")
    found = json.loads(out)["images"]
    assert code == 0 and "not learned" in err and [one["seed"] for one in found] == [2, 3]
    assert found[0]["image"] == "a.png" and found[0]["others"] == ["b.png"]
    assert apart(Image.open(found[1]["path"]), expected) <= 1
    found = json.loads(run("a.png", "b.png", "--prompts", "p.jsonl")[1])["images"]
    assert apart(Image.open(found[0]["path"]), expected) <= 1 and found[1]["image"] == "b.png"
    assert apart(Image.open(found[1]["path"]).resize(expected.size), expected) > 1
    (tmp_path / "odd.jsonl").write_text('{"prompt": "x", "image": []}')
    bad = {
        "has several pictures": ["a.png", "x"], "There is no image": ["x"], "no image file": ["a.png", "c.png", "x"],
        "image tokens": ["a.png"] * 300 + ["x"], "image is not understood": ["--prompts", "odd.jsonl"],
    }  # fmt: skip
    for message, words in bad.items():
        code, out, err = run(*words)
        assert code == 2 and message in err and not out, message


def test_server_and_chat(fresh_model, tiny_model, pair):
    model = fresh_model(sampling=dataclasses.replace(tiny_model.config.sampling, joint=True))
    expected = tiny_model.edit(list(pair), "make it red", joint=True, generator=3, **QUICK).images[0]
    chat = tiny_model.chat(seed=3, joint=True, **QUICK)
    assert apart(chat("make it red", list(pair)).images[0], expected) == 0
    assert len(chat("make it blue").images) == 1, "of the one picture that there is now"
    assert [len(one.chat(**QUICK)("make it red", list(pair)).images) for one in (model, tiny_model)] == [1, 2]

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
        mask = ("mask", packed(Image.new("RGBA", pair[0].size)))
        several = [*files, mask]
        for joint, sent, status in (("true", files[:1], 400), ("false", several, 400), ("", several, 200)):
            answer = client.post("/v1/images/edits", data=form | {"joint": joint}, files=sent)
            assert answer.status_code == status, answer.text
        urls = [f"data:image/png;base64,{base64.b64encode(packed(one)).decode()}" for one in pair]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        said = [{"role": "user", "content": [*parts, {"type": "text", "text": "make it red"}]}]
        for joint, count in ((None, 1), (False, 2)):
            body = {"messages": said, "steps": 1, "seed": 3, "modalities": ["image"], "joint": joint}
            answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            assert len(answer["images"]) == count
    with Engine(tiny_model) as engine:
        client = TestClient(create_app(engine, Settings("tiny", Rules(rate_limit=0))), base_url="http://localhost")
        for joint, count, warning in (("", 2, "by itself"), ("true", 1, "not learned"), ("false", 2, "")):
            found = client.post("/v1/images/edits", data=form | {"joint": joint}, files=files).json()
            assert len(found["data"]) == count and warning in found.get("unilip", {}).get("warning", "")
            assert bool(warning) == ("warning" in found.get("unilip", {}))


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
