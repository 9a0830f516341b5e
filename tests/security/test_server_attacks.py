"""The server on a real port, with clients that stall, flood, lie and do not read. Loopback only, and bounded."""

import concurrent.futures
import io
import json
import logging
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from unilip.serve import guard, log, server
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules

KEY = "a-key-of-twenty-four-signs"
TALK = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 4, "modalities": ["text"]}


@contextmanager
def running(model, drain=5, engine=None, **rules):
    """A server in a thread: its port, itself, and the application."""
    taken = server.listen("127.0.0.1", 0)
    engine = engine or Engine(model)
    app = create_app(engine, Settings("tiny", Rules(**{"rate_limit": 0, **rules})))
    made = server.make_server(app, drain)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [taken]})
    thread.start()
    while not made.started:
        time.sleep(0.01)
    try:
        yield taken.getsockname()[1], made, app
    finally:
        made.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def raw(port, data=b"", source="127.0.0.1"):
    sock = socket.create_connection(("127.0.0.1", port), 20, source_address=(source, 0))
    sock.sendall(data)
    return sock


def ended(sock, seconds):
    """Whether the other side closes within so many seconds; what it said before is read and forgotten."""
    sock.settimeout(seconds)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if not sock.recv(65536):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def head(path, *lines, method="POST"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def test_foreign_pages_are_refused_on_every_route_and_method(tiny_model):
    strangers = ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"},
                 {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"})  # fmt: skip
    with (
        running(tiny_model) as (port, _, app),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        kept = [getattr(route, "original_router", None) or route for route in app.routes]  # as FastAPI keeps routers
        routes = [inner for route in kept for inner in getattr(route, "routes", [route])]
        paths = {route.path.replace("{name:path}", "a").replace("{name}", "a") for route in routes} | {"/nowhere"}
        assert {"/v1/images/generations", "/v1/chat/completions", "/v1/models"} <= paths and len(paths) > 15
        assert len(paths) > 10
        for path in sorted(paths - {"/v1/images/files/a"}):
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                for headers in strangers:
                    more = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
                    answer = client.request(method, path, headers={**headers, **more})
                    assert answer.status_code == 403, (method, path, headers)
                    assert not [name for name in answer.headers if name.startswith("access-control")]
    keyed = {"Authorization": f"Bearer {KEY}", "Origin": "http://evil.example"}
    with running(tiny_model, api_keys=(KEY,)) as (port, _, _):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=keyed).status_code == 403


def test_pages_of_an_allowed_origin_can_ask(tiny_model):
    page = "https://chat.example"
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with (
        running(tiny_model, api_keys=(KEY,), origins=(page,)) as (port, _, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        leave = client.options("/v1/chat/completions", headers={"Origin": page, **wanted})
        assert leave.status_code == 204 and leave.headers["access-control-allow-origin"] == page
        assert "authorization" in leave.headers["access-control-allow-headers"].lower()
        assert "POST" in leave.headers["access-control-allow-methods"] and leave.headers["vary"] == "Origin"
        answer = client.post("/v1/chat/completions", headers={"Origin": page, "api-key": KEY}, json=TALK)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page
        refused = client.get("/v1/models", headers={"Origin": page})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
        other = client.options("/v1/models", headers={"Origin": "https://other.example", **wanted})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_no_body_is_read_before_the_key_nor_where_none_is_needed(tiny_model):
    """100 half-sent bodies to open routes and without a key: who has a key is served meanwhile, and all are closed."""
    with running(tiny_model, api_keys=(KEY,), max_body=2**20) as (port, _, _):
        many = [
            raw(port, head(path, f"Content-Length: {2**20}") + b"x" * 60_000)
            for path in ("/health", "/docs", "/openapi.json", "/v1/images/edits", "/v1/images/files/a") * 20
        ]
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json=TALK, timeout=30, headers={"api-key": KEY}
        )
        assert answer.status_code == 200
        assert all(ended(sock, 5) for sock in many)
        endless = raw(port, head("/v1/images/edits", "Transfer-Encoding: chunked"))
        with pytest.raises(OSError):
            for _ in range(2000):
                endless.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
                time.sleep(0.005)


def test_bodies_that_stop_are_given_up(tiny_model, monkeypatch):
    monkeypatch.setattr(guard, "PIECE_SECONDS", 0.3)
    with running(tiny_model) as (port, _, app):
        sock = raw(port, head("/v1/images/edits", "Content-Length: 1000") + b"x" * 10)
        assert sock.recv(1000).startswith(b"HTTP/1.1 408") and ended(sock, 3)
        assert app.state.engine.stats().queued == 0


def test_silent_and_half_heads_are_closed(tiny_model, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with running(tiny_model) as (port, _, _):
        silent = raw(port)
        dribble, half = raw(port), raw(port, b"GET /health HTTP/1.1\r\nHost: loc")
        stop = threading.Event()

        def drip():
            try:
                while not stop.wait(0.1):
                    dribble.sendall(b"G")
            except OSError:
                return

        thread = threading.Thread(target=drip)
        thread.start()
        assert ended(silent, 4) and ended(half, 4) and ended(dribble, 4)
        stop.set()
        thread.join()


def test_connections_are_kept_for_those_who_have_asked_before(tiny_model, monkeypatch):
    """A client's pool takes one up again after many seconds; what begins a head then has to end it."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with running(tiny_model) as (port, _, _):
        kept = raw(port)
        for _ in range(2):
            kept.sendall(head("/health", method="GET"))
            found = kept.recv(10_000)
            while not found.endswith(b"}") and (more := kept.recv(10_000)):
                found += more
            assert found.startswith(b"HTTP/1.1 200") and found.endswith(b"}")
            time.sleep(2.5)
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert ended(kept, 4)


def test_answers_that_nobody_reads_are_dropped(tiny_model, monkeypatch):
    monkeypatch.setattr(server, "STUCK_SECONDS", 1.0)
    with running(tiny_model) as (port, made, app):
        app.state.server.store.put(bytes(40_000_000), "image/png")
        (name,) = app.state.server.store._kept
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(head(f"/v1/images/files/{name}", method="GET"))
        end = time.monotonic() + 10
        while not made.server_state.connections:
            time.sleep(0.01)
        while made.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not made.server_state.connections
        slow = httpx.get(f"http://127.0.0.1:{port}/v1/images/files/{name}", timeout=30)
        assert len(slow.content) == 40_000_000, "who reads gets all"


def test_a_crowd_of_idle_connections_keeps_nobody_out(tiny_model, monkeypatch):
    monkeypatch.setattr(server, "MAX_OF_ADDRESS", 40)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 100)
    with running(tiny_model) as (port, made, _):
        crowd = [raw(port, source=f"127.0.0.{2 + number % 5}") for number in range(300)]
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        assert len(made.server_state.connections) <= 101
        assert sum(ended(sock, 0.02) for sock in crowd) >= 195


def test_work_that_fills_all_connections_of_an_address_is_told(tiny_model, monkeypatch):
    monkeypatch.setattr(server, "MAX_OF_ADDRESS", 3)
    with running(tiny_model) as (port, _, _):
        held = [raw(port, head("/v1/images/edits", "Content-Length: 1000") + b"x") for _ in range(3)]
        time.sleep(0.3)
        found = raw(port, head("/health", method="GET")).recv(1000)
        assert found.startswith(b"HTTP/1.1 503") and b"Retry-After" in found
        other = raw(port, head("/health", method="GET"), source="127.0.0.9").recv(1000)
        assert other.startswith(b"HTTP/1.1 200")
        for sock in held:
            sock.close()


def test_one_address_does_not_fill_the_queue(tiny_model):
    """Who asks for little is served before the many pictures of another address, and where it left no place."""
    hold = threading.Event()
    engine = Engine(tiny_model, max_queue=16)
    run = engine._run
    engine._run = lambda batch: hold.wait(300) and run(batch)
    with running(tiny_model, engine=engine) as (port, _, _), concurrent.futures.ThreadPoolExecutor(10) as pool:

        def ask(source, **body):
            with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=300) as client:
                answer = client.post(f"http://127.0.0.1:{port}/v1/images/generations", json={"prompt": "a", **body})
                return answer.status_code, time.monotonic(), answer.headers.get("retry-after")

        crowd = [pool.submit(ask, "127.0.0.2", n=2, steps=3 + k) for k in range(8)]
        while engine.stats().queued < 14:
            time.sleep(0.01)
        other = [pool.submit(ask, "127.0.0.3", n=2, steps=1)]
        while engine.stats().queued < 16:
            time.sleep(0.01)
        other += [pool.submit(ask, "127.0.0.1", n=2, steps=2)]
        (refused,) = concurrent.futures.wait(crowd, return_when="FIRST_COMPLETED").done
        assert refused.result()[0] == 429 and int(refused.result()[2]) >= 1
        hold.set()
        assert [one.result()[0] for one in other] == [200, 200]
        ends = [one.result()[1] for one in crowd if one.result()[0] == 200]
        assert len(ends) == 7 and max(one.result()[1] for one in other) < sorted(ends)[1], "after the batch at work"


def test_the_address_of_a_client_is_what_it_cannot_choose():
    names = {
        "192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7", "::1": "::/64", "testclient": "testclient",
        "2001:db8:1:2:3::4": "2001:db8:1:2::/64", "2001:db8:1:2:ffff::": "2001:db8:1:2::/64",
        "fe80::1%eth0": "fe80::/64",
    }  # fmt: skip
    assert {name: guard.network((name, 1)) for name in names} == names and guard.network(None) == "unknown"


def test_wrong_keys_are_limited_and_any_key_can_be_right(tiny_model):
    key = "clé-ключ-鍵-of-some-length"
    with running(tiny_model, api_keys=(key,)) as (port, _, _):
        url = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
        statuses = [httpx.get(url, headers={"api-key": "wrong"}).status_code for _ in range(150)]
        assert statuses[0] == 401 and statuses.count(429) > 20
        assert httpx.get(url, headers={b"api-key": key.encode()}).status_code == 200


def test_one_port_has_one_server():
    from unilip.errors import UniLIPError

    with server.listen("127.0.0.1", 0) as taken, pytest.raises(UniLIPError, match="Cannot listen"):
        server.listen("127.0.0.1", taken.getsockname()[1])


def test_what_is_not_done_at_the_end_gets_an_honest_503(tiny_model):
    hold = threading.Event()
    engine = Engine(tiny_model)
    engine._run = lambda batch: hold.wait(30)
    with (
        running(tiny_model, drain=1, engine=engine) as (port, made, _),
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        found = [pool.submit(httpx.post, url, json={"prompt": "a"}, timeout=60) for _ in range(4)]
        end = time.monotonic() + 10
        while engine.stats().running + engine.stats().queued < 4 and time.monotonic() < end:
            time.sleep(0.02)
        made.handle_exit(signal.SIGTERM, None)
        answers = [one.result(20) for one in found]
        hold.set()
    assert [answer.status_code for answer in answers] == [503] * 4
    assert all(
        answer.json()["error"]["code"] == "shutting_down" and answer.headers["retry-after"] for answer in answers
    )


def test_what_came_before_the_end_and_was_not_read_gets_its_503(tiny_model):
    """Connections in the kernel's queue, and requests on open ones, while the event loop is too busy to look."""
    with running(tiny_model) as (port, made, _):
        opened = [raw(port) for _ in range(3)]
        time.sleep(0.3)
        loop = made.servers[0].get_loop()
        loop.call_soon_threadsafe(loop.call_later, 0.25, time.sleep, 4 * server.GRACE_SECONDS)
        made.handle_exit(signal.SIGTERM, None)
        time.sleep(0.6)
        text = json.dumps({"prompt": "a"})
        request = head("/v1/images/generations", "Content-Type: application/json", f"Content-Length: {len(text)}")
        for sock in opened:
            sock.sendall(request + text.encode())
        opened += [raw(port, request + text.encode()) for _ in range(3)]
        for sock in opened:
            found = sock.recv(10_000)
            assert found.startswith(b"HTTP/1.1 503") and b"retry-after" in found.lower(), found[:200]


def test_health_fails_when_work_fails(tiny_model):
    engine = Engine(tiny_model)
    run, engine._run = engine._run, lambda batch: 1 / 0
    with (
        running(tiny_model, engine=engine) as (port, _, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for _ in range(5):
            assert client.get("/health").status_code == 200
            failed = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1})
            assert failed.status_code == 503 and failed.headers["retry-after"]
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        engine._run = run
        assert client.post("/v1/images/generations", json={"prompt": "a", "steps": 1}).status_code == 200
        assert client.get("/health").status_code == 200


# --- the log


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise ValueError("I/O operation on closed file")


@pytest.fixture
def logging_as_served():
    roots = [logging.getLogger(name) for name in (None, "unilip")]
    before = [(one, list(one.handlers), one.level) for one in roots]
    yield
    for one, handlers, level in before:
        one.handlers[:] = handlers
        one.setLevel(level)
    log.access.setLevel(logging.WARNING)


@pytest.mark.parametrize("stderr", [Broken(), None], ids=["full disk", "closed"])
def test_a_log_that_cannot_be_written_stops_nothing(tiny_model, monkeypatch, logging_as_served, stderr):
    from unilip.cli.terminal import say

    monkeypatch.setattr(sys, "stderr", stderr)
    log.set_up(with_access=True)
    say("nobody hears this")
    engine = Engine(tiny_model)
    run, engine._run = engine._run, lambda batch: 1 / 0
    with (
        running(tiny_model, engine=engine) as (port, _, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert client.post("/v1/images/generations", json={"prompt": "a", "steps": 1}).status_code == 503
        engine._run = run
        assert client.post("/v1/images/generations", json={"prompt": "a", "steps": 1}).status_code == 200


def test_the_log_tells_time_level_request_cause_and_traceback(tiny_model, monkeypatch, logging_as_served):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    engine = Engine(tiny_model)
    engine._run = lambda batch: 1 / 0
    with (
        running(tiny_model, engine=engine) as (port, _, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for form in ("json", "text"):
            log.set_up("info", form, with_access=True)
            answer = client.post("/v1/images/generations", json={"prompt": "a"})
            name = answer.headers["x-request-id"]
            client.get("/%0aFAKE%20LINE")
            if form == "json":
                lines = [json.loads(line) for line in out.getvalue().splitlines()]
                (failure,) = [line for line in lines if line["level"] == "ERROR"]
                assert failure["request"] == name and failure["cause"] == "ZeroDivisionError: division by zero"
                assert "Traceback" in failure["traceback"] and failure["time"].endswith("Z")
                (access,) = [
                    line for line in lines if name == line.get("request") and line["logger"] == "unilip.access"
                ]
                assert "POST /v1/images/generations 503" in access["message"] and "127.0.0.1" in access["message"]
                out.truncate(0)
                out.seek(0)
            else:
                text = out.getvalue()
                assert (
                    f"ERROR unilip.serve.engine [{name}] " in text and "\nZeroDivisionError: division by zero" in text
                )
                assert "\nFAKE" not in text and "FAKE LINE" in text


# --- pictures


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(form, size=(64, 48), **more):
    out = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(out, form, **more)
    return out.getvalue()


def scans(count, size=(2000, 2000)):
    """A progressive JPEG whose last scan is repeated."""
    data = saved("JPEG", size, progressive=True, quality=5)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + data[-2:]


BOMBS = {
    "scans of a JPEG": scans(3000, (256, 256)),
    "empty chunks of a PNG": (png := saved("PNG"))[:33] + chunk(b"tEXt") * 400_000 + png[33:],
    "filling of a JPEG": b"\xff\xd8" + b"\xff" * 8_000_000 + saved("JPEG")[2:],
    "pixels of a PNG": png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:],
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "a page": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("place", ["edits", "mask", "chat"])
def test_bombs_are_refused_in_a_moment(tiny_model, place):
    import base64

    with running(tiny_model) as (port, _, _), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for name, data in BOMBS.items():
            started = time.monotonic()
            if place == "chat":
                url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
                parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
                answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
            else:
                files = [("image", ("a.jpg", data if place == "edits" else png))]
                files += [("mask", ("m.jpg", data))] if place == "mask" else []
                answer = client.post("/v1/images/edits", files=files, data={"prompt": "a"})
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["code"] == "invalid_image", name
            assert time.monotonic() - started < 3, name


def test_pictures_that_take_long_keep_no_text_waiting(tiny_model):
    """The most that is decoded: 24 million pixels in a hundred scans, twenty of them at once."""
    slow = scans(60, (4800, 4800))
    with running(tiny_model) as (port, _, _), concurrent.futures.ThreadPoolExecutor(20) as pool:
        url = f"http://127.0.0.1:{port}/v1"
        form = {"prompt": "a", "deadline": "2"}
        many = [
            pool.submit(httpx.post, f"{url}/images/edits", files={"image": slow}, data=form, timeout=90)
            for _ in range(20)
        ]
        time.sleep(0.5)
        times = []
        for _ in range(5):
            started = time.monotonic()
            assert httpx.post(f"{url}/chat/completions", json=TALK, timeout=60).status_code == 200
            times.append(time.monotonic() - started)
        statuses = [one.result().status_code for one in many]
        assert max(times) < 10, times
        assert set(statuses) <= {200, 400, 408, 429} and 408 in statuses
