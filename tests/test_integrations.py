"""The examples of clients, run as they stand against a real server of the tiny model."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "serving"
KEY = "a key for the examples"


@pytest.fixture(scope="module")
def address(tiny_model):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from unilip.serve.app import Settings, create_app
    from unilip.serve.engine import Engine
    from unilip.serve.guard import Rules
    from unilip.serve.server import listen, make_server

    taken = listen("127.0.0.1", 0)
    with Engine(tiny_model) as engine:
        server = make_server(create_app(engine, Settings("tiny", Rules(api_keys=(KEY,)))), 5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def test_the_openai_client(address, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="the openai client is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openai_client.py", address, KEY])
    runpy.run_path(str(EXAMPLES / "openai_client.py"), run_name="__main__")
    assert Image.open("client-stars.png").text["seed"] == "7"
    assert Image.open("client-pink.png").size == (56, 56)
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(address, tmp_path):
    folder = Path(sys.executable).parent
    ran = subprocess.run(
        ["sh", str(EXAMPLES / "curl.sh"), address, KEY], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "no_proxy": "127.0.0.1"}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert [Image.open(tmp_path / f"curl-{name}.png").size for name in ("stars", "pink", "again")] == [(56, 56)] * 3
    assert ran.stdout.endswith("\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_says_when_it_is_refused(address, tmp_path):
    ran = subprocess.run(
        ["sh", str(EXAMPLES / "curl.sh"), address, "wrong"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "no_proxy": "127.0.0.1"}, check=False,
    )  # fmt: skip
    assert ran.returncode != 0 and "401" in ran.stderr
