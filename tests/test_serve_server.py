"""A real server on a real port: who may listen where, clients that leave, signals, and the verb itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import httpx
import openai
import pytest

from unilip import cli
from unilip.cli import serving
from unilip.errors import UniLIPError
from unilip.serve.app import Settings, create_app
from unilip.serve.engine import Engine
from unilip.serve.guard import Rules
from unilip.serve.server import check_access, is_local, listen, make_server
from unilip.serve.training import Trainer


@contextmanager
def running(engine, drain=20, trainer=None, **rules):
    """A server in a thread: (its address, the server, its thread)."""
    taken = listen("127.0.0.1", 0)
    app = create_app(engine, Settings("tiny", Rules(**{"rate_limit": 0, **rules})), trainer=trainer)
    server = make_server(app, drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}", server, thread
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def engine(tiny_model):
    with Engine(tiny_model) as made:
        yield made


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


LONG = {"prompt": "a", "steps": 200, "n": 8}


def test_a_client_that_leaves_is_cancelled(engine):
    stopped = []
    run = engine._run

    def watched(batch):
        try:
            run(batch)
        finally:
            stopped.append(sum(batch[0].ticket._steps.values()))

    engine._run = watched
    with running(engine) as (address, _, _):
        for body in (LONG, {**LONG, "stream": True}):
            url, patience = f"{address}/v1/images/generations", httpx.Timeout(5, read=0.2)
            started = time.monotonic()
            with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=patience) as response:
                for _ in response.iter_bytes():
                    if time.monotonic() - started > 0.2:
                        raise httpx.ReadTimeout("enough")
            wait_for(lambda: engine.stats().running == 0 and engine.stats().queued == 0)
    assert len(stopped) >= 2 and all(steps < 1600 for steps in stopped), stopped


def test_many_clients_share_batches(tiny_model):
    sizes = []
    with (
        Engine(tiny_model, on_batch=lambda verb, size, seconds: sizes.append(size)) as engine,
        running(engine) as found,
    ):
        client = openai.OpenAI(api_key="x", base_url=f"{found[0]}/v1", max_retries=0)

        def draw(seed):
            return (
                client.images.generate(prompt=f"{seed} stars", extra_body={"seed": seed, "steps": 4}).data[0].b64_json
            )

        draw(0)
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(draw, range(16)))
        assert len(set(together)) == 16 and max(sizes) > 1, sizes


def test_a_signal_lets_accepted_work_finish(engine):
    with running(engine) as (address, server, thread), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "steps": 60}
        found = pool.submit(httpx.post, f"{address}/v1/images/generations", json=body, timeout=60)
        wait_for(lambda: engine.stats().running)
        server.handle_exit(signal.SIGTERM, None)
        assert engine.draining
        assert found.result().status_code == 200
        thread.join(30)
        assert not thread.is_alive() and not engine.alive
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_two_signals_end_all_at_once(engine, caplog):
    trainer = mock.Mock(spec=Trainer)
    with running(engine, trainer=trainer) as (address, server, thread), ThreadPoolExecutor(1) as pool:
        found = pool.submit(httpx.post, f"{address}/v1/images/generations", json=LONG, timeout=60)
        wait_for(lambda: engine.stats().running)
        for _ in range(2):
            server.handle_exit(signal.SIGINT, None)
        assert found.result().status_code == 503
        thread.join(10)
    assert trainer.close.called and not engine.alive and not caplog.records


def test_work_that_takes_too_long_at_the_end_is_given_up(engine):
    with running(engine, drain=1) as (address, server, thread), ThreadPoolExecutor(1) as pool:
        pool.submit(httpx.post, f"{address}/v1/images/generations", json=LONG, timeout=60)
        wait_for(lambda: engine.stats().running)
        started = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        assert not thread.is_alive() and time.monotonic() - started < 15


def test_headers_are_bounded_and_sockets_are_not_spoken_to(engine):
    with running(engine) as (address, _, _):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 400")
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "x" * 22,
        }
        assert httpx.get(f"{address}/v1/images/generations", headers=upgrade).status_code in (400, 403, 405)


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
    ("::", False), ("192.168.1.1", False), ("example.com", False), ("localhost.example.com", False),
])  # fmt: skip
def test_who_can_reach_an_address(host, local):
    assert is_local(host) is local
    if local:
        assert check_access(host, Rules()).hosts
    else:
        with pytest.raises(UniLIPError, match="api-key"):
            check_access(host, Rules())
        with pytest.raises(UniLIPError, match="16"):
            check_access(host, Rules(("short",)))
        assert check_access(host, Rules(("x" * 16,), 5, 6)).max_body == 5


def test_a_taken_port_is_told(tiny_model):
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UniLIPError, match="Cannot listen"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UniLIPError, match="Cannot listen"):
        listen("203.0.113.7", 0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--host", "0.0.0.0"], "api-key"),
        (["--host", "0.0.0.0", "--api-key", "short"], "16"),
        (["--api-key", " "], "empty"),
        (["--max-replicas", "2"], "--ray"),
        (["--ray", "3", "--max-replicas", "2"], "--ray"),
        (["--max-queue", "0"], "between|at least"),
        (["--port", "70000"], "65535"),
    ],
)
def test_bad_options_end_with_2_before_a_model_is_loaded(words, reason, capsys, monkeypatch):
    import re

    monkeypatch.setattr(serving, "load", lambda *a: pytest.fail("the model was loaded"))
    assert cli.main(["serve", *words]) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_the_verb_hands_its_options_on(tiny_folder, monkeypatch):
    seen = {}

    def run(app, taken, drain, on_start):
        seen.update(app=app.state, drain=drain, port=taken.getsockname()[1])
        on_start()
        taken.close()
        app.state.engine.close()

    monkeypatch.setattr("unilip.serve.server.run", run)
    monkeypatch.setenv("UNILIP_API_KEY", "from-the-environment, another-long-key-of-mine")
    words = "--port 0 --max-queue 5 --max-batch 2 --deadline 7 --max-body 3 --max-pixels 1.5 --rate-limit 9 --drain 4"
    assert cli.main(["serve", "--model", str(tiny_folder), *words.split(), "--allow-url-images", "--no-metadata"]) == 0
    settings, engine = seen["app"].settings, seen["app"].engine
    assert (engine.max_queue, engine.max_batch, engine.deadline, seen["drain"]) == (5, 2, 7, 4)
    assert settings.rules.api_keys == ("from-the-environment", "another-long-key-of-mine")
    assert (settings.rules.max_body, settings.rules.rate_limit, settings.max_pixels) == (3 * 2**20, 9, 1_500_000)
    assert settings.allow_url_images and not settings.metadata
    assert settings.model_name == tiny_folder.name, "the path of a folder is nobody's business"


@pytest.mark.slow
def test_the_verb_serves_and_ends_with_0(tiny_folder):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "unilip", "serve", "--model", str(tiny_folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        address = f"http://127.0.0.1:{port}"

        def ready():
            try:
                return httpx.get(f"{address}/ready").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(ready, 120)
        with ThreadPoolExecutor(4) as pool:
            body = {"prompt": "a", "steps": 100}
            found = [
                pool.submit(httpx.post, f"{address}/v1/images/generations", json=body, timeout=60) for _ in range(4)
            ]
            wait_for(lambda: json.loads(httpx.get(f"{address}/health").text)["running"])
            process.send_signal(signal.SIGTERM)
            statuses = [entry.result().status_code for entry in found]
        assert statuses == [200] * 4
        assert process.wait(30) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
