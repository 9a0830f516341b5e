"""What real clients send, beyond what OpenAI's documentation asks for; recorded shapes of their requests."""

import base64
import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from unilip.method.flow import make_schedule
from unilip.serve import describe
from unilip.serve.app import Settings, create_app
from unilip.serve.conversation import Reader, read_conversation
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
from unilip.serve.pictures import decode
from unilip.serve.schema import Chat

LOCAL = "http://localhost:8000"
USER = [{"role": "user", "content": "What is this?"}]
TOOLS = [{"type": "function", "function": {"name": f"f{n}", "parameters": {"type": "object"}}} for n in range(36)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model) as made:
        yield made


def client_for(engine, **settings):
    return TestClient(create_app(engine, Settings("tiny", Rules(rate_limit=0), **settings)), base_url=LOCAL)


@pytest.fixture(scope="module")
def client(engine):
    return client_for(engine)


def talk(client, **more):
    return client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 3, **more})


def png(size=(80, 40), mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size, "red").save(out, "PNG")
    return out.getvalue()


def test_what_an_answer_can_do_without_is_ignored_and_named(client, engine):
    sent = {
        "tools": TOOLS, "functions": [{"name": "f"}], "prompt_cache_key": "a", "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "a"}, "web_search_options": {}, "frequency_penalty": 0.5,
        "presence_penalty": -1, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "num_ctx": 4096,
        "chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {"5": 3},
    }  # fmt: skip
    quiet = {"tool_choice": "auto", "parallel_tool_calls": True, "seed": -1, "stop": None, "response_format": None,
             "n": None, "logprobs": None, "negative_prompt": "", "metadata": {"a": "b"}, "store": False}  # fmt: skip
    found = talk(client, **sent, **quiet)
    assert found.status_code == 200, found.text
    assert set(found.json()["unilip"]["ignored"]) == set(sent)
    assert found.json()["choices"][0]["message"]["content"] == talk(client).json()["choices"][0]["message"]["content"]
    assert "ignored" not in talk(client, **quiet).json()["unilip"]
    drawn = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1, "cfg_rescale": 2, "style": None})
    assert drawn.json()["unilip"] == {"ignored": ["cfg_rescale"]}
    kept = client_for(engine, strict=True)
    for name, value in sent.items():
        if value != {}:
            assert talk(kept, **{name: value}).status_code == 400, name


def test_what_would_change_the_form_of_an_answer_is_refused_in_words(client):
    named = {"type": "function", "function": {"name": "f"}}
    for sent, words in (
        ({"tool_choice": "required", "tools": TOOLS}, "calls no tools"),
        ({"tool_choice": named, "tools": TOOLS}, "calls no tools"),
        ({"function_call": {"name": "f"}}, "calls no functions"),
        ({"n": 2}, "one answer"),
        ({"logprobs": True}, "not given by this model"),
        ({"response_format": {"type": "json_schema", "json_schema": {"strict": True}}}, "cannot be held to a form"),
        ({"response_format": {"type": "json_schema"}}, "cannot be held to a form"),
        ({"response_format": {"type": "xml"}}, 'can be "text", "json_object" or "json_schema"'),
        ({"response_format": "json_object"}, "response_format must be an object"),
        ({"stop": ["a"] * 5}, "stop may have at most 4 entries"),
        ({"adapters": {"a": "much"}}, "adapters.a must be a number"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "content.0.type must be 'text' or"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": 5}, "temperature must be at most 2"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"stream": "perhaps"}, "stream must be true or false"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "messages must have at least 1 entry"),
        ({"messages": [{"content": "a"}]}, "messages.0.role is missing"),
        ({"modalities": ["smell"]}, "must be 'text' or 'image'"),
        ({"step": 4}, "it is steps"),
        ({"size": "7x7"}, "size must be between 16x16"),
    ):
        found = talk(client, **sent)
        message = found.json()["error"]["message"]
        assert found.status_code == 400 and words in message, (sent, message)
        assert "Input should" not in message and "validation" not in message and "size: size" not in message
    found = client.post("/v1/images/generations", json={"prompt": "a", "response_format": "URL"})
    assert found.json()["error"]["message"] == "response_format must be 'b64_json' or 'url'"


def test_empty_fields_of_a_form_are_not_sent(client):
    empty = ("seed", "negative_prompt", "size", "quality", "n", "user")
    form = {"prompt": "a", "steps": "1"} | dict.fromkeys(empty, "")
    for more in ({}, {"seed": "-1"}):
        found = client.post("/v1/images/edits", data=form | more | {"mask": ""}, files={"image": png()})
        assert found.status_code == 200, found.text
    page = b"".join(  # as a browser sends a field for a file where none was chosen
        b'--a\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % one
        for one in ((b"prompt", b"", b"a"), (b"steps", b"", b"1"), (b"image", b'; filename="a.png"', png()),
                    (b"mask", b'; filename=""', b""))
    )  # fmt: skip
    kind = {"Content-Type": "multipart/form-data; boundary=a"}
    found = client.post("/v1/images/edits", content=page + b"--a--\r\n", headers=kind)
    assert found.status_code == 200, found.text
    drawn = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1, "output_format": None,
                        "response_format": None, "negative_prompt": "", "size": None})  # fmt: skip
    assert drawn.status_code == 200, drawn.text


def test_the_name_of_a_picture_leaves_its_markdown_whole(client):
    wish = [{"role": "user", "content": "draw a `cat` [1](2) \\"}]
    said = talk(client, messages=wish, steps=1).json()["choices"][0]["message"]["content"]
    assert "\n![a  cat   1  2   ](data:image/png;base64," in said, said[:200]


def test_more_tokens_than_fit_are_lowered(client, tiny_model):
    for field in ("max_tokens", "max_completion_tokens"):
        for most in (1000, 2048, 200_000):
            found = client.post("/v1/chat/completions", json={"messages": USER, field: most})
            assert found.status_code == 200, found.text
            assert found.json()["choices"][0]["finish_reason"] in ("stop", "length")
            used = found.json()["usage"]
            assert used["total_tokens"] <= tiny_model.config.text.max_positions


def test_the_smallest_temperature_is_greedy(client):
    greedy = talk(client).json()["choices"][0]["message"]["content"]
    found = talk(client, temperature=5e-324)
    assert found.status_code == 200 and found.json()["choices"][0]["message"]["content"] == greedy


def test_edits_in_a_chat_keep_the_shape(client):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": "text", "text": "make it blue"}, {"type": "image_url", "image_url": {"url": url}}]
    for size, expected in ((None, (56, 28)), ("auto", (56, 28)), ("64x64", (64, 64))):
        body = {"messages": [{"role": "user", "content": parts}], "steps": 1, "size": size}
        content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        drawn = Image.open(io.BytesIO(base64.b64decode(content.partition("base64,")[2].rstrip(")"))))
        assert drawn.size == expected


def test_results_of_tools_are_words_of_the_conversation(client):
    history = [
        *USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
        {"role": "tool", "tool_call_id": "a", "content": "22 degrees"},
    ]  # fmt: skip
    assert talk(client, messages=history).status_code == 200
    assert talk(client, messages=[*history, {"role": "user", "content": "And now?"}]).status_code == 200


def test_a_server_that_answers_in_words_alone(engine):
    client = client_for(engine, chat="text")
    wish = [{"role": "user", "content": "Draw a cat"}]
    assert talk(client, messages=wish, steps=1).json()["unilip"]["verb"] == "ask"
    assert talk(client, messages=wish, steps=1, modalities=["image"]).json()["unilip"]["verb"] == "generate"


def test_the_root_says_what_this_is_and_the_description_loads_nothing(client):
    assert "OpenAI" in client.get("/").text and client.get("/").headers["content-type"].startswith("text/plain")
    page = client.get("/docs")
    assert page.status_code == 200 and "max_tokens" in page.text and "/v1/images/edits" in page.text
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    hostile = {"title": "<script>", "version": "<script>", "description": "<script>"}
    field = {"type": "<script>", "description": "<script>"}
    body = {"content": {"application/json": {"schema": {"properties": {"<script>": field}}}}}
    call = {"description": "<script>", "requestBody": body}
    bad = describe.page({"info": hostile, "paths": {"/<script>": {"post": call}}})
    assert "<script" not in bad and bad.count("&lt;script&gt;") == 10
    assert "$ref" not in str(client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"])


# --- responses and variations


@pytest.fixture(scope="module")
def official(client):
    return openai.OpenAI(api_key="none", base_url=f"{LOCAL}/v1", http_client=client, max_retries=0)


QUICK = {"steps": 1, "seed": 3}
DRAW = [{"type": "image_generation", "size": "64x64", "output_format": "jpeg"}]


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_responses_answer_as_chats_do(official, client):
    found = official.responses.create(model="x", input="What is this?", max_output_tokens=3)
    assert found.output_text == talk(client).json()["choices"][0]["message"]["content"]
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens > 0
    text = official.responses.create(model="x", input="Draw a cat", max_output_tokens=3)
    assert text.output[0].type == "message", "without the tool nothing is drawn"


def test_responses_draw_and_go_on(official):
    drawn = official.responses.create(model="x", input="Draw a cat", tools=DRAW, extra_body=QUICK)
    assert drawn.status == "completed"
    kinds = [item.type for item in drawn.output]
    assert kinds == ["image_generation_call", "message"], "without words the Agents SDK asks for the same again"
    assert drawn.output_text == "*Drawn; begin with “answer:” to ask instead.*"
    picture = opened(drawn.output[0].result)
    assert picture.size == (64, 64) and picture.format == "JPEG"
    more = {"previous_response_id": drawn.id, "tools": DRAW, "extra_body": QUICK}
    changed = official.responses.create(model="x", input="make it blue", **more)
    assert changed.to_dict()["unilip"]["verb"] == "edit" and changed.output[0].type == "image_generation_call"
    asked = official.responses.create(model="x", input="What is this?", max_output_tokens=3, **more)
    assert asked.output[0].type == "message" and asked.usage.input_tokens > 1
    begun = [{"role": "system", "content": "Be brief."}, *USER]
    said = official.responses.create(model="x", input=begun, instructions="Be kind.", max_output_tokens=3)
    whole = [*begun, {"role": "assistant", "content": said.output_text}, {"role": "user", "content": "Why?"}]
    on = {"input": "Why?", "previous_response_id": said.id}
    kept, sent = (official.responses.create(model="x", max_output_tokens=3, **one) for one in (on, {"input": whole}))
    assert kept.usage == sent.usage, "the system message of the input is kept, the instructions are not"
    forced = official.responses.create(
        model="x", input="a cat", tools=DRAW, tool_choice={"type": "image_generation"}, extra_body=QUICK
    )
    assert forced.output[0].type == "image_generation_call" and forced.output_text == ""


def test_answers_of_responses_are_known_by_their_ids(official):
    """So the AI SDK (item_reference), LangChain and OpenAI's guide (image_generation_call) send earlier ones."""
    create = partial(official.responses.create, model="x", max_output_tokens=3, extra_body=QUICK)
    whole = create(input="What is this?")
    *_, streamed = create(input="What is this?", stream=True)
    asked, more = {"role": "user", "content": "What is this?"}, {"role": "user", "content": "Why?"}
    expected = create(input=[asked, {"role": "assistant", "content": whole.output_text}, more])
    for said in (whole, streamed.response):
        by_id = create(input=[asked, {"type": "item_reference", "id": said.output[0].id}, more])
        assert (by_id.output_text, by_id.usage) == (expected.output_text, expected.usage)
    two = [{"type": "input_image", "image_url": "data:image/png;base64," + base64.b64encode(png()).decode()}] * 2
    parts = [{"type": "input_text", "text": "make it blue"}, *two]
    drawn = create(input=[{"role": "user", "content": parts}], tools=DRAW, extra_body=QUICK | {"joint": False})
    pictures = [{"type": "image_generation_call", "id": one.id} for one in drawn.output[:-1]]
    wish = {"role": "user", "content": "make it green"}
    for number, picture in enumerate(pictures):
        sent = picture | {"result": drawn.output[number].result}
        made = [
            create(input=given, tools=DRAW) for given in ([sent, wish], [picture, wish], [wish, picture], [wish, sent])
        ]
        assert {one.output[0].result for one in made} == {made[0].output[0].result}
        assert [one.to_dict()["unilip"]["verb"] for one in made] == ["edit"] * 4
    whole_answer = [one.to_dict() for one in drawn.output]
    by_id = [{"type": "item_reference", "id": one.id} for one in drawn.output]
    sent = [{"input": [*one, wish]} for one in (whole_answer, by_id)]
    more_of_it = [{"input": [wish], "previous_response_id": drawn.id}, *sent]
    for joint in (True, False):
        made = [create(**one, tools=DRAW, extra_body=QUICK | {"joint": joint}) for one in more_of_it]
        first, *others = [[opened(item.result) for item in one.output[:-1]] for one in made]
        assert len(first) == 2 - joint, "both pictures are of one answer"
        for other in others:  # up to rounding: two pictures may share a batch or not
            assert all(difference(a, b) <= 1 for a, b in zip(first, other, strict=True))
    lost = create(input="What is this?", store=False).output[0].id
    for name in (lost, f"{whole.output[0].id[:-1]}1", "msg_", None):
        with pytest.raises(openai.BadRequestError, match="names an item of no response that is kept"):
            create(input=[{"type": "item_reference", "id": name}, more])


def test_responses_take_pictures_and_stream(official):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": "input_text", "text": "What is this?"}, {"type": "input_image", "image_url": url}]
    message = [{"role": "user", "content": parts}]
    whole = official.responses.create(model="x", input=message, instructions="Be brief.", max_output_tokens=5)
    seen = list(
        official.responses.create(model="x", input=message, instructions="Be brief.", max_output_tokens=5, stream=True)
    )
    kinds = [event.type for event in seen]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert deltas == whole.output_text == seen[-1].response.output_text
    drawn = list(official.responses.create(model="x", input="Draw a cat", tools=DRAW, stream=True, extra_body=QUICK))
    assert drawn[-1].type == "response.completed" and opened(drawn[-1].response.output[0].result).size == (64, 64)
    assert "response.image_generation_call.completed" in [event.type for event in drawn]
    parts = [{"type": "input_text", "text": "make it blue"}, *[{"type": "input_image", "image_url": url}] * 2]
    asked = {"input": [{"role": "user", "content": parts}], "extra_body": QUICK | {"joint": False}}
    two = list(official.responses.create(model="x", tools=DRAW, stream=True, **asked))
    added, done = ([e.item.id for e in two if e.type == f"response.output_item.{kind}"] for kind in ("added", "done"))
    assert added == done == [one.id for one in two[-1].response.output]
    assert [one.type for one in two[-1].response.output] == [*["image_generation_call"] * 2, "message"]
    deltas = [event.delta for event in two if event.type == "response.output_text.delta"]
    assert deltas == [two[-1].response.output_text] == ["*Changed; begin with “answer:” to ask instead.*"]


def test_what_responses_refuse(client):
    for sent, words in (
        ({"input": 5}, "input must be text"), ({}, "input must be text"), ({"input": [5]}, "not understood"),
        ({"input": "a", "previous_response_id": "resp_none"}, "names no response"),
        ({"input": "a", "tools": TOOLS, "tool_choice": "required"}, "calls no tools"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "strict": True}}}, "held to a form"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_text and input_image"),
        ({"input": [{"role": ["a"], "content": 5}], "tools": 5}, "messages.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": 5}]}]}, "must be text"),
        ({"input": "a", "instructions": {"a": 1}, "text": 7, "tool_choice": []}, "messages.0.content must be text"),
    ):  # fmt: skip
        found = client.post("/v1/responses", json=sent)
        assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_variations(official, client, engine, monkeypatch):
    monkeypatch.setattr(engine.checker, "unread", lambda text: text.split(), raising=False)
    for given in ({}, {"prompt": "a hat"}):
        files = [("image", ("a.png", png((60, 60)), "image/png"))]
        told = client.post("/v1/images/variations", files=files, data={**QUICK, **given}).json().get("unilip", {})
        assert told.get("unread", []) == given.get("prompt", "").split(), "of words that nobody wrote nothing is said"
    found = official.images.create_variation(image=png((60, 60)), n=2, size="64x64", extra_body=QUICK)
    pictures = [opened(one.b64_json) for one in found.data]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2 and pictures[0].tobytes() != pictures[1].tobytes()


# --- answers in JSON --------------------------------------------------------------------------------------------------

JSON_OBJECT = {"type": "json_object"}


def test_an_answer_becomes_one_json_object():
    from unilip.serve.conversation import as_json

    for text, expected, wrapped in (
        ('{"a": 1}', {"a": 1}, False),
        ('Here it is:\n```json\n{"a": {"b": "}"}}\n``` and {"c": 2}', {"a": {"b": "}"}}, False),
        ("a {set} of {}", {}, False),
        ('{"cut": "of', {"answer": '{"cut": "of'}, True),
        ("two “stars”", {"answer": "two “stars”"}, True),
        ("", {"answer": ""}, True),
        ("{" * 5000, {"answer": "{" * 5000}, True),
    ):
        found, was_wrapped = as_json(text)
        assert (json.loads(found), was_wrapped) == (expected, wrapped), text[:20]


def test_json_is_asked_for_in_words_and_always_comes(client, official, engine, monkeypatch):
    asked = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job, **more: (asked.append(job), submit(job, **more))[1])
    plain = talk(client).json()["choices"][0]["message"]["content"]
    found = talk(client, response_format=JSON_OBJECT).json()
    assert asked[-1].question == "What is this?\nAnswer with one JSON object and nothing else."
    assert found["unilip"]["wrapped"] and list(json.loads(found["choices"][0]["message"]["content"])) == ["answer"]
    words = [{"role": "system", "content": "Reply in JSON."}, *USER]
    talk(client, messages=words, response_format=JSON_OBJECT)
    assert asked[-1].question == "Reply in JSON.\nWhat is this?"
    schema = {"name": "a", "schema": {"type": "object"}}
    talk(client, response_format={"type": "json_schema", "json_schema": schema})
    assert asked[-1].question.endswith('of this schema and nothing else: {"type": "object"}')
    assert talk(client, response_format={"type": "text"}).json()["choices"][0]["message"]["content"] == plain
    draw = [{"role": "user", "content": "Draw a cat"}]
    assert "verb" not in talk(client, messages=draw, response_format=JSON_OBJECT).json()["unilip"].get("taken", "")
    assert type(asked[-1]).__name__ == "Ask", "a picture is no JSON"
    more = {"model": "x", "max_tokens": 3, "messages": USER}
    whole = official.chat.completions.create(response_format=JSON_OBJECT, **more).choices[0].message.content
    chunks = list(official.chat.completions.create(response_format=JSON_OBJECT, stream=True, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    for stream in (False, True):
        form = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
        said = official.responses.create(model="x", input="Hi", text=form, max_output_tokens=3, stream=stream)
        said = list(said)[-1].response if stream else said
        assert isinstance(json.loads(said.output_text), dict) and said.text.format.type == "json_schema"


# --- pictures on the way ----------------------------------------------------------------------------------------------


def straight_on(model, done, shift, **settings):
    """Where the latents of a drawing go from the state after `done` steps, by their last direction."""
    states = []
    model.generate(
        "a cat", num_inference_steps=8, guidance_scale=2.0, solver="dpm++", output_type="latent", **settings,
        callback_on_step_end=lambda model, step, timestep, values: states.append(values["latents"]),
    )  # fmt: skip
    levels = make_schedule("dpm++", shift, 8).levels
    share = levels[done] / (levels[done - 1] - levels[done])
    return model.decode(states[done - 1] + share * (states[done - 1] - states[done - 2])).images[0]


def test_streams_show_pictures_on_the_way(official, tiny_model):
    more = {"steps": 8, "seed": 1, "guidance": 2, "output_format": "png"}
    for kind, call in (
        ("image_generation", lambda **o: official.images.generate(prompt="a cat", stream=True, **o)),
        ("image_edit", lambda **o: official.images.edit(prompt="red", image=png((80, 40)), stream=True, **o)),
    ):
        for count in range(4):
            seen = list(call(partial_images=count, extra_body=more))
            parts, done = seen[:-1], seen[-1]
            assert [event.type for event in seen] == [f"{kind}.partial_image"] * count + [f"{kind}.completed"]
            assert [event.partial_image_index for event in parts] == list(range(count))
            final, sketches = opened(done.b64_json), [opened(event.b64_json) for event in parts]
            assert {picture.size for picture in sketches} <= {final.size}
            assert {event.output_format for event in parts} <= {"png"}
            assert all(difference(a, b) > 0.5 for a, b in zip(sketches, [*sketches, final][1:], strict=True))
            if kind == "image_generation":
                shift, settings = tiny_model.config.sampling.flow_shift, {"generator": 1}
                if count == 1:
                    seen = list(call(partial_images=1, extra_body=more | {"preset": "balanced", "solver": "dpm++"}))
                    sketches.append(opened(seen[0].b64_json))
                expected = [straight_on(tiny_model, d, shift, **settings) for d in {1: [4], 2: [3, 5]}.get(count, ())]
                if count == 1:
                    expected.append(straight_on(tiny_model, 4, 2.0, preset="balanced", **settings))
                assert all(difference(a, b) < 0.5 for a, b in zip(sketches, expected, strict=False)), count
    for steps, possible in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        few = list(official.images.generate(prompt="a", stream=True, partial_images=3, extra_body={"steps": steps}))
        assert [event.partial_image_index for event in few[:-1]] == list(range(possible))
    many = list(official.images.generate(prompt="a", n=2, stream=True, partial_images=1, extra_body=more))
    assert [event.type for event in many].count("image_generation.partial_image") == 2
    tool = [{"type": "image_generation", "partial_images": 2, "output_format": "png"}]
    drawn = list(official.responses.create(model="x", input="Draw a cat", tools=tool, stream=True, extra_body=more))
    shown = [one for one in drawn if one.type == "response.image_generation_call.partial_image"]
    assert [one.partial_image_index for one in shown] == [0, 1]
    assert [one.sequence_number for one in drawn] == list(range(len(drawn)))
    assert difference(*[opened(one.partial_image_b64) for one in shown]) > 0.5
    chat = official.chat.completions.create(
        model="x", messages=[{"role": "user", "content": "Draw a cat"}], extra_body={**more, "partial_images": 2}
    )
    assert chat.to_dict()["unilip"]["ignored"] == ["partial_images"]


def difference(a, b):
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# --- requests as real clients sent them -------------------------------------------------------------------------------

RECORDED = json.loads((Path(__file__).parent / "recorded_requests.json").read_text(encoding="utf-8"))


def test_recorded_requests_of_real_clients_are_answered(client):
    """What `make test-hosts ARGS=--record` wrote down; drawn in one step, answered in three words."""
    refused, answered = [], set()
    for name, requests in RECORDED.items():
        for request in requests:
            path, body = request["path"], dict(request["body"])
            body["steps"] = 1
            body["max_output_tokens" if path.endswith("responses") else "max_tokens"] = 3
            body.pop("previous_response_id", None)
            if isinstance(given := body.get("input"), list):  # without what was kept for another server
                body["input"] = [one for one in given if set(one) != {"type", "id"}]
            found = client.post(path, json=body)
            answered.add((name, path))
            if found.status_code != 200:
                refused.append((name, path, found.text[:300]))
    assert not refused and len(answered) >= 6, refused


def test_a_model_that_learned_no_long_conversations_hears_what_came_since_the_picture():
    """What is left out is named; a model that has learned them hears all, and so does a chat without pictures."""
    picture = "data:image/png;base64," + base64.b64encode(png((28, 28))).decode()
    files = '<attached_files>\n<file type="file" url="<x>"/>\n</attached_files>\n'
    shown = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": files + "What is this?"}]
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    asked = {"role": "user", "content": "What color is it?"}
    for recall, messages, turns, left in (
        (False, [*talk, {"role": "user", "content": shown}], [], 1),
        (False, [*talk, {"role": "user", "content": shown}, talk[1], asked], ["What is this?", "hi"], 1),
        (True, [*talk, {"role": "user", "content": shown}], ["hello", "hi"], 0),
        (False, [*talk, asked], ["hello", "hi"], 0),
    ):
        config = SimpleNamespace(sampling=SimpleNamespace(recall=recall))
        body = Chat(messages=messages, modalities=["text"])
        reader = Reader(SimpleNamespace(decode=lambda data: decode(data, 10**6)))
        *_, ask = read_conversation(body, reader, SimpleNamespace(config=config, verbs=("ask",)))
        assert [turn.text for turn in ask["history"]] == turns, (recall, messages)
        assert ask["question"] in ("What is this?", "What color is it?")
        assert len(body.ignored) == left + ("attached_files" in str(messages)), body.ignored
        assert ("messages 1 to 2" in str(body.ignored)) == bool(left)
        body = Chat(messages=messages, modalities=["text"], response_format=JSON_OBJECT)
        *_, ask = read_conversation(body, reader, SimpleNamespace(config=config, verbs=("ask",)))
        assert ("JSON" in ask["question"]) == recall, "what knows plain questions only is asked plainly"
        form = [{"role": "system", "content": "Answer in JSON of this schema: {}"}, *messages]
        body = Chat(messages=form, modalities=["text"], response_format=JSON_OBJECT)
        *_, ask = read_conversation(body, reader, SimpleNamespace(config=config, verbs=("ask",)))
        said = ask["question"] + "".join(turn.text for turn in ask["history"])
        assert ("schema" in said) == recall and ("the system message" in body.ignored) != recall
