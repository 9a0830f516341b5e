"""The application on Ray Serve: two replicas, one killed under load. Slow: it starts a Ray of its own."""

import os
import pickle
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from fastapi.testclient import TestClient

pytest.importorskip("ray")

from unilip.errors import UniLIPError
from unilip.serve.app import Settings, create_app
from unilip.serve.guard import Rules
from unilip.serve.jobs import Ask, Cancelled, DeadlineExceeded, Generate
from unilip.serve.remote import RemoteEngine, ReplicaLost

pytestmark = pytest.mark.slow


def free_ports(count):
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def engine(tiny_folder):
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "300000"}
    # ports that are given need not be waited for, which on a busy machine takes longer than Ray is patient
    names = ("metrics_agent_port", "dashboard_agent_listen_port", "metrics_export_port", "runtime_env_agent_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "include_dashboard": False, "object_store_memory": 100 * 2**20, **ports},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace="unilip")
        with RemoteEngine(str(tiny_folder), replicas=2, max_queue=64) as made:
            end = time.monotonic() + 300
            while len(made.processes()) < 2:
                assert time.monotonic() < end, "the second replica did not start"
                time.sleep(0.5)
            yield made
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_replicas_draw_what_the_model_draws(engine, tiny_model):
    import torch

    ticket = engine.submit(Generate("three stars", seed=3, steps=4, count=2))
    steps = [event.step for event in ticket.events() if event.kind == "step"]
    expected = tiny_model.generate(
        "three stars", num_inference_steps=4, num_images_per_prompt=2, progress=False,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    result = ticket.result()
    assert steps and steps[-1] == 8 and result.seeds == (3, 4)
    for one, other in zip(result.images, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    answer = engine.submit(Ask("What is this?", max_new_tokens=6)).result(60)
    assert answer.text == tiny_model.ask(None, "What is this?", max_new_tokens=6) and answer.prompt_tokens > 3


def test_bad_jobs_cancelling_and_deadlines(engine):
    with pytest.raises(UniLIPError):
        engine.submit(Generate("a", count=99))
    ticket = engine.submit(Generate("a", steps=200, count=8))
    time.sleep(0.3)
    assert ticket.cancel()
    with pytest.raises(Cancelled):
        ticket.result(5)
    with pytest.raises(DeadlineExceeded):
        engine.submit(Generate("a", steps=200, count=8), deadline=0.2).result(30)
    end = time.monotonic() + 30
    while engine.stats().queued or engine.stats().running:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert engine.submit(Generate("a", steps=1)).result(60).images


def test_a_killed_replica_loses_only_what_it_held(engine):
    client = TestClient(create_app(engine, Settings("tiny", Rules(rate_limit=0))), base_url="http://localhost")
    end = time.monotonic() + 60
    while len(before := engine.processes()) < 2:  # the engine is ready with its first replica
        assert time.monotonic() < end

    def draw(seed):
        body = {"prompt": "a star", "seed": seed, "steps": 40}
        found = client.post("/v1/images/generations", json=body)
        return found.status_code, found.headers.get("retry-after"), found.json()

    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(draw, seed) for seed in range(60)]
        while sum(entry.done() for entry in work) < 6:
            time.sleep(0.02)
        os.kill(next(iter(before)), signal.SIGKILL)
        found = [entry.result() for entry in work]
    statuses = [status for status, _, _ in found]
    lost = [entry for entry in found if entry[0] != 200]
    assert set(statuses) <= {200, 503} and len(lost) <= 12, statuses  # never more than were under way
    for status, retry, body in lost:
        assert status == 503 and int(retry) >= 1 and "replica" in body["error"]["message"]
        assert body["error"]["code"] == "engine_failed"
    assert draw(1)[0] == 200
    end = time.monotonic() + 120
    while len(engine.processes()) < 2:
        assert time.monotonic() < end, "no other replica was started"
        time.sleep(1)
    assert engine.processes() != before


def test_the_error_of_a_lost_replica_can_be_retried():
    error = pickle.loads(pickle.dumps(ReplicaLost("gone", 1.0)))
    assert type(error) is ReplicaLost and str(error) == "gone" and error.retry_after == 1.0
