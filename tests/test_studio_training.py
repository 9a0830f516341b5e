"""Adapters trained from the page: what may be asked, how it goes, and what is lent out at the end."""

import io
import json
import time

import pytest
from starlette.testclient import TestClient

from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
from unilip.serve.training import Trainer

pytest.importorskip("peft")
KEY = "a-key-of-twenty-four-signs"


def packed(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def offered(fresh_model, tiny_folder, tmp_path):
    with Engine(fresh_model()) as engine:
        trainer = Trainer(tmp_path / "runs", str(tiny_folder), "tiny", "cpu", engine.lend)
        app = create_app(engine, Settings("tiny", Rules(rate_limit=0)), trainer=trainer)
        yield TestClient(app, base_url="http://localhost"), trainer
        trainer.close()


def wait(client, *status, patience=240):
    deadline = time.monotonic() + patience
    while (found := client.get("/v1/training").json())["status"] not in status:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def ask(client, picture, count=5, each=1, **fields):
    form = {"name": "mine", "kind": "style", "steps": "2", "texts": json.dumps(["a red star"] * count)} | fields
    files = [("image", packed(picture(60, 60, i))) for i in range(count * each)]
    return client.post("/v1/training", data=form, files=files)


def test_an_adapter_is_trained_shown_and_lent(offered, picture, tmp_path):
    client, trainer = offered
    assert client.get("/v1/training").json()["status"] == "idle" and client.get("/v1/training/sheet").status_code == 404
    found = ask(client, picture, each=2, kind="edit")
    assert found.status_code == 202 and found.json()["status"] == "running", found.text
    assert {p.name for p in (trainer.root / "mine" / "data").iterdir()} >= {"01.input.png", "05.output.png", "05.txt"}
    refused = ask(client, picture, name="other")
    assert refused.status_code == 400 and "mine is being trained" in refused.json()["error"]["message"]
    found = wait(client, "done", "failed")
    assert found["status"] == "done" and found["step"] == found["steps"] == 2 and found["sheet"], found
    assert client.get("/v1/training/sheet").content[:4] == b"\x89PNG"
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", "tiny:mine"]
    drawn = client.post("/v1/images/generations", json={"prompt": "a star", "steps": 1, "model": "tiny:mine"})
    assert drawn.status_code == 200 and drawn.json()["model"] == "tiny:mine"
    assert list(trainer.kept()) == ["mine"] and not trainer.unfinished()
    assert "another name" in ask(client, picture).json()["error"]["message"]
    other = Trainer(tmp_path / "runs", "embedded", "pico", "cpu")
    assert not other.kept(), "of another model"


def test_stopped_it_is_gone_on_with_and_failed_it_says_why(offered, picture):
    client, trainer = offered
    assert ask(client, picture, steps="5000").status_code == 202
    deadline = time.monotonic() + 240
    while client.get("/v1/training").json().get("step", 0) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(2):  # asked again, it goes on saving
        assert client.post("/v1/training/stop").json()["status"] == "stopping"
    found = wait(client, "stopped", "failed")
    assert found["status"] == "stopped" and found["unfinished"] == ["mine"], found
    saved = max(trainer.root.glob("mine/step_*"))
    about = trainer.root / "mine" / "studio.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"steps": 5001}))
    assert client.post("/v1/training/continue", json={"name": "mine"}).status_code == 202
    found = wait(client, "failed", "done")
    assert found["status"] == "failed" and "steps" in found["error"] and saved.exists(), found
    assert client.post("/v1/training/continue", json={"name": "nobody"}).status_code == 400


def test_what_is_wrong_is_said_and_nothing_written(offered, picture, monkeypatch):
    client, trainer = offered
    cases = {
        "1 to 40 of a-z": {"name": "../x"}, "takes 5 to 50": {"count": 4},
        "kind of training": {"kind": "dream", "texts": json.dumps(["я" * 8000] * 5, ensure_ascii=False)},
        "steps is 0": {"steps": "0"}, "must be a JSON list": {"texts": "?"},
        "5 pictures and 0 texts were sent; 1 for each": {"texts": "[]"},
        "5 pictures and 2 texts were sent; 2 for each": {"kind": "edit", "texts": '["a", "b"]'},
        "text of picture 5 is empty": {"texts": json.dumps(["a"] * 4 + [" "])},
        "text of picture 2 has 9000 characters; 8000 are read": {"texts": json.dumps(["a", "a" * 9000, "a", "a", "a"])},
    }  # fmt: skip
    for message, fields in cases.items():
        answer = ask(client, picture, **fields)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], (message, answer.text)
    bad = [("image", b"no picture")] * 5
    form = {"name": "mine", "kind": "style", "texts": json.dumps(["a"] * 5)}
    assert client.post("/v1/training", data=form, files=bad).status_code == 400
    assert not trainer.root.exists()
    monkeypatch.setattr("unilip.train.preflight.preflight", lambda recipe, machine: pytest.fail(recipe.model))
    assert client.get("/v1/training/estimate", params={"kind": "style", "steps": 0}).status_code == 400
    answer = client.get("/v1/training/estimate", params={"kind": "style", "steps": ""})
    assert answer.json()["error"]["message"] == "steps must be a whole number"


def test_what_it_takes_is_estimated(offered, monkeypatch):
    from unilip.train import preflight

    client, _ = offered
    machine = preflight.Hardware("this CPU", 8 * preflight.GIB, 1e11, 1e11)
    monkeypatch.setattr(preflight, "hardware", lambda name: machine)
    few, many = (client.get("/v1/training/estimate", params={"kind": "style", "steps": n}).json() for n in (100, 1000))
    assert 0 < few["memory"] < few["usable"] < 8 and many["hours"] == pytest.approx(10 * few["hours"]) and few["hours"]
    machine = preflight.Hardware("a small one", preflight.GIB, 1e11, 1e11)
    answer = client.get("/v1/training/estimate", params={"kind": "edit", "steps": 10})
    assert answer.status_code == 400 and "offers" in answer.json()["error"]["message"]


def test_only_who_may_ask_can_train(fresh_model, tiny_folder, tmp_path):
    with Engine(fresh_model()) as engine:
        trainer = Trainer(tmp_path / "runs", str(tiny_folder), "tiny", "cpu", engine.lend)
        guarded = create_app(engine, Settings("tiny", Rules((KEY,), rate_limit=0)), trainer=trainer)
        client = TestClient(guarded, base_url="http://localhost")
        for method, path in (
            ("GET", ""), ("GET", "/estimate"), ("GET", "/sheet"), ("POST", ""), ("POST", "/continue"),
            ("POST", "/stop"),
        ):  # fmt: skip
            assert client.request(method, f"/v1/training{path}").status_code == 401, path
            foreign = {"Origin": "https://evil.example", "Authorization": f"Bearer {KEY}"}
            assert client.request(method, f"/v1/training{path}", headers=foreign).status_code == 403, path
        plain = TestClient(create_app(engine, Settings("tiny", Rules(rate_limit=0))), base_url="http://localhost")
        assert plain.post("/v1/training").status_code == 404, "a server that offers none"
