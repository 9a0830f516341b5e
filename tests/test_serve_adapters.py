"""Adapters of a server: each request has those that it names, and no other, whatever came before and beside it."""

import base64
import io

import pytest
from PIL import Image, ImageChops
from starlette.testclient import TestClient

from test_train_adapters import touched
from unilip.cli import serving
from unilip.cli.options import VERBS, make_parser
from unilip.errors import UniLIPError
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
from unilip.serve.jobs import Ask, Edit, Generate, Reconstruct
from unilip.train.adapters import save_adapter

QUICK = {"steps": 1, "seed": 3}
CASES = {"": (), "red": (("red", 1.0),), "half": (("red", 0.5),), "two": (("blue", 1.0), ("red", -1.0))}


@pytest.fixture(scope="module")
def folders(fresh_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue", "always")):
        save_adapter(touched(fresh_model(), f"seed={seed}", seed=seed), place / name)
    return place


@pytest.fixture(scope="module")
def engine(fresh_model, folders):
    model = fresh_model()
    model.load_adapter(folders / "always")
    with Engine(model, adapters={name: (folders / name, 1.0) for name in ("red", "blue")}) as made:
        yield made


@pytest.fixture(scope="module")
def expected(fresh_model, folders):
    """What a model of its own draws with the adapters of each case."""
    model, found = fresh_model(), {}
    for name in ("always", "red", "blue"):
        model.load_adapter(folders / name)
    for case, strengths in CASES.items():
        model.set_adapters({"always": 1.0} | dict(strengths))
        found[case] = model.generate("a star", num_inference_steps=1, generator=3, progress=False).images[0]
    return found


def apart(a, b):
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b).getextrema())


def test_jobs_have_their_adapters(engine, expected):
    order = [*CASES, *reversed(CASES), *CASES]
    tickets = [engine.submit(Generate("a star", adapters=CASES[case], **QUICK)) for case in order]
    for case, ticket in zip(order, tickets, strict=True):
        result = ticket.result(60)
        assert apart(result.images[0], expected[case]) <= 1, case
        assert result.settings.get("adapters", {}) == dict(CASES[case])
    assert all(apart(expected[a], expected[b]) > 1 for a in CASES for b in CASES if a < b)
    picture, two = Image.new("RGB", (56, 56), "red"), CASES["two"]
    for job in (
        Edit(picture, "make it blue", steps=1, adapters=two), Reconstruct(picture, adapters=two),
        Ask("What?", (picture,), max_new_tokens=2, adapters=two),
    ):  # fmt: skip
        engine.submit(job).result(60)
    for strengths, message in (
        ((("green", 1.0),), "no adapter 'green'; allowed: red, blue"), ((("red", float("nan")),), "strength of red"),
        ((("red", -1e6),), "must be a number between -100 and 100"),
    ):  # fmt: skip
        with pytest.raises(UniLIPError, match=message):
            engine.submit(Generate("a star", adapters=strengths))


def test_requests_name_them(engine, expected):
    app = create_app(engine, Settings("tiny", Rules(rate_limit=0)))
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    def drawn(**body):
        found = client.post("/v1/images/generations", json={"prompt": "a star", **QUICK, **body}).json()
        return found["model"], Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))

    for case, body in (
        ("", {}), ("", {"model": "tiny"}), ("", {"model": "gpt:4"}), ("red", {"model": "tiny:red"}),
        ("red", {"adapters": ["red"]}), ("half", {"adapters": "red:0.5"}),
        ("two", {"adapters": {"red": -1, "blue": 1}}),
        ("two", {"model": "tiny:blue", "adapters": "red:-1"}),
        ("half", {"model": "tiny:red", "adapters": {"red": 0.5}}),
    ):  # fmt: skip
        name, image = drawn(**body)
        assert apart(image, expected[case]) <= 1, body
        assert name == (body["model"] if body.get("model", "").startswith("tiny:") else "tiny")
    assert "red" in image.text["adapters"]
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "tiny:red", "tiny:blue"]
    assert client.get("/v1/models/tiny:red").json()["id"] == "tiny:red"
    assert client.get("/v1/models/tiny:green").status_code == 404
    for body in (
        {"model": "tiny:green"}, {"adapters": "green"}, {"adapters": "red:much"}, {"adapters": {"red": "much"}},
        {"adapters": "red:nan"}, {"adapters": 3}, {"adapters": ["red"] * 17},
    ):  # fmt: skip
        refused = client.post("/v1/images/generations", json={"prompt": "a", **body})
        assert refused.status_code == 400 and refused.json()["error"]["message"], body
    file = io.BytesIO()
    expected[""].save(file, "PNG")
    form = {"prompt": "make it blue", "steps": 1, "seed": 1, "adapters": "red:2"}
    answers = [
        client.post("/v1/images/edits", data={**form, **more}, files={"image": file.getvalue()}).json()["data"][0]
        for more in ({}, {"adapters": ""})
    ]
    assert answers[0]["b64_json"] != answers[1]["b64_json"]
    chat = {"messages": [{"role": "user", "content": "draw a star"}], "model": "tiny:red", **QUICK}
    said = client.post("/v1/chat/completions", json=chat).json()
    assert said["model"] == "tiny:red" and said["unilip"]["settings"]["adapters"] == {"red": 1.0}


def test_serve_takes_names_and_paths(folders, tmp_path):
    def read(*words):
        given = [part for word in words for part in ("--adapter", word)]
        o = make_parser("serve", VERBS["serve"]).parse_args(given)
        return serving.offered(o), o.adapter

    red, blue = str(folders / "red"), str(folders / "blue")
    assert read(f"a={red}", f"b-2={blue}:0.5", red) == ({"a": (red, 1.0), "b-2": (blue, 0.5)}, [red])
    for words in ((f"a={red}", f"a={blue}"), (f"a={tmp_path}",), (f"a={red}:nan",)):
        with pytest.raises(UniLIPError, match="--adapter"):
            read(*words)
