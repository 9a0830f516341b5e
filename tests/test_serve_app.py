"""The HTTP application, driven by plain requests and by the official openai client. In: a tiny model. No network."""

import asyncio
import base64
import gc
import io
import json
import sys
import threading
import time

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from unilip.serve import service
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine, Limits
from unilip.serve.guard import Guard, Rules
from unilip.serve.metrics import Metrics

SIZE = 56  # of the tiny model
QUICK = {"steps": 1}
LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model, max_queue=16) as made:
        yield made


def client_for(engine, *, key=None, **settings):
    rules = Rules(**{"rate_limit": 0, **settings.pop("rules", {})})
    app = create_app(engine, Settings("tiny", rules, **settings))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(app, base_url=LOCAL, headers=headers, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(engine):
    return client_for(engine)  # not entered: shutting down would close the shared engine


@pytest.fixture(scope="module")
def strict(engine):
    return client_for(engine, strict=True)


@pytest.fixture(scope="module")
def official(client):
    return openai.OpenAI(api_key="none", base_url=f"{LOCAL}/v1", http_client=client, max_retries=0)


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def packed(image, form="PNG"):
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(packed(image)).decode()


def same(one, other):
    return np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max() <= 1


def refusal(response, status, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and "Traceback" not in response.text
    if code is not None:
        assert error["code"] == code, error
    return error


# --- with the official client -----------------------------------------------------------------------------------------


def test_the_official_client_draws(official, tiny_model):
    import torch

    found = official.images.generate(
        model="gpt-image-1", prompt="three stars", n=2, size="auto", extra_body={"seed": 7, "steps": 2, "guidance": 2.0}
    )
    expected = tiny_model.generate(
        ["three stars"] * 2, num_inference_steps=2, guidance_scale=2.0, progress=False,
        generator=[torch.Generator().manual_seed(s) for s in (7, 8)],
    ).images  # fmt: skip
    assert [entry.seed for entry in found.data] == [7, 8]
    assert all(same(opened(e.b64_json), i) for e, i in zip(found.data, expected, strict=True))
    assert found.usage.output_tokens == 2 * (SIZE // 28) ** 2 and found.size == "56x56" and found.usage.input_tokens > 3


def test_sizes_formats_and_metadata(official, client):
    for form in ("png", "jpeg", "webp"):
        found = official.images.generate(
            prompt="a", size="128x128", output_format=form, extra_body={**QUICK, "seed": 3}
        )
        image = opened(found.data[0].b64_json)
        assert image.size == (128, 128) and image.format == form.upper() and found.output_format == form
        noted = image.text if form == "png" else json.loads(image.getexif()[0x010E])
        assert noted["model"] == "tiny" and int(noted["seed"]) == 3
    small, large = (
        official.images.generate(
            prompt="a", output_format="jpeg", output_compression=q, size="512x512", extra_body={**QUICK, "seed": 3}
        ).data[0].b64_json
        for q in (5, 100)
    )  # fmt: skip
    assert len(small) < len(large)


def test_metadata_can_be_switched_off(engine):
    body = {"prompt": "a", **QUICK}
    found = client_for(engine, metadata=False).post("/v1/images/generations", json=body).json()
    assert not opened(found["data"][0]["b64_json"]).text


def test_a_plan_is_drawn_and_told(client, engine):
    body = {"prompt": "a star", "seed": 1, "steps": 2}
    plain, planned = (
        client.post("/v1/images/generations", json=body | {"plan": plan}).json()["data"][0] for plan in (False, True)
    )
    again = client.post("/v1/images/generations", json=body | {"prompt": planned["plan"], "plan": "auto"}).json()
    assert "plan" not in plain and same(opened(planned["b64_json"]), opened(again["data"][0]["b64_json"]))
    assert opened(planned["b64_json"]).text["plan"] == planned["plan"]
    refusal(client.post("/v1/images/generations", json=body | {"plan": "maybe"}), 400)


def test_each_setting_changes_the_picture(client):
    def draw(**more):
        body = {"prompt": "a star", "seed": 1, "steps": 2, **more}
        found = client.post("/v1/images/generations", json=body)
        assert found.status_code == 200, found.text
        return opened(found.json()["data"][0]["b64_json"])

    base = draw()
    assert same(base, draw()) and same(base, draw(seed=1))
    for more in (
        {"seed": 2}, {"steps": 3}, {"guidance": 1.0}, {"solver": "euler"}, {"negative_prompt": "dogs and cats"},
        {"prompt": "a house"},
    ):  # fmt: skip
        assert not np.array_equal(np.asarray(base), np.asarray(draw(**more))), more
    assert draw(image_size=84).size == (84, 84)


@pytest.mark.parametrize(("quality", "steps"), [("low", 8), ("auto", 20), ("hd", 40)])
def test_quality_is_a_number_of_steps(official, quality, steps):
    image = opened(official.images.generate(prompt="a", quality=quality).data[0].b64_json)
    assert int(image.text["num_inference_steps"]) == steps


def test_pictures_by_url(official, client):
    found = official.images.generate(prompt="a", n=2, response_format="url", extra_body={**QUICK, "seed": 4}).data
    got = client.get(found[1].url)
    assert got.status_code == 200 and got.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(got.content)).text["seed"] == "5"
    refusal(client.get("/v1/images/files/nothing"), 404)


def test_pictures_are_forgotten():
    from unilip.serve.store import Store

    store = Store(max_bytes=10)
    first, second = store.put(b"x" * 6, "image/png"), store.put(b"y" * 6, "image/png")
    assert store.get(first) is None and store.get(second) == (b"y" * 6, "image/png")
    assert store.get(store.put(b"z" * 11, "image/png")) is None and store.get(second), "too large for it"
    assert (brief := Store(seconds=0)).get(brief.put(b"x", "image/png")) is None


def test_the_official_client_edits(official, tiny_model, picture):
    import torch

    images = [picture(80, 40, seed=n) for n in range(2)]
    found = official.images.edit(
        image=[("a.png", packed(i)) for i in images], prompt="make it red", n=2,
        extra_body={"seed": 5, "steps": 2, "keep_aspect": "true", "fit": "pad"},
    ).data  # fmt: skip
    expected = [
        tiny_model.edit(
            image, "make it red", num_inference_steps=2, fit="pad", keep_aspect=True, progress=False,
            num_images_per_prompt=2, generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
        ).images
        for image in images
    ]  # fmt: skip
    assert [e.seed for e in found] == [5, 6, 5, 6]
    assert all(same(opened(e.b64_json), i) for e, i in zip(found, [*expected[0], *expected[1]], strict=True))
    single = official.images.edit(image=packed(images[0]), prompt="make it red", extra_body=QUICK)
    assert opened(single.data[0].b64_json).size == (SIZE, SIZE // 2), "the shape of its source"
    square = official.images.edit(image=packed(images[0]), prompt="make it red", size="64x64", extra_body=QUICK)
    assert opened(square.data[0].b64_json).size == (64, 64)


def test_a_mask_keeps_the_outside(official, picture):
    source = picture(90, 60)
    mask = Image.new("RGBA", source.size, "black")
    mask.paste((0, 0, 0, 0), (10, 10, 40, 40))
    found = official.images.edit(image=packed(source), mask=packed(mask), prompt="make it red", extra_body=QUICK)
    image, inside = np.asarray(opened(found.data[0].b64_json)), np.asarray(mask)[..., 3] == 0
    assert (image[~inside] == np.asarray(source)[~inside]).all()
    assert (image[inside] != np.asarray(source)[inside]).any()


def test_masks_that_make_no_sense_are_refused(client, picture):
    source, clear = picture(90, 60), Image.new("RGBA", (90, 60))

    def post(files, **data):
        return client.post("/v1/images/edits", data={"prompt": "a", **QUICK, **data}, files=files)

    image = ("image", packed(source))
    refusal(post([image, ("mask", packed(Image.new("RGBA", (60, 60))))]), 400, "invalid_mask")
    refusal(post([image, ("mask", packed(source))]), 400, "invalid_image")
    refusal(post([image, image, ("mask", packed(clear))]), 400, "invalid_mask")
    refusal(post([image, ("mask", packed(clear)), ("mask", packed(clear))]), 400, "invalid_mask")
    refusal(post([image, ("mask", packed(clear))], fit="crop"), 400, "invalid_mask")
    refusal(post([("mask", packed(clear))]), 400, "invalid_form")


def test_reconstructions(client, tiny_model, picture):
    source = picture(80, 40)
    files = [("image", packed(source)), ("image[]", packed(source, "JPEG"))]
    found = client.post("/v1/images/reconstructions", files=files, data={"keep_aspect": "1", "fit": "pad"}).json()
    expected = tiny_model.reconstruct(source, fit="pad", keep_aspect=True).images[0]
    assert same(opened(found["data"][0]["b64_json"]), expected) and len(found["data"]) == 2
    assert 0 < found["data"][0]["psnr"] < 60


def test_pictures_of_any_shape(official, client, picture):
    def drawn(found):
        return opened(found.b64_json).size, [int(opened(found.b64_json).text[side]) for side in ("width", "height")]

    draw, more = official.images.generate, {**QUICK, "image_size": 112}
    assert drawn(draw(prompt="a", size="1536x1024", extra_body=more).data[0]) == ((1536, 1024), [140, 84])
    assert drawn(draw(prompt="a", size="auto", extra_body=more).data[0]) == ((112, 112), [112, 112])
    wide = packed(picture(160, 100))
    for size, expected in (
        ("auto", ((134, 84), [140, 84])), ("64x128", ((64, 128), [84, 140])), ("90x90", ((90, 90), [112, 112]))
    ):  # fmt: skip
        found = official.images.edit(image=wide, prompt="red", size=size, extra_body=more).data[0]
        assert drawn(found) == expected, size
    post = {"size": "128x64", "image_size": "112"}
    found = client.post("/v1/images/reconstructions", files=[("image", wide)], data=post).json()
    assert found["size"] == "128x64" and opened(found["data"][0]["b64_json"]).size == (128, 64)
    for size in ("0x0", "64", "64x", "-64x64", "99999x64", "8x4096"):
        refusal(client.post("/v1/images/generations", json={"prompt": "a", "size": size}), 400)
        answer = client.post("/v1/images/reconstructions", files=[("image", wide)], data={"size": size})
        refusal(answer, 400)


def test_progress_and_pictures_by_events(official):
    plain = list(official.images.generate(prompt="a", n=2, stream=True, extra_body={"steps": 1}))
    assert [event.type for event in plain] == ["image_generation.completed"] * 2, "events of OpenAI's alone"
    more = {"steps": 3, "seed": 1, "include_progress": True}
    found = list(official.images.generate(prompt="a", n=2, stream=True, extra_body=more))
    kinds = [event.type for event in found]
    assert kinds[-2:] == ["image_generation.completed"] * 2 and set(kinds[:-2]) == {"image_generation.progress"}
    assert found[len(kinds) - 3].step == found[0].steps == 6
    whole = official.images.generate(prompt="a", n=2, extra_body={"steps": 3, "seed": 1})
    assert all(same(opened(a.b64_json), opened(b.b64_json)) for a, b in zip(found[-2:], whole.data, strict=True))


def test_the_official_client_chats(official, tiny_model, picture):
    image = picture(seed=1)
    content = [
        {"type": "text", "text": "How many birds are there?"},
        {"type": "image_url", "image_url": {"url": data_url(image), "detail": "low"}},
    ]
    messages = [{"role": "user", "content": content}]
    found = official.chat.completions.create(model="x", messages=messages, max_tokens=9)
    expected = tiny_model.ask(image, "How many birds are there?", max_new_tokens=9)
    assert found.choices[0].message.content == expected
    assert found.usage.completion_tokens <= 9 and found.choices[0].finish_reason in ("stop", "length")
    chunks = list(
        official.chat.completions.create(
            model="x", messages=messages, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1
    assert chunks[-1].usage == found.usage and chunks[-2].choices[0].finish_reason == found.choices[0].finish_reason


def test_a_conversation_draws_edits_and_answers(official, tiny_model):
    def say(*messages, **more):
        return official.chat.completions.create(
            model="x", messages=list(messages), max_tokens=6, extra_body={"steps": 1, "seed": 3, **more}
        )

    asked = {"role": "user", "content": "Draw two dogs"}
    drawn = say(asked)
    content = drawn.choices[0].message.content
    assert drawn.unilip["verb"] == "generate" and drawn.unilip["seeds"] == [3]
    first = opened(content.partition("base64,")[2].rstrip(")"))
    assert not hasattr(drawn.choices[0].message, "images"), "a picture comes once"
    assert "answer:" in content and "answer:" in drawn.unilip["taken"]
    change = {"role": "user", "content": "Now make them brown"}
    edited = say(asked, {"role": "assistant", "content": content}, change)
    assert edited.unilip["verb"] == "edit"
    # the same with the message as the client's object, and with the picture as a part of its own
    parts = say(asked, modalities=["text", "image"]).choices[0].message
    assert parts.content == "" and opened(parts.images[0]["image_url"]["url"].partition("base64,")[2])
    for message in (drawn.choices[0].message, parts):
        again = say(asked, message.model_dump(), change)
        assert again.choices[0].message.content == edited.choices[0].message.content
    question = {"role": "user", "content": "How many dogs are there?"}
    answer = say(asked, {"role": "assistant", "content": content}, question)
    history = [
        {"role": "user", "content": "Draw two dogs"}, {"role": "assistant", "content": "Here is the picture."},
    ]  # fmt: skip
    expected = tiny_model.ask(first, "How many dogs are there?", history=history, max_new_tokens=6)
    assert answer.unilip["verb"] == "ask" and answer.choices[0].message.content == expected
    link = {"type": "image_url", "image_url": {"url": data_url(first.transpose(Image.Transpose.ROTATE_90))}}
    before = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, link]}
    answer = say(
        before, {"role": "assistant", "content": "a cow"}, asked, {"role": "assistant", "content": content}, question
    )
    history = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a cow"}, *history]
    expected = tiny_model.ask(first, "How many dogs are there?", history=history, max_new_tokens=6)
    assert answer.choices[0].message.content == expected, "about the drawn picture, not about earlier ones"


def test_pictures_come_in_streams_too(official):
    messages = [{"role": "user", "content": "Draw a star"}]
    options = {"include_progress": True}
    stream = official.chat.completions.create(
        model="x", messages=messages, stream=True, stream_options=options, extra_body={"steps": 3, "seed": 3}
    )
    chunks = list(stream)
    assert [c.unilip["step"] for c in chunks if "step" in (getattr(c, "unilip", None) or {})] == [1, 2, 3]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert opened(text.partition("base64,")[2].rstrip(")")).size == (SIZE, SIZE)


def test_modalities_overrule_the_words(client):
    def verb(text, *modalities):
        body = {"messages": [{"role": "user", "content": text}], "steps": 1, "max_tokens": 2}
        found = client.post("/v1/chat/completions", json={**body, **({"modalities": modalities} if modalities else {})})
        return found.json()["unilip"]["verb"]

    assert verb("Draw a star") == "generate" and verb("Draw a star", "text") == "ask"
    assert verb("a star") == "generate" and verb("a star", "text") == "ask"
    assert verb("stars") == "ask" and verb("stars", "image") == "generate" and verb("stars", "text", "image") == "ask"


def test_system_messages_reach_the_model(client, tiny_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]
    found = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5}).json()
    assert found["choices"][0]["message"]["content"] == tiny_model.ask(
        None, "Be brief.\nWhat is this?", max_new_tokens=5
    )


def test_stop_words_end_the_answer(client):
    body = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 12}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:2]
    cut = client.post("/v1/chat/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"
    streamed = client.post("/v1/chat/completions", json={**body, "stop": stop, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == cut["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and streamed.rstrip().endswith("data: [DONE]")


def test_sampled_answers_follow_their_seed(client):
    body = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 12, "temperature": 2.0}

    def say(seed):
        return client.post("/v1/chat/completions", json={**body, "seed": seed}).json()["choices"][0]["message"]

    assert say(1) == say(1) and len({say(n)["content"] for n in range(4)}) > 1


def test_models(official):
    found = official.models.list().data
    assert [m.id for m in found] == ["tiny"] and found[0].abilities == ["generate", "edit", "reconstruct", "ask"]
    assert official.models.retrieve("tiny").image_size == SIZE
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("other")


def test_operation(client):
    assert client.get("/health").json()["status"] == "ok" and client.get("/ready").status_code == 200
    client.post("/v1/images/generations", json={"prompt": "a", **QUICK})
    client.get("/nowhere/at/all")
    page = client.get("/metrics").text
    assert 'unilip_requests_total{route="/v1/images/generations",status="200"}' in page
    assert "unilip_queue_length 0.0" in page and "nowhere" not in page
    assert client.get("/docs").status_code == 200 and "/v1/images/edits" in client.get("/openapi.json").json()["paths"]


def test_batches_are_measured(tiny_model):
    metrics = Metrics()
    with Engine(tiny_model, on_batch=metrics.batch) as engine:
        client = TestClient(create_app(engine, Settings("tiny"), metrics), base_url=LOCAL)
        client.post("/v1/images/generations", json={"prompt": "a", "n": 2, **QUICK})
        engine.drain(10)
        assert 'unilip_batch_size_sum{verb="generate"} 2.0' in client.get("/metrics").text


def test_pictures_that_were_given_up_are_no_results(engine):
    client = client_for(engine)
    for more in ({"n": 2, **QUICK}, {"n": 3, "steps": 200, "deadline": 0.05}, {"stream": True, **QUICK}):
        client.post("/v1/images/generations", json={"prompt": "a", **more})
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    page = client.get("/metrics").text
    assert 'unilip_results_total{verb="generate"} 3.0' in page and 'unilip_results_total{verb="ask"} 1.0' in page


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a" * 8001}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 11}, "n"),
        ({"prompt": "a", "size": "512x8"}, "size"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "size": "9999x9999"}, "size"),
        ({"prompt": "a", "quality": "best"}, "quality"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "steps": 201}, None),
        ({"prompt": "a", "stesp": 3}, "stesp"),
        ({"prompt": "a", "image_size": 57}, None),
        ({"prompt": "a", "image_size": 1400}, None),
        ({"prompt": "a", "background": "transparent"}, "background"),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ({"prompt": "a", "deadline": 0}, "deadline"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "\ud800": 1}, None),
        ({"prompt": "a", "stream": True, "response_format": "url"}, None),
        ([], None),
    ],
)
def test_bad_drawings(strict, body, param):
    data = json.dumps(body)  # ASCII, so that half a surrogate pair can be sent
    error = refusal(
        strict.post("/v1/images/generations", content=data, headers={"Content-Type": "application/json"}), 400
    )
    assert error["param"] == param


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"prompt": NaN}',
        b'{"prompt": "a", "guidance": 1e999}',
        b"null",
        b'"a"',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "guidance": NaN}',
    ],
)
def test_broken_json(client, data):
    refusal(client.post("/v1/images/generations", content=data, headers={"Content-Type": "application/json"}), 400)


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [USER] * 101},
        {"messages": [USER, {"role": "assistant", "content": "hi"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        {"messages": [USER], "n": 2},
        {"messages": [USER], "tools": [{"type": "function"}]},
        {"messages": [USER], "temperature": 3},
        {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"strict": True}}},
        {"messages": [USER], "logprobs": True},
        {"messages": [USER], "max_tokens": 0},
        {"messages": [USER], "modalities": []},
        {"messages": [USER], "stop": list("abcde")},
        {"messages": [{"role": "user", "content": "word " * 600}]},
        {"messages": [{"role": "user", "content": "a" * 9000}]},
        {"messages": [{"role": "system", "content": "\udfff"}, USER]},
    ],
)
def test_bad_conversations(strict, body):
    refusal(
        strict.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}), 400
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "a",
        "",
    ],
)
def test_pictures_from_elsewhere_are_not_fetched(client, url, monkeypatch):
    monkeypatch.setattr(service, "fetch", lambda *a: pytest.fail("it was fetched"))
    content = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]
    refusal(
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}),
        400,
        "invalid_image",
    )


def test_pictures_are_fetched_where_that_is_allowed(engine, picture, monkeypatch):
    monkeypatch.setattr(service, "fetch", lambda url, limit: packed(picture()) if "example" in url else b"")
    allowing = client_for(engine, allow_url_images=True)
    content = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert allowing.post("/v1/chat/completions", json=body).status_code == 200


def test_own_urls_are_read_without_fetching(client):
    url = client.post("/v1/images/generations", json={"prompt": "a", "response_format": "url", **QUICK}).json()["data"][
        0
    ]["url"]
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_bad_forms(strict, picture):
    image = packed(picture())
    post = lambda **more: strict.post("/v1/images/edits", **more)  # noqa: E731
    good = {"prompt": "a", **QUICK}
    refusal(post(json=good), 400, "invalid_form")
    refusal(post(data=good), 400, "invalid_form")
    refusal(post(data=good, files={"picture": image}), 400, "invalid_form")
    refusal(post(data={"image": "text", **good}, files={"mask": image}), 400, "invalid_form")
    refusal(post(data=QUICK, files={"image": image}), 400)
    refusal(post(data={**good, "what": "1"}, files={"image": image}), 400, "extra_forbidden")
    refusal(post(data={"prompt": ["a", "b"]}, files={"image": image}), 400, "invalid_form")
    refusal(post(data=good, files={"image": b""}), 400, "invalid_image")
    refusal(post(data=good, files={"image": b"GIF89a"}), 400, "invalid_image")
    refusal(post(data=good, files=[("image", image)] * 17), 400)
    refusal(post(data=good, files=[("image", image)] * 18), 400)
    refusal(post(data={**good, "n": "10"}, files=[("image", image)] * 2), 400, "too_many")
    for kind, content in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=a", b"--a\r\nbroken"),
        ("", b""),
    ):
        refusal(post(content=content, headers={"Content-Type": kind}), 400)


def test_pixels_are_counted_over_all_pictures(engine, picture):
    small = client_for(engine, max_pixels=5000)
    files = [("image", packed(picture(60, 50)))]
    assert small.post("/v1/images/reconstructions", files=files).status_code == 200
    refusal(small.post("/v1/images/reconstructions", files=files * 2), 400, "invalid_image")


def test_pixels_in_memory_are_limited_and_given_back(engine, picture, monkeypatch):
    monkeypatch.setattr(service, "IN_MEMORY", 0)
    small = client_for(engine, max_pixels=5000)
    files = [("image", packed(picture(60, 50)))]
    for _ in range(3):
        end = time.monotonic() + 10  # the worker lets go of a picture a moment after the answer
        while small.post("/v1/images/reconstructions", files=files).status_code != 200:
            gc.collect()
            assert time.monotonic() < end, "the pixels were not given back"
    refusal(small.post("/v1/images/reconstructions", files=files * 2), 429, "queue_full")


def test_bodies_are_limited(engine):
    small = client_for(engine, rules={"max_body": 1000})
    headers = {"Content-Type": "application/json"}
    assert small.post("/v1/images/generations", json={"prompt": "a", **QUICK}).status_code == 200
    refusal(small.post("/v1/images/generations", content=b"x" * 1001, headers=headers), 413, "body_too_large")
    refusal(small.post("/v1/images/generations", content=(b"x" * 100 for _ in range(11)), headers=headers), 413)


def test_keys(engine):
    rules = {"api_keys": ("secret", "other")}
    for key in ("", "wrong", "secre", "secret2", "sécret"):
        stranger = client_for(engine, rules=rules)
        headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
        refusal(stranger.get("/v1/models", headers=headers), 401, "invalid_api_key")
        refusal(stranger.get("/metrics", headers=headers), 401)
        assert stranger.get("/health").status_code == 200
    for key in ("secret", "other"):
        assert client_for(engine, key=key, rules=rules).get("/v1/models").status_code == 200
    elsewhere = TestClient(create_app(engine, Settings("tiny", Rules(("secret",)))), base_url="http://some.host")
    assert elsewhere.get("/v1/models", headers={"api-key": "secret"}).status_code == 200
    assert "secret" not in repr(Rules(("secret",)))


def test_web_pages_cannot_use_a_server_without_keys(client):
    refusal(client.get("/v1/models", headers={"Host": "evil.example"}), 403, "forbidden_host")
    refusal(client.get("/v1/models", headers={"Host": "127.0.0.1.evil.example"}), 403, "forbidden_host")
    refusal(client.get("/v1/models", headers={"Origin": "http://evil.example"}), 403, "forbidden_origin")
    refusal(client.get("/v1/models", headers={"Origin": "null"}), 403, "forbidden_origin")
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    assert client.get("/v1/models", headers={"Origin": LOCAL}).status_code == 200


def test_rates_are_limited_by_key(engine):
    rules = Rules(("a", "b"), rate_limit=3)
    client = TestClient(create_app(engine, Settings("tiny", rules)), base_url=LOCAL)
    get = lambda key: client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})  # noqa: E731
    assert [get("a").status_code for _ in range(3)] == [200] * 3
    error = get("a")
    assert refusal(error, 429, "rate_limit_exceeded") and int(error.headers["retry-after"]) >= 1
    assert get("b").status_code == 200
    assert [get("wrong").status_code for _ in range(4)] == [401, 401, 401, 429]  # guessing is limited, too


def test_a_full_queue_is_429(tiny_model):
    with Engine(tiny_model, max_queue=1) as engine:
        hold, held = threading.Event(), threading.Event()
        run = engine._run
        engine._run = lambda batch: (held.set(), hold.wait(20), run(batch))
        client = client_for(engine)
        body = {"prompt": "a", **QUICK}
        threads = [threading.Thread(target=client.post, args=("/v1/images/generations",), kwargs={"json": body})]
        threads[0].start()
        assert held.wait(20)
        threads.append(threading.Thread(target=client.post, args=("/v1/images/generations",), kwargs={"json": body}))
        threads[1].start()
        while not engine.stats().queued:
            time.sleep(0.01)
        found = client.post("/v1/images/generations", json=body)
        assert refusal(found, 429, "queue_full") and int(found.headers["retry-after"]) >= 1
        stream = client.post("/v1/images/generations", json={**body, "stream": True})
        refusal(stream, 429, "queue_full")  # before the stream begins
        refusal(client.post("/v1/images/generations", json={**body, "n": 2}), 400, "too_many")  # they never had room
        hold.set()
        for thread in threads:
            thread.join(20)


def test_deadlines_are_408(client):
    found = client.post("/v1/images/generations", json={"prompt": "a", "steps": 200, "deadline": 0.05})
    assert "within its 0 s" not in refusal(found, 408, "deadline_exceeded")["message"]
    streamed = client.post(
        "/v1/images/generations", json={"prompt": "a", "steps": 200, "deadline": 0.05, "stream": True}
    )
    last = json.loads(streamed.text.strip().splitlines()[-1][6:])
    assert last["error"]["code"] == "deadline_exceeded"


def test_failures_tell_nothing(tiny_model, monkeypatch):
    with Engine(tiny_model) as engine:

        def broken(batch):
            raise RuntimeError("secret of the inside")

        engine._run = broken
        client = client_for(engine)
        found = client.post("/v1/images/generations", json={"prompt": "a"})
        refusal(found, 503, "engine_failed")
        assert "secret" not in found.text and found.headers["retry-after"]
        monkeypatch.setattr(engine, "submit", broken)
        found = client.post("/v1/images/generations", json={"prompt": "a"})
        refusal(found, 500, "internal_error")
        assert "secret" not in found.text


def test_shutting_down_is_503(tiny_model):
    with Engine(tiny_model) as engine:
        client = client_for(engine)
        engine.drain(1)
        refusal(client.post("/v1/images/generations", json={"prompt": "a"}), 503, "shutting_down")
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_other_methods_and_places(client):
    refusal(client.get("/v1/images/generations"), 405, "method_not_allowed")
    refusal(client.get("/.env"), 404, "not_found")
    for path in ("/v1/images/files/..%2f..%2fetc%2fpasswd", "/v1/models/../../etc/passwd", "/v1/models/%00"):
        refusal(client.get(path), 404)


def test_nothing_touches_the_disk(client, picture):
    """An audit hook sees every file that Python opens; hooks cannot be removed, so this one is switched off."""
    seen, on = [], [True]

    def hook(event, arguments):
        if on[0] and event in ("open", "os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp", "os.rename"):
            mode = arguments[1] if event == "open" else "w"
            flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & 3:
                seen.append((event, arguments))

    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    data = packed(large)
    assert len(data) > 2 * 2**20  # more than what Starlette keeps in memory by itself
    sys.addaudithook(hook)
    try:
        for path in ("/v1/images/edits", "/v1/images/reconstructions"):
            fields = {"prompt": "a", **QUICK} if "edits" in path else {}
            found = client.post(path, data=fields, files=[("image", ("../../tmp/x.png", data))] * 2)
            assert found.status_code == 200
        body = {
            "messages": [{"role": "user", "content": f"What is this? ![x]({data_url(picture())})"}],
            "max_tokens": 2,
        }
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    finally:
        on[0] = False
    assert seen == []


# --- the guard by itself ----------------------------------------------------------------------------------------------


def test_a_slow_body_is_given_up(monkeypatch):
    monkeypatch.setattr("unilip.serve.guard.BODY_SECONDS", 0.05)
    sent = []

    async def never():
        await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images/edits",
        "headers": [(b"host", b"localhost")],
        "client": ("1.2.3.4", 5),
    }
    asyncio.run(Guard(None, Rules(), Metrics())(scope, never, send))
    assert sent[0]["status"] == 408


def test_what_is_being_read_at_once_is_limited():
    sent, guard = [], Guard(None, Rules(max_body=10), Metrics())
    guard._reading = 75

    async def body():
        return {"type": "http.request", "body": b"123456", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images/edits",
        "headers": [(b"host", b"localhost")],
        "client": ("1.2.3.4", 5),
    }
    asyncio.run(guard(scope, body, send))
    assert sent[0]["status"] == 429 and guard._reading == 75


def test_limits_are_told(tiny_model):
    with Engine(tiny_model, limits=Limits(count=2, steps=5)) as engine:
        client = client_for(engine)
        refusal(client.post("/v1/images/generations", json={"prompt": "a", "n": 3, **QUICK}), 400)
        assert client.get("/v1/models").json()["data"][0]["limits"]["steps"] == 5
        found = client.post("/v1/images/generations", json={"prompt": "a", "quality": "high"}).json()
        assert opened(found["data"][0]["b64_json"]).text["num_inference_steps"] == "5"
