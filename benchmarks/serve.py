"""Measure the server: throughput, latency, faults and memory, with the embedded model.

    python benchmarks/serve.py                       # short: some minutes on a core
    python benchmarks/serve.py --requests 10000      # the long run of mixed requests

1. In a process of its own, an engine is called in sequence: one picture after the other.
2. `unilip serve` is started in another, and as many pictures are drawn by one client and by `--clients` at once.
   The pictures of all three must be the same. (`--pictures 0` leaves 1 and 2 out.)
3. `--requests` of all kinds, 5 % of them malformed, by `--clients` clients with an address each, beside `--misbehaving`
   others that stall, send halves, do not read, lie and leave: statuses, 5xx, latency, resident memory. Then SIGTERM
   while requests run.

The bound of latency is what an honest client is promised, who has one request at a time: the batch that is at work,
one batch of each other honest client, and its own; however many others misbehave. A batch counts as a full one of the
slowest kind of honest request, measured without misbehaving clients, before and after the load (the mean).
A table goes to stdout, and everything to a file with `--json FILE`. The server is a child of this process and uses the
processors that it may use (`taskset`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

PROMPTS = (
    "three yellow stars",
    "a red car",
    "two dogs",
    "a blue circle and a green square",
    "a cat on a pink background",
)
EDITS = ("change the background to pink", "remove the star", "make it blue", "add a red circle")
QUESTIONS = ("What is this?", "How many stars are there?", "What color is the background?")
BAD_SHARE = 0.05
Rows = list[tuple[str, str]]
VERBS = ("generate", "edit", "reconstruct", "ask")


def in_sequence(pictures: int, steps: int | None, model: str | None) -> dict[str, Any]:
    """Draw pictures one after the other with an engine of this process."""
    here = Path(__file__).resolve().parent  # a neighbour named like a module of Python's must not be taken for it
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    from unilip import UniLIP
    from unilip.serve.engine import Engine
    from unilip.serve.jobs import Generate

    with Engine(UniLIP.from_pretrained(model)) as engine:
        engine.submit(Generate(PROMPTS[0], seed=0, steps=steps)).result()
        started, seconds, images = time.perf_counter(), [], []
        for seed in range(pictures):
            result = engine.submit(Generate(PROMPTS[seed % len(PROMPTS)], seed=seed, steps=steps)).result()
            seconds.append(result.seconds)
            images.append(np.asarray(result.images[0]))
        return {"seconds": time.perf_counter() - started, "latencies": seconds, "images": images}


@contextmanager
def server(options: list[str]) -> Any:
    """Start `unilip serve`; give its address and its process, and end it by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unilip", "serve", "--port", str(port), "--rate-limit", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}:\n" + "".join(log))
            try:
                if httpx.get(f"{address}/ready", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield address, process, log
    finally:
        process.terminate()
        process.wait(60)
        reader.join(5)


def opened(b64: str) -> np.ndarray:
    """The pixels of a picture in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def draw(client: httpx.Client, seed: int, steps: int | None) -> tuple[float, np.ndarray]:
    """Ask for a picture: seconds and pixels."""
    started = time.perf_counter()
    body = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed} | ({} if steps is None else {"steps": steps})
    found = client.post("/v1/images/generations", json=body)
    found.raise_for_status()
    return time.perf_counter() - started, opened(found.json()["data"][0]["b64_json"])


def at_once(address: str, clients: int, pictures: int, steps: int | None) -> dict[str, Any]:
    """Draw pictures with so many clients at once."""
    with ThreadPoolExecutor(clients) as pool, httpx.Client(base_url=address, timeout=600) as client:
        started = time.perf_counter()
        found = list(pool.map(lambda seed: draw(client, seed, steps), range(pictures)))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "latencies": [entry[0] for entry in found], "images": [entry[1] for entry in found]}


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    return float(np.quantile(values, share))


def batches(address: str, verb: str = "generate") -> dict[str, float]:
    """Read the metrics page: the number of batches of a verb, the pictures or questions in them, and their seconds."""
    page = httpx.get(f"{address}/metrics", timeout=600).text

    def value(name: str) -> float:
        found = re.search(rf'^unilip_{name}{{verb="{verb}"}} (\S+)', page, re.MULTILINE)
        return float(found[1]) if found else 0.0

    count, pictures = value("batch_size_count"), value("batch_size_sum")
    return {"batches": count, "pictures": pictures, "seconds": value("batch_seconds_sum")}


def packed(image: Image.Image, form: str = "PNG") -> bytes:
    """Encode a picture."""
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def status(response: httpx.Response) -> int:
    """The status of an answer; of a stream that ended in an error 599, though it began with 200."""
    return 599 if 'data: {"error"' in response.text else response.status_code


def pick_of(choices: Sequence[str], number: int) -> str:
    """One of them, by number."""
    return choices[number % len(choices)]


class Mix:
    """Requests of all kinds, from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        self.image = Image.fromarray(colours).resize((160, 120))
        self.files = [packed(self.image), packed(self.image, "JPEG"), packed(self.image, "WEBP")]
        self.url = "data:image/png;base64," + base64.b64encode(self.files[0]).decode()

    def send(self, client: httpx.Client, number: int) -> tuple[str, int]:
        """Send request `number`: its kind and the status of the answer."""
        pick = random.Random(self.seed * 1_000_003 + number)
        if pick.random() < BAD_SHARE:
            return "malformed", self.malformed(client, pick)
        kind = pick.choice(["generate", "generate", "edit", "reconstruct", "ask", "ask", "stream", "talk"])
        steps = pick.choice([4, 4, 8])
        file = pick.choice(self.files)
        if kind in ("generate", "stream"):
            body = {"prompt": pick.choice(PROMPTS), "seed": number, "steps": steps, "n": pick.choice([1, 1, 2])}
            body |= (
                {"stream": True} if kind == "stream" else {"response_format": pick.choice(["b64_json"] * 9 + ["url"])}
            )
            return kind, status(client.post("/v1/images/generations", json=body))
        if kind == "edit":
            fields = {"prompt": pick.choice(EDITS), "steps": str(steps), "seed": str(number)}
            return kind, client.post("/v1/images/edits", data=fields, files={"image": file}).status_code
        if kind == "reconstruct":
            return kind, client.post("/v1/images/reconstructions", files={"image": file}).status_code
        if kind == "ask":
            content = [
                {"type": "text", "text": pick.choice(QUESTIONS)}, {"type": "image_url", "image_url": {"url": self.url}}
            ]  # fmt: skip
        else:
            content = [{"type": "text", "text": f"Draw {pick.choice(PROMPTS)}"}]
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 16,
            "steps": steps,
            "stream": pick.random() < 0.5,
        }
        return kind, status(client.post("/v1/chat/completions", json=body))

    def heaviest(self, client: httpx.Client, verb: str, number: int) -> None:
        """Send the heaviest honest request of a verb."""
        if verb == "generate":
            body = {"prompt": pick_of(PROMPTS, number), "seed": number, "steps": 8}
            found = client.post("/v1/images/generations", json=body)
        elif verb == "edit":
            fields = {"prompt": pick_of(EDITS, number), "steps": "8", "seed": str(number)}
            found = client.post("/v1/images/edits", data=fields, files={"image": self.files[0]})
        elif verb == "reconstruct":
            found = client.post("/v1/images/reconstructions", files={"image": self.files[0]})
        else:
            picture = {"type": "image_url", "image_url": {"url": self.url}}
            content = [{"type": "text", "text": pick_of(QUESTIONS, number)}, picture]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
            found = client.post("/v1/chat/completions", json=body)
        found.raise_for_status()

    def malformed(self, client: httpx.Client, pick: random.Random) -> int:
        """Send something that must be refused."""
        as_json = {"Content-Type": "application/json"}
        whole = self.files[0]
        image = bytes(pick.randrange(256) for _ in range(200))
        choices = [
            lambda: client.post("/v1/images/generations", json={"prompt": ""}),
            lambda: client.post("/v1/images/generations", json={"prompt": "a", "steps": 10**6}),
            lambda: client.post("/v1/images/generations", content=b'{"prompt": ', headers=as_json),
            lambda: client.post("/v1/images/generations", content=b"[" * 20_000, headers=as_json),
            lambda: client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": image}),
            lambda: client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": whole[: len(whole) // 2]}),
            lambda: client.post("/v1/images/reconstructions", files={"image": whole[:-9] + b"PK\x03\x04"}),
            lambda: client.post(
                "/v1/images/reconstructions", content=b"--x", headers={"Content-Type": "multipart/form-data"}
            ),
            lambda: client.post("/v1/chat/completions", json={"messages": []}),
            lambda: client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "word " * 5000}]}
            ),
            lambda: client.get("/v1/" + "".join(pick.choice("abc/.%") for _ in range(12))),
        ]
        return pick.choice(choices)().status_code


class Nuisance:
    """Clients that misbehave, on twenty addresses of the loopback network, in an event loop of their own."""

    def __init__(self, address: str, count: int) -> None:
        self.port, self.count = int(address.rpartition(":")[2]), count
        self.done: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Nuisance:
        self.thread.start()
        self.tasks = [asyncio.run_coroutine_threadsafe(self.client(n), self.loop) for n in range(self.count)]
        return self

    def __exit__(self, *error: object) -> None:
        for task in self.tasks:
            task.cancel()
        time.sleep(0.5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def client(self, number: int) -> None:
        """Misbehave in one way after the other, each time on a new connection."""
        pick = random.Random(number)
        post = b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n"
        ways: dict[str, bytes] = {
            "says nothing": b"",
            "sends half a head": b"GET /health HTTP/1.1\r\nHost: lo",
            "sends half a body": post + b"Content-Length: 1000000\r\n\r\n" + b"x" * 50_000,
            "sends half a body where none is wanted": post.replace(b"v1/images/edits", b"health")
            + b"Content-Length: 1000000\r\n\r\n" + b"x" * 50_000,
            "does not read": b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
            "speaks another language": bytes(pick.randrange(256) for _ in range(300)) + b"\r\n\r\n",
            "is a foreign page": post.replace(b"localhost", b"evil.example") + b"Content-Length: 5\r\n\r\nabcde",
            "leaves": b'POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
            b'Content-Length: 29\r\n\r\n{"prompt": "a", "steps": 100}',
        }  # fmt: skip
        while True:
            way = pick.choice(list(ways))
            source = (f"127.0.0.{2 + number % 20}", 0)
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=source)
                writer.write(ways[way])
                await asyncio.wait_for(writer.drain(), 5)
                if way == "leaves":
                    await asyncio.sleep(pick.random())
                elif way == "does not read":
                    await asyncio.sleep(10)
                else:
                    while await asyncio.wait_for(reader.read(65536), 45):
                        pass
                writer.close()
            except (OSError, TimeoutError, asyncio.TimeoutError):
                pass
            self.done[way] += 1
            await asyncio.sleep(pick.random())


def resident(pid: int) -> float:
    """Resident memory of a process in MiB (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def full_batch(address: str, clients: int, size: int) -> float:
    """Seconds of a full batch of the slowest kind of honest request."""
    mix, seconds = Mix(1), {}
    for verb in VERBS:
        before = batches(address, verb)
        with Crowd(address, clients) as crowd:
            list(crowd.map(lambda client, number, verb=verb: mix.heaviest(client, verb, number), range(2 * size)))
        after = batches(address, verb)
        seconds[verb] = (after["seconds"] - before["seconds"]) / (after["batches"] - before["batches"])
    return max(seconds.values())


class Crowd:
    """Honest clients, each in a thread and with an address of its own."""

    def __init__(self, address: str, clients: int) -> None:
        self.address, self.numbers, self.own = address, itertools.count(1), threading.local()
        self.pool = ThreadPoolExecutor(clients, initializer=self.connect)
        self.clients: list[httpx.Client] = []

    def connect(self) -> None:
        """Give a thread its client."""
        transport = httpx.HTTPTransport(local_address=f"127.0.1.{next(self.numbers)}")
        self.own.client = httpx.Client(base_url=self.address, timeout=600, transport=transport)
        self.clients.append(self.own.client)

    def submit(self, work: Any, *given: Any) -> Any:
        """Have a client do something."""
        return self.pool.submit(lambda: work(self.own.client, *given))

    def map(self, work: Any, numbers: Any) -> Iterator[Any]:
        """Have the clients do something for each number, and give what came of it in order."""
        for found in [self.submit(work, number) for number in numbers]:
            yield found.result()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()
        for client in self.clients:
            client.close()


def mixed(address: str, pid: int, clients: int, requests: int, seconds: float | None, log: Any) -> dict[str, Any]:
    """Send requests of all kinds; watch statuses and memory."""
    mix, lock = Mix(1), threading.Lock()
    statuses: dict[str, Counter[int]] = {}
    memory: list[tuple[int, float]] = []
    latencies: dict[str, list[float]] = {}
    done = 0
    every = max(1, requests // 500)

    def one(client: httpx.Client, number: int) -> None:
        nonlocal done
        if seconds is not None and time.perf_counter() - begun > seconds:
            return
        started = time.perf_counter()
        kind, status = mix.send(client, number)
        with lock:
            latencies.setdefault(kind, []).append(time.perf_counter() - started)
            statuses.setdefault(kind, Counter())[status] += 1
            done += 1
            if done % every == 0:
                memory.append((done, resident(pid)))
            if done % max(1, requests // 10) == 0:
                log(f"  {done} of {requests} requests, {memory[-1][1] if memory else 0:.0f} MiB")

    begun = time.perf_counter()
    with Crowd(address, clients) as crowd:
        list(crowd.map(one, range(requests)))
    quarters = [[m for n, m in memory if low < n / done <= low + 0.25] for low in (0, 0.75)]
    before, after = map(statistics.mean, quarters)
    honest = [value for kind, found in latencies.items() if kind != "malformed" for value in found]
    every_status: Counter[int] = sum(statuses.values(), Counter())
    return {
        "requests": done,
        "seconds": time.perf_counter() - begun,
        "statuses": {str(s): c for s, c in sorted(every_status.items())},
        "by_kind": {kind: {str(s): c for s, c in sorted(found.items())} for kind, found in sorted(statuses.items())},
        "server_errors": sum(count for status, count in every_status.items() if status >= 500),
        "accepted_malformed": sum(c for s, c in statuses.get("malformed", Counter()).items() if s < 400),
        "refused_good": sum(
            c for k, found in statuses.items() if k != "malformed" for s, c in found.items() if s >= 400
        ),
        "p50": percentile(honest, 0.5),
        "p95": percentile(honest, 0.95),
        "p100": max(honest),
        "p95_by_kind": {kind: percentile(found, 0.95) for kind, found in sorted(latencies.items())},
        "latencies": latencies,
        "dishonest_server_errors": sum(
            count for status, count in every_status.items() if status >= 500 and status != 503
        ),
        "memory_first_mib": before,
        "memory_last_mib": after,
        "memory_drift": after / before - 1,
        "memory": memory,
    }


def throughput(address: str, o: argparse.Namespace, sequence: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    """Draw pictures with one client and with many, and compare them with those that were drawn in sequence."""
    at_once(address, 1, 1, o.steps)
    one = at_once(address, 1, o.pictures, o.steps)
    before = batches(address)
    many = at_once(address, o.clients, o.pictures, o.steps)
    after = batches(address)
    run = {key: after[key] - before[key] for key in after}
    ways = {"sequence": sequence, "one": one, "many": many}
    rates = {name: o.pictures / found["seconds"] for name, found in ways.items()}
    difference = max(
        int(np.abs(a.astype(int) - b.astype(int)).max())
        for other in (one, many)
        for a, b in zip(sequence["images"], other["images"], strict=True)
    )
    result = {
        "pictures_per_second": rates,
        "speedup": rates["many"] / rates["sequence"],
        "latency": {
            name: {f"p{round(100 * share)}": percentile(found["latencies"], share) for share in (0.5, 0.95, 1.0)}
            for name, found in ways.items()
        },
        "mean_batch": run["pictures"] / max(1, run["batches"]),
        "batch_seconds": run["seconds"] / max(1, run["batches"]),
        # who arrives last finds a batch at work and all others before him: full batches, his own among the last
        "bound": (-(-o.clients // o.max_batch) + 1) * o.max_batch * run["seconds"] / max(1, run["pictures"]),
        "identical_pictures": sum(map(np.array_equal, sequence["images"], many["images"])),
        "largest_difference": difference,
    }
    latency = result["latency"]["many"]
    rows = [
        ("pictures/s, engine in sequence", f"{rates['sequence']:.2f}"),
        ("pictures/s, server, 1 client", f"{rates['one']:.2f}"),
        (f"pictures/s, server, {o.clients} clients", f"{rates['many']:.2f}"),
        ("clients at once over sequence", f"{result['speedup']:.2f} x (wanted: 1.5)"),
        ("mean batch, seconds of a batch", f"{result['mean_batch']:.1f}, {result['batch_seconds']:.2f}"),
        (f"latency of {o.clients} clients, p50 / p95", f"{latency['p50']:.2f} / {latency['p95']:.2f} s"),
        ("bound: full batches in front and one's own", f"{result['bound']:.2f} s"),
        (
            "pictures equal to the sequence's bit by bit",
            f"{result['identical_pictures']} of {o.pictures}, largest difference {difference} of 255",
        ),
    ]
    return result, rows


def ended(address: str, process: subprocess.Popen[str], clients: int) -> Counter[str]:
    """Send SIGTERM while every client waits for a picture of 20 steps: what they got."""
    ends: Counter[str] = Counter()
    with Crowd(address, clients) as crowd:
        body = {"prompt": PROMPTS[0], "steps": 20}
        for one in [crowd.submit(lambda client: client.get("/health")) for _ in range(clients)]:
            one.result()
        last = [crowd.submit(lambda client: client.post("/v1/images/generations", json=body)) for _ in range(clients)]
        time.sleep(1)
        process.terminate()
        for one in last:
            try:
                found = one.result()
                told = found.status_code != 503 or "retry-after" in found.headers
                ends[f"{found.status_code}{'' if told else ' without Retry-After'}"] += 1
            except httpx.HTTPError as error:
                ends[type(error).__name__] += 1
    return ends


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a folder or hub id; the embedded model by default")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=32, help="of each throughput run (32); 0 leaves these out")
    parser.add_argument("--steps", type=int, help="of these pictures (the model's own)")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="of the mixed run (200; the long run has 10000)")
    parser.add_argument("--seconds", type=float, help="and no more of them after so many")
    parser.add_argument("--misbehaving", type=int, default=200, help="clients that misbehave meanwhile (200)")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    o = parser.parse_args()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows: Rows = []
    result: dict[str, Any] = vars(o).copy()
    if o.pictures:
        log("1. the engine in sequence")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sequence = pool.apply(in_sequence, (o.pictures, o.steps, o.model))
    model = [] if o.model is None else ["--model", o.model]
    options = ["--max-batch", str(o.max_batch), "--max-queue", str(4 * o.clients), *model]
    with server(options) as (address, process, noise):
        if o.pictures:
            log("2. the server, one client and many")
            result["throughput"], rows = throughput(address, o, sequence)
        longest = [full_batch(address, o.clients, o.max_batch)]
        log(f"3. {o.requests} mixed requests; a full batch takes {longest[0]:.2f} s")
        with Nuisance(address, o.misbehaving) as nuisance:
            load = mixed(address, process.pid, o.clients, o.requests, o.seconds, log)
        longest.append(full_batch(address, o.clients, o.max_batch))
        with Nuisance(address, o.misbehaving):
            ends = ended(address, process, o.clients)
    bound = (o.clients + 1) * statistics.mean(longest)
    honest = [value for kind, found in load.pop("latencies").items() if kind != "malformed" for value in found]
    over = sum(value > bound for value in honest)
    result |= {
        "mixed": load, "full_batch": longest, "bound": bound, "over_bound": over, "misbehaved": dict(nuisance.done),
        "sigterm": dict(ends), "server_said": [line.strip() for line in noise],
    }  # fmt: skip
    rows += [
        ("mixed requests, seconds", f"{load['requests']}, {load['seconds']:.0f}"),
        ("statuses", ", ".join(f"{status}: {count}" for status, count in load["statuses"].items())),
        ("5xx; other than 503", f"{load['server_errors']}; {load['dishonest_server_errors']}"),
        (
            "latency of mixed requests, p50 / p95 / longest",
            f"{load['p50']:.2f} / {load['p95']:.2f} / {load['p100']:.2f} s",
        ),
        ("seconds of a full batch, before and after", " / ".join(f"{one:.2f}" for one in longest)),
        (f"bound: {o.clients + 1} full batches; honest requests over it", f"{bound:.2f} s; {over} (wanted: 0)"),
        ("misbehaving clients, connections they made", f"{o.misbehaving}, {sum(nuisance.done.values())}"),
        ("SIGTERM under load", ", ".join(f"{status}: {count}" for status, count in sorted(ends.items()))),
        (
            "malformed that were accepted, good that were refused",
            f"{load['accepted_malformed']}, {load['refused_good']}",
        ),
        (
            "resident memory, first / last quarter of the mixed requests",
            f"{load['memory_first_mib']:.0f} / {load['memory_last_mib']:.0f} MiB",
        ),
        ("drift", f"{100 * load['memory_drift']:+.1f} % (wanted: within 5)"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if o.json:
        temporary = f"{o.json}.part"
        Path(temporary).write_text(json.dumps(result, indent=1), encoding="utf-8")
        os.replace(temporary, o.json)


if __name__ == "__main__":
    main()
