"""A checkout of ComfyUI with the node pack: the shipped workflow by its API, its answer, its pictures, and Cancel."""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import aiohttp  # which ComfyUI brings

checkout, pack, place = map(Path, sys.argv[1:])
base, port = place.resolve() / "base", int(os.environ.get("COMFYUI_PORT", 28188))
(base / "custom_nodes").mkdir(parents=True, exist_ok=True)
(base / "page").mkdir(exist_ok=True)
(base / "page" / "index.html").write_text("")
if not (base / "custom_nodes" / "unilip").exists():
    (base / "custom_nodes" / "unilip").symlink_to(pack.resolve())
LONG = 1000  # steps, of which only the first few are taken
command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", port, "--base-directory", base]
command += ["--front-end-root", base / "page", "--disable-api-nodes", "--disable-all-custom-nodes"]
command += ["--whitelist-custom-nodes", "unilip"]


def call(path: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read() or b"{}")


def history(number: str) -> dict:
    while not (found := call(f"/history/{number}")):
        time.sleep(2)
    return found[number]


async def cancelled(prompt: dict) -> list[int]:
    """Interrupt a workflow as soon as it tells of a step; return the steps that it told of."""
    steps: list[int] = []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://127.0.0.1:{port}/ws?clientId=c") as told:
        call("/prompt", {"prompt": prompt, "client_id": "c"})
        while True:
            message = await told.receive(timeout=600)
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            kind, data = (found := json.loads(message.data))["type"], found["data"]
            if kind == "progress" and data["max"] == LONG:
                if not steps:
                    call("/interrupt", {})
                steps.append(data["value"])
            elif kind in ("execution_interrupted", "execution_success", "execution_error"):
                assert kind == "execution_interrupted", message.data
                return steps


process = subprocess.Popen(list(map(str, command)), cwd=checkout, stdout=sys.stderr)
try:
    while True:
        try:
            version = call("/system_stats")["system"]["comfyui_version"]
            break
        except OSError:
            assert process.poll() is None, "ComfyUI ended"
            time.sleep(2)
    nodes = [name for name in call("/object_info") if name.startswith("UniLIP")]
    workflow = json.loads((pack / "workflows" / "draw-edit-ask.json").read_text())
    done = history(call("/prompt", {"prompt": workflow})["prompt_id"])
    assert done["status"]["status_str"] == "success", done["status"]
    shown = {name: done["outputs"][name]["text"] for name in ("7", "8")}
    for picture in done["outputs"]["6"]["images"]:
        assert (base / "output" / picture["filename"]).read_bytes()[:4] == b"\x89PNG"
    workflow["2"]["inputs"] |= {"steps": LONG, "count": 16, "seed": 5}
    steps = asyncio.run(cancelled(workflow))
    found = {"version": version, "nodes": len(nodes), "answer": shown["7"], "psnr": shown["8"]}
    found |= {"steps": LONG, "cancelled_at": steps[-1]}
    print(json.dumps(found))
finally:
    process.terminate()
    process.wait(120)
