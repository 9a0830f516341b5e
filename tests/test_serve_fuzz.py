"""Requests that nobody would write: schemathesis on the OpenAPI description, hypothesis on bodies. Never a 5xx."""

import io
import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error

from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine, Limits
from unilip.serve.guard import Rules
from unilip.serve.schema import Chat, Edits

FEW, MANY = 12, 2000
CALM = dict(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture
def app(tiny_model):
    """An application of its own for each test: who runs it from the description may shut it down at the end."""
    limits = Limits(count=2, steps=2, new_tokens=4, image_size=56)
    with Engine(tiny_model, limits=limits, max_queue=64) as engine:
        yield create_app(engine, Settings("tiny", Rules(rate_limit=0)))


@pytest.fixture
def client(app):
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def check(response):
    """No 5xx, and every refusal in OpenAI's shape without anything of the inside."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in response.text and "site-packages" not in response.text


# --- by the description -----------------------------------------------------------------------------------------------


def fuzz_description(app, count):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})
    statuses = []
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 9

    for operation in operations:
        posts = operation.method.upper() == "POST"
        share = max(3, count // 4 if posts else count // 20)

        @given(case=operation.as_strategy())
        @settings(max_examples=share, **CALM)
        def run(case):
            response = case.call(headers={"Host": "localhost"})
            case.validate_response(response, checks=[not_a_server_error])
            statuses.append(response.status_code)

        run()
    return statuses


def test_the_description_is_kept(app):
    statuses = fuzz_description(app, FEW)
    assert 200 in statuses and max(statuses) < 500


@pytest.mark.slow
def test_the_description_is_kept_two_thousand_times(app):
    statuses = fuzz_description(app, MANY)
    assert len(statuses) >= MANY and 200 in statuses


# --- by our own ideas -------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=40), st.sampled_from(["a star", "draw a dog", "make it red", "<img>", "\ud800", "a" * 9000])
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.just(2**63), st.just(-1))
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)
NAMES = sorted({*Chat.model_fields, *Edits.model_fields})
PARTS = st.one_of(
    ANYTHING,
    st.builds(lambda text: {"type": "text", "text": text}, WORDS),
    st.builds(
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        WORDS | st.sampled_from(["data:image/png;base64,AAAA", "http://[::1]/"]),
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": WORDS | st.lists(PARTS, max_size=3),
        }
    ),
    max_size=3,
)


def picture_files():
    """Whole pictures, and pieces of such."""
    found = []
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        out = io.BytesIO()
        Image.new("RGB", (20, 12), "red").save(out, form)
        found.append(out.getvalue())
    return found


FILES = picture_files()


@st.composite
def damaged(draw):
    data = bytearray(draw(st.sampled_from(FILES)))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = value
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))]) + draw(st.binary(max_size=4))


def fuzz_json(client, count):
    seen = []

    @given(
        path=st.sampled_from(["generations", "chat"]),
        body=st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=6),
        words=WORDS,
        messages=MESSAGES,
        keep=st.booleans(),
    )
    @settings(max_examples=count, **CALM)
    def run(path, body, words, messages, keep):
        url = "/v1/images/generations" if path == "generations" else "/v1/chat/completions"
        if keep:
            body = {**body, **({"prompt": words} if path == "generations" else {"messages": messages})}
        content = json.dumps(body)
        response = client.post(url, content=content, headers={"Content-Type": "application/json"})
        check(response)
        seen.append(response.status_code)

    run()
    return seen


def fuzz_bytes(client, count):
    seen = []

    @given(
        path=st.sampled_from(["images/generations", "images/edits", "images/reconstructions", "chat/completions"]),
        kind=st.sampled_from(
            ["application/json", "multipart/form-data; boundary=x", "text/plain", "", "multipart/form-data"]
        ),
        body=st.binary(max_size=200)
        | st.sampled_from([b"--x\r\n", b"--x--", b"{}", b"[" * 5000, b'{"prompt":' + b'"a"' * 9]),
    )
    @settings(max_examples=count, **CALM)
    def run(path, kind, body):
        response = client.post(f"/v1/{path}", content=body, headers={"Content-Type": kind})
        check(response)
        seen.append(response.status_code)

    run()
    return seen


def fuzz_files(client, count):
    seen = []

    @given(
        path=st.sampled_from(["edits", "reconstructions"]),
        files=st.lists(st.tuples(st.sampled_from(["image", "image[]", "mask"]), damaged()), min_size=1, max_size=3),
        fields=st.dictionaries(
            st.sampled_from(NAMES), st.text(max_size=10).filter(lambda t: "\ud800" not in t), max_size=3
        ),
        words=st.sampled_from(["make it red", "", "\0"]),
    )
    @settings(max_examples=count, **CALM)
    def run(path, files, fields, words):
        fields = {"steps": "1", "prompt": words, **fields} if path == "edits" else {}
        response = client.post(f"/v1/images/{path}", data=fields, files=[(n, ("x.png", data)) for n, data in files])
        check(response)
        seen.append(response.status_code)

    run()
    return seen


@pytest.mark.parametrize("fuzz", [fuzz_json, fuzz_bytes, fuzz_files])
def test_strange_requests(client, fuzz):
    statuses = fuzz(client, 3 * FEW)
    assert any(status >= 400 for status in statuses)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_json, fuzz_bytes, fuzz_files])
def test_two_thousand_strange_requests(client, fuzz):
    statuses = fuzz(client, MANY)
    assert len(statuses) >= MANY // 2 and any(status >= 400 for status in statuses)
    if fuzz is not fuzz_bytes:
        assert 200 in statuses
