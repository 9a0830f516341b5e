"""The studio on a real port, asked as an attacker would: by plain HTTP requests, not by its page.

The checks are of what is served, whoever refuses it, so that they fail when a version of Gradio changes what it allows.
"""

import io
import json
import os
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
from unilip.serve.engine import Engine
from unilip.serve.server import listen, make_server

SECRET = "the-secret-of-this-machine"
PASSWORD = "many secret words"


@contextmanager
def studio(model, host="127.0.0.1", **more):
    """Where a studio listens, and its folder."""
    from unilip.serve.guard import LOCAL_HOSTS
    from unilip.serve.studio import About, Samples, create_app

    taken = listen(host, 0)
    with Engine(model) as engine:
        app = create_app(engine, About("tiny"), Samples(prompts=["stars"]), **{"hosts": LOCAL_HOSTS, **more})
        server = make_server(app, 1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        shown = f"[{host}]" if ":" in host else host
        try:
            yield f"http://{shown}:{taken.getsockname()[1]}", app.state.desks.folder.parent
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def open_studio(tiny_model):
    with studio(tiny_model) as found:
        yield found


@pytest.fixture
def secret(tmp_path):
    """Files that no visitor may see, in the places and kinds that Gradio treats differently."""
    kinds = {"secret.txt": SECRET.encode(), "secret.svg": f"<svg><!--{SECRET}--></svg>".encode()}
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    kinds["secret.png"] = image.getvalue() + SECRET.encode()
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    return [*(str(tmp_path / name) for name in kinds), "/proc/self/environ"]


def file_of(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png", "url": None}


def shapes_of(path):
    """Ways in which components take files."""
    one = file_of(path)
    return [
        one, [one], [[path, None]], {"image": one, "caption": None}, [{"image": one, "caption": None}],
        {"text": "x", "files": [one]}, {"text": "x", "files": [path]}, {"value": one},
        [{"role": "user", "content": [{"type": "file", "file": one}]}], {"background": one, "layers": [one]},
    ]  # fmt: skip


def told(client, address, fn, data, event=None, session=None):
    """Everything that the studio answers to one call of a function of its page."""
    session = session or os.urandom(8).hex()
    body = {"data": data, "fn_index": fn, "session_hash": session, "event_data": event, "trigger_id": None}
    text = client.post(f"{address}/gradio_api/run/predict", json=body).text
    joined = client.post(f"{address}/gradio_api/queue/join", json=body)
    text += joined.text
    if joined.status_code == 200:
        url = f"{address}/gradio_api/queue/data"
        with client.stream("GET", url, params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                text += line
                if "process_completed" in line or "unexpected_error" in line:
                    break
    return text


def urls_in(text):
    """Addresses of files in an answer."""
    return {piece.split('"')[0].split("\\")[0] for piece in text.split("/gradio_api/file=")[1:]}


def test_no_input_of_the_page_gives_away_a_file_of_the_machine(open_studio, secret):
    address, folder = open_studio
    leaks, calls = [], 0
    with httpx.Client(timeout=60) as client:
        config = client.get(f"{address}/config").json()
        stateful = {part["id"] for part in config["components"] if part["type"] == "state"}
        functions = [one for one in config["dependencies"] if one["backend_fn"] and set(one["inputs"]) - stateful]
        assert len(functions) > 6
        for function in functions:
            for position in range(len(function["inputs"])):
                for shape in [shape for path in (secret[0], secret[-1]) for shape in shapes_of(path)]:
                    data = [None] * len(function["inputs"])
                    data[position] = shape
                    text = told(client, address, function["id"], data)
                    calls += 1
                    leaks += [text] if SECRET in text or "root:" in text else []
                    for url in urls_in(text):
                        answer = client.get(f"{address}/gradio_api/file={url}")
                        if answer.status_code == 200 and not url.startswith(str(folder)):
                            leaks.append(url)
                        leaks += [url] if SECRET.encode() in answer.content else []
    assert not leaks, leaks[:3]
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert calls > 100


def test_gradio_itself_checks_paths_once_it_is_mounted(tiny_model, secret, monkeypatch):
    """The second wall: without our own check of what is posted, the library refuses as well."""
    monkeypatch.setattr("unilip.serve.studio.names_outside", lambda content, folder: False)
    with studio(tiny_model) as (address, folder), httpx.Client(timeout=60) as client:
        config = client.get(f"{address}/config").json()
        kinds = {part["id"]: part["type"] for part in config["components"]}
        tried = 0
        for function in config["dependencies"]:
            for position, number in enumerate(function["inputs"]):
                if not function["backend_fn"] or kinds[number] not in ("image", "gallery", "multimodaltextbox"):
                    continue
                for path in secret:
                    for shape in shapes_of(path):
                        data = [None] * len(function["inputs"])
                        data[position] = shape
                        text = told(client, address, function["id"], data)
                        tried += 1
                        assert SECRET not in text and not [u for u in urls_in(text) if not u.startswith(str(folder))]
        assert tried > 20
        assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        assert not [path for path in folder.rglob("*") if path.name in ("passwd", "environ")]


def test_files_are_served_from_the_folder_alone(open_studio, secret):
    address, folder = open_studio
    (folder / "link.png").unlink(missing_ok=True)
    (folder / "link.png").symlink_to(secret[0])
    names = [*secret, str(folder / "link.png"), f"{folder}/../../etc/passwd", "http://127.0.0.1:1/a", "/etc/passwd\0"]
    with httpx.Client() as client:
        for name in names:
            for form in (f"file={name}", f"file%3D{name}", f"file/{name}", f"proxy={name}", f"file={name}".upper()):
                form = form.replace("\0", "%00")
                for method in ("GET", "HEAD"):
                    answer = client.request(method, f"{address}/gradio_api/{form}")
                    assert answer.status_code in (400, 403, 404), form
                    assert SECRET not in answer.text


def uploaded(client, address, data=b"", name="a.png", **more):
    return client.post(f"{address}/gradio_api/upload", files=[("files", (name, data))], **more)


def test_foreign_origins_and_hosts_are_refused_on_every_route(open_studio):
    from unilip.serve.studio import BODIES

    address, folder = open_studio
    port = address.rpartition(":")[2]
    paths = ["/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/nowhere"]
    strangers = (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"http://evil.localhost:{port}"},
        {"Origin": "http://localhost:1"}, {"Host": "evil.example"}, {"Host": f"127.0.0.1.evil.example:{port}"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    )  # fmt: skip
    before = sorted(folder.rglob("*"))
    with httpx.Client() as client:
        for headers in strangers:
            for path in [*paths, *BODIES]:
                for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                    more = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
                    answer = client.request(method, address + path, headers={**headers, **more})
                    assert answer.status_code == 403, (method, path, headers)
                    assert not [name for name in answer.headers if name.startswith("access-control")]
            assert uploaded(client, address, b"x" * 100, headers=headers).status_code == 403
        own = {"Origin": address}
        assert client.get(f"{address}/config", headers=own).status_code == 200
        answer = client.get(address, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
        assert answer.status_code == 200, "a link to the page"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_every_local_address_has_the_same_walls(tiny_model, host, secret):
    from unilip.serve.server import is_local

    assert is_local(host)
    try:
        listen(host, 0).close()
    except Exception:
        pytest.skip(f"this machine has no {host}")
    with studio(tiny_model, host) as (address, _), httpx.Client() as client:
        assert client.get(f"{address}/config").status_code == 200
        assert client.get(f"{address}/config", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get(f"{address}/config", headers={"Host": "evil.example"}).status_code == 403
        body = {"data": [file_of(secret[0])], "fn_index": 0, "session_hash": "a"}
        assert client.post(f"{address}/gradio_api/queue/join", json=body).status_code == 403


def test_only_the_routes_of_the_page_are_there(open_studio):
    address, _ = open_studio
    gone = {
        "GET": ("proxy=http://127.0.0.1:1/", "vibe-code", "deep_link", "runs", "monitoring", "openapi.json",
                "custom_component/a/b/c/d", "stream/a/b/c/playlist-file", "call/say/1", "queue/status"),
        "POST": ("vibe-edit", "vibe-code", "undo-vibe-edit", "component_server", "process_recording", "run/say",
                 "api/predict", "call/say", "call/v2/say", "stream/a", "run-history/connect", "upload/"),
    }  # fmt: skip
    with httpx.Client() as client:
        for method, names in gone.items():
            for name in names:
                for path in (f"/gradio_api/{name}", f"/{name}"):
                    assert client.request(method, address + path, json={}).status_code in (404, 405), path
        for method in ("PUT", "PATCH", "DELETE"):
            assert client.request(method, f"{address}/gradio_api/upload").status_code in (404, 405)


def test_uploads_are_counted_and_limited(tiny_model, monkeypatch):
    from unilip.serve import studio as module

    monkeypatch.setattr(module, "MAX_DISK", 10 * module.MIN_FILE)
    with studio(tiny_model) as (address, folder), httpx.Client() as client:
        statuses = [uploaded(client, address, os.urandom(9)).status_code for _ in range(30)]
        assert statuses[0] == 200 and statuses[-1] == 507
        assert module.disk_use(folder) <= 20 * module.MIN_FILE
        large = uploaded(client, address, bytes(module.MAX_UPLOAD + 1))
        assert large.status_code == 413


def reconstruct(client, address):
    """The number of the function that the button "Reconstruct" calls."""
    config = client.get(f"{address}/config").json()
    kinds = {part["id"]: part for part in config["components"]}
    first = {
        one["id"]: kinds[one["inputs"][0]]["props"].get("elem_id") for one in config["dependencies"] if one["inputs"]
    }
    return next(number for number, name in first.items() if name == "reconstruct-source")


def test_pictures_are_gone_when_their_page_is_closed(open_studio):
    address, _ = open_studio
    picture = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(picture, "PNG")
    session = os.urandom(8).hex()
    with httpx.Client(timeout=60) as client, httpx.Client(timeout=60) as other:
        with other.stream("GET", f"{address}/gradio_api/heartbeat/{session}") as beat:
            alive = beat.iter_lines()  # kept: without it the connection would be closed
            next(alive)
            (path,) = uploaded(client, address, picture.getvalue()).json()
            number = reconstruct(client, address)
            body = {"data": [file_of(path), "resize"], "fn_index": number, "session_hash": session}
            assert client.post(f"{address}/gradio_api/queue/join", json=body).status_code == 200
            text, end = "", time.monotonic() + 60
            with client.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}") as stream:
                for line in stream.iter_lines():
                    text += line
                    assert time.monotonic() < end
                    if "process_completed" in line:
                        break
            urls = {*urls_in(text), path}
            assert len(urls) >= 4
            found = [client.get(f"{address}/gradio_api/file={url}") for url in urls]
            assert [answer.status_code for answer in found] == [200] * len(urls)
        left = urls
        while left and time.monotonic() < end:
            with suppress(httpx.ReadError):  # a file that goes while it is sent
                left = {url for url in left if client.get(f"{address}/gradio_api/file={url}").status_code == 200}
            time.sleep(0.3)
        assert not left


def test_a_bomb_is_not_decoded(open_studio):
    """144 million pixels in 20 kB: told beside the button, in a moment."""
    address, _ = open_studio
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    with httpx.Client(timeout=60) as client:
        (path,) = uploaded(client, address, bomb.getvalue()).json()
        started = time.monotonic()
        text = told(client, address, reconstruct(client, address), [file_of(path), "resize"])
        assert "12000x12000 px" in text and time.monotonic() - started < 5


def test_nothing_is_read_or_done_before_the_password(tiny_model, secret):
    from unilip.serve.studio import BODIES

    with studio(tiny_model, hosts=["*"], password=PASSWORD) as (address, folder), httpx.Client() as client:
        before = sorted(folder.rglob("*"))
        for path in set(BODIES) - {"/login"}:
            assert client.post(address + path, content=b"x" * 1000).status_code == 401, path
        for path in ("/config", "/gradio_api/queue/data", "/gradio_api/heartbeat/a", f"/gradio_api/file={secret[0]}"):
            assert client.get(address + path).status_code == 401, path
        assert uploaded(client, address, b"x" * 100).status_code == 401
        assert sorted(folder.rglob("*")) == before
        wrong = [client.post(f"{address}/login", data={"username": "unilip", "password": "a"}) for _ in range(70)]
        assert {400, 429} == {answer.status_code for answer in wrong}, "guessing is limited"
    with studio(tiny_model, hosts=["*"], password=PASSWORD) as (address, folder), httpx.Client() as client:
        form = {"username": "unilip", "password": PASSWORD}
        assert client.post(f"{address}/login", data=form, headers={"Origin": "http://a.example"}).status_code == 403
        assert client.post(f"{address}/login", data=form).status_code == 200
        assert client.get(f"{address}/config").status_code == 200
        body = {"data": [file_of(secret[0])], "fn_index": 0, "session_hash": "a"}
        assert client.post(f"{address}/gradio_api/queue/join", json=body).status_code == 403
        assert client.get(f"{address}/gradio_api/file={secret[0]}").status_code == 403
        assert client.get(f"{address}/config", headers={"Origin": "http://a.example"}).status_code == 403
        assert json.loads(uploaded(client, address, b"x").text)
