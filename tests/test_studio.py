"""The page of the server, without a browser: what is served to whom, what the routes for it say."""

import re
import threading
import time
from importlib import resources

import httpx
import pytest
from starlette.testclient import TestClient

from support import failures
from unilip import cli
from unilip.errors import UniLIPError
from unilip.serve import front, server
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import MAX_TEXT, Rules
from unilip.serve.jobs import Generate

KEY = "a-key-of-twenty-four-signs"
HTML = {"Accept": "text/html,*/*;q=0.8"}


def client_for(engine, **rules):
    app = create_app(engine, Settings("tiny", Rules(rate_limit=0, **rules), about={"model": "tiny"}))
    return TestClient(app, base_url="http://localhost")


@pytest.fixture(scope="module")
def engine(fresh_model):
    model = fresh_model()
    model.processor.tokenizer.known = frozenset(("draw", "a", "the", "red", "star", "what", "is", "this", "make", "it"))
    with Engine(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(engine):
    return client_for(engine)


def test_the_page_is_served_to_browsers_with_a_policy_that_lets_nothing_else_in(client):
    page = client.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html") and "<h1>UniLIP" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "OpenAI" in client.get("/").text, "programs are told what this is"
    parts = set(re.findall(r'(?:href|src)="(page/[\w.]+)"', page.text))
    assert parts == {"page/style.css", "page/studio.css", "page/studio.js"}
    for name, (content, kind) in front.files().items():
        found = client.get(f"/page/{name}")
        assert found.content == content and found.headers["content-type"].startswith(kind), name
        assert found.headers["content-security-policy"] == policy
    assert "panda.png" in front.files()


def test_the_page_asks_no_other_host_and_reads_nothing_as_markup():
    texts = {name: content.decode() for name, (content, kind) in front.files().items() if kind.startswith("text")}
    assert len(texts) == 7
    for name, text in texts.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s'\"]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, (name, addresses)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=\"|style=\"", text), name
    pattern = resources.files("unilip") / "serve" / "page"
    assert {one.name for one in pattern.iterdir()} == set(texts), "each file has a kind that is served"


def test_no_name_leads_out_of_the_table(client):
    def refused(name):
        found = client.get(f"/page/{name}")
        assert found.status_code == 404 and "root:" not in found.text and "import " not in found.text, found.status_code

    outside = ["app.py", "../app.py", "..%2fapp.py", "%2e%2e%2fapp.py", "..%5capp.py", "%2fetc%2fpasswd", "/etc/passwd"]
    outside += ["studio.js%00", "studio.js/a", "studio.js/..", "STUDIO.JS", "examples.json", "", "%00", "a" * 5000]
    outside += ["....//app.py", "..%252fapp.py", "file:%2f%2f%2fetc%2fpasswd", "http:%2f%2f127.0.0.1:1%2f"]
    assert failures(refused, outside) == []


def test_the_page_is_open_and_what_it_shows_needs_the_key(engine):
    client = client_for(engine, api_keys=(KEY,))
    assert client.get("/", headers=HTML).status_code == client.get("/page/studio.js").status_code == 200
    body = {"text": "draw a star"}
    assert client.post("/v1/intent", json=body).status_code == client.get("/v1/models").status_code == 401
    assert client.post("/v1/intent", json=body, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_how_a_message_is_taken(client):
    def taken(case):
        text, has_picture, verb, words, unread = case
        found = client.post("/v1/intent", json={"text": text, "has_picture": has_picture}).json()
        assert found == {"verb": verb, "text": words, "unread": unread}, found

    cases = [
        ("draw me a red star", False, "generate", "a red star", []),
        ("draw the dragon", True, "generate", "the dragon", ["dragon"]),
        ("make it blue", True, "edit", "make it blue", ["blue"]),
        ("make it blue", False, "ask", "make it blue", ["blue"]),
        ("What is this?", True, "ask", "What is this?", []),
        ("", False, "ask", "", []),
    ]
    assert failures(taken, cases) == []
    assert "has_picture must be true or false" in client.post("/v1/intent", json={"text": "a", "has_picture": "?"}).text
    assert client.post("/v1/intent", json={"text": "a" * 9000}).status_code == 400
    assert client.post("/v1/intent", content=b" " * (MAX_TEXT + 1)).status_code == 413


def test_answers_name_the_words_that_were_never_read(client):
    body = {"prompt": "a red dragon", "steps": 1}
    assert client.post("/v1/images/generations", json=body).json()["unilip"]["unread"] == ["dragon"]
    assert "unilip" not in client.post("/v1/images/generations", json={"prompt": "a red star", "steps": 1}).json()
    streamed = client.post("/v1/images/generations", json=body | {"stream": True}).text
    assert '"unread":["dragon"]' in streamed and '"seed":' in streamed
    talk = {"messages": [{"role": "user", "content": "what is a dragon"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=talk).json()["unilip"]["unread"] == ["dragon"]


def test_a_stream_tells_the_place_in_the_queue(tiny_model, monkeypatch):
    monkeypatch.setattr("unilip.serve.images.QUEUE_SECONDS", 0.01)
    go = threading.Event()
    with Engine(tiny_model, max_batch=2) as engine:
        monkeypatch.setattr(engine, "_run", lambda batch, run=engine._run: (go.wait(30), run(batch)))
        first = engine.submit(Generate("a star", count=5, steps=1))
        while engine.stats().running != 2:
            time.sleep(0.01)
        body = {"prompt": "a car", "steps": 2, "stream": True, "include_progress": True}
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(client_for(engine).post("/v1/images/generations", json=body))
        )
        asking.start()
        while engine.stats().queued != 4:
            time.sleep(0.01)
        time.sleep(0.2)
        go.set()
        asking.join(60)
        assert engine.ahead(first) == 0
    assert '{"type":"image_generation.queued","ahead":5}' in answers[0].text
    assert "image_generation.completed" in answers[0].text


def test_the_model_card_says_what_the_page_shows(client, tiny_model):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["about"] == {"model": "tiny"} and card["image_size"] == tiny_model.config.image_size
    assert card["sampling"]["num_inference_steps"] == tiny_model.config.sampling.num_inference_steps


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_every_local_address_has_the_same_walls(tiny_model, host):
    try:
        taken = server.listen(host, 0)
    except UniLIPError:
        pytest.skip(f"this machine has no {host}")
    shown = f"[{host}]" if ":" in host else host
    with Engine(tiny_model) as engine:
        made = server.make_server(create_app(engine, Settings("tiny", server.check_access(host, Rules()))), 1)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [taken]})
        thread.start()
        while not made.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=f"http://{shown}:{taken.getsockname()[1]}") as client:
                assert client.get("/", headers=HTML).status_code == 200
                for path in ("/", "/page/studio.js", "/v1/models", "/v1/intent"):
                    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
                        assert client.get(path, headers=headers).status_code == 403, (path, headers)
                assert client.get("/page/..%2f..%2fcli.py").status_code == 404
                linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", **HTML}
                assert client.get("/", headers=linked).status_code == 200, "a link to the page"
        finally:
            made.should_exit = True
            thread.join(60)


def test_the_verb_is_the_server_with_its_page_opened(monkeypatch):
    _, studio = cli.parse(["studio"])
    assert studio.port == 7860 and studio.open and studio.host == "127.0.0.1"
    assert not cli.parse(["studio", "--no-open"])[1].open
    monkeypatch.setattr("unilip.cli.serving.load", lambda o: pytest.fail("loaded before the check"))
    with pytest.raises(UniLIPError, match="--api-key of at least 16"):
        cli.VERBS["studio"].run(cli.parse(["studio", "--host", "0.0.0.0"])[1])
