"""The engine: batches, queue, deadlines, cancellation, progress, seeds, drain. In: a tiny model. No network."""

import asyncio
import heapq
import random
import threading
import time

import numpy as np
import pytest
import torch

from unilip.errors import ImageError, PromptError, UniLIPError
from unilip.serve.engine import Engine, Limits
from unilip.serve.jobs import (
    Ask,
    Cancelled,
    DeadlineExceeded,
    Draining,
    Edit,
    EngineFailed,
    Generate,
    QueueFull,
    Reconstruct,
    Turn,
)
from unilip.serve.log import CLIENT


def close_to(one, other):
    """Equal but for rounding: a batch of another size may round the last bit differently."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


class Gate:
    """Lets a test hold the worker inside a step: `entered` says that it is there, `open` lets it go on."""

    def __init__(self, engine):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches = []
        run = engine._run

        def held(batch):
            self.batches.append([unit.seed for unit in batch])
            self.entered.set()
            assert self.opened.wait(30)
            run(batch)

        engine._run = held

    def open(self):
        self.opened.set()


@pytest.fixture
def engine(tiny_model):
    with Engine(tiny_model, max_queue=16, max_batch=8) as made:
        yield made


@pytest.fixture
def gated(engine):
    gate = Gate(engine)
    first = engine.submit(Generate("first", seed=1000, steps=1))
    assert gate.entered.wait(30)
    yield engine, gate, first
    gate.open()


def test_a_picture_does_not_depend_on_its_batch(gated):
    engine, gate, _ = gated
    alone = {}
    jobs = [Generate(f"{n} stars", seed=n, steps=2, guidance_scale=2.0) for n in range(6)]
    tickets = [engine.submit(job) for job in jobs]
    gate.open()
    together = [ticket.result(60).images[0] for ticket in tickets]
    assert gate.batches[1] == [0, 1, 2, 3, 4, 5], "they should have shared a batch"
    for job, picture in zip(jobs, together, strict=True):
        alone[job.seed] = engine.submit(job).result(60).images[0]
        assert close_to(alone[job.seed], picture)
    assert not close_to(alone[0], alone[1])


def test_the_engine_draws_what_the_model_draws(engine, tiny_model, picture):
    import torch

    source = picture(80, 40)
    found = engine.submit(Edit(source, "make it red", count=2, seed=5, steps=2, keep_aspect=True)).result(60)
    expected = tiny_model.edit(
        source, "make it red", num_images_per_prompt=2, num_inference_steps=2, keep_aspect=True, progress=False,
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
    ).images  # fmt: skip
    assert found.seeds == (5, 6) and found.settings["num_inference_steps"] == 2
    assert [i.size for i in found.images] == [i.size for i in expected]
    assert all(close_to(a, b) for a, b in zip(found.images, expected, strict=True))
    again = engine.submit(Reconstruct(source, fit="pad", keep_aspect=True)).result(60)
    assert close_to(again.images[0], tiny_model.reconstruct(source, fit="pad", keep_aspect=True).images[0])
    assert 0 < again.psnr[0] < 60


def test_answers_are_those_of_the_model(gated, tiny_model, picture):
    engine, gate, _ = gated
    one, two = picture(seed=1), picture(seed=2)
    history = (Turn("user", "What is this?", (one,)), Turn("assistant", "A dog."))
    tickets = [
        engine.submit(Ask("How many birds?", (two,), max_new_tokens=12)),
        engine.submit(Ask("Which colour is the car?", max_new_tokens=5)),
        engine.submit(Ask("And this?", (two,), history, max_new_tokens=8)),
    ]
    gate.open()
    texts = [ticket.result(60) for ticket in tickets]
    assert len(gate.batches[1]) == 3
    turns = [{"role": t.role, "content": t.text, "images": list(t.images)} for t in history]
    assert texts[0].text == tiny_model.ask(two, "How many birds?", max_new_tokens=12)
    assert texts[1].text == tiny_model.ask(None, "Which colour is the car?", max_new_tokens=5)
    assert texts[2].text == tiny_model.ask(two, "And this?", history=turns, max_new_tokens=8)
    for found, limit in zip(texts, (12, 5, 8), strict=True):
        assert found.completion_tokens <= limit and found.prompt_tokens > 3
        assert (found.finish_reason == "length") == (found.completion_tokens == limit)


def test_sampled_answers_repeat_with_their_seed(engine):
    def answer(seed):
        return engine.submit(Ask("What is this?", max_new_tokens=10, temperature=2.0, seed=seed)).result(60).text

    assert answer(1) == answer(1) == answer(np.int64(1)) == answer(torch.tensor(1))
    assert len({answer(seed) for seed in range(4)}) > 1


def test_a_streamed_answer_comes_in_pieces(engine):
    ticket = engine.submit(Ask("How many dogs are there?", max_new_tokens=10))
    pieces = [event.text for event in ticket.events() if event.kind == "text"]
    assert len(pieces) > 1 and "".join(pieces) == ticket.result().text


def test_different_settings_do_not_share_a_batch(gated, picture):
    engine, gate, _ = gated
    engine.submit(Generate("a", seed=1, steps=1))
    engine.submit(Generate("b", seed=2, steps=2))
    engine.submit(Generate("c", seed=3, steps=1))
    engine.submit(Generate("d", seed=4, steps=1, guidance_scale=1.0))
    engine.submit(Generate("e", seed=5, steps=1, solver="euler"))
    engine.submit(Generate("f", seed=6, steps=1, image_size=84))
    engine.submit(Generate("g", seed=7, steps=1, negative_prompt="h"))
    last = engine.submit(Edit(picture(), "a", seed=8, steps=1))
    gate.open()
    last.result(60)
    assert gate.batches[1:] == [[1, 3], [2], [4], [5], [6], [7], [8]]


def test_large_pictures_make_small_batches(gated):
    engine, gate, _ = gated
    tickets = [engine.submit(Generate("a", seed=n, steps=1, image_size=112)) for n in range(4)]
    gate.open()
    assert all(ticket.result(60).images[0].size == (112, 112) for ticket in tickets)
    assert gate.batches[1:] == [[0, 1], [2, 3]]  # four times the area, a quarter of 8


def test_progress_counts_every_step_of_every_picture(engine):
    ticket = engine.submit(Generate("a star", count=3, seed=1, steps=4))
    events = list(ticket.events())
    assert events[0].kind == "start" and {event.steps for event in events} == {12}
    steps = [event.step for event in events if event.kind == "step"]
    assert steps[-1] == 12 and steps == sorted(steps)
    late = list(ticket.events())  # who asks afterwards gets the same
    assert late == events


def test_a_full_queue_refuses_and_says_when(gated):
    engine, gate, _ = gated
    tickets = [engine.submit(Generate("a", count=8, seed=0, steps=1)) for _ in range(2)]
    with pytest.raises(QueueFull) as caught:
        engine.submit(Generate("b", steps=1))
    assert caught.value.retry_after >= 1
    tickets[0].cancel()
    assert engine.submit(Generate("b", steps=1)).done is False
    gate.open()


def as_client(name, engine, job):
    token = CLIENT.set(name)
    try:
        return engine.submit(job)
    finally:
        CLIENT.reset(token)


def test_clients_are_served_as_if_each_had_an_equal_share(gated):
    """Whatever they queue, and whether it is finished or given up; of each one the oldest is first."""
    engine, gate, _ = gated
    charge = engine._charge
    engine._charge = lambda batch, seconds: charge(batch, batch[0].ticket.settings["num_inference_steps"])
    crowd = [as_client("crowd", engine, Generate("a", seed=n, steps=k)) for n, k in ((1, 40), (2, 2), (3, 3))]
    first, second = (as_client(name, engine, Generate("b", seed=n, steps=n)) for name, n in (("one", 4), ("two", 5)))
    assert engine.ahead(first) == 4
    gate.open()
    crowd[-1].result(60)
    assert gate.batches[1:] == [[4], [5], [1], [2], [3]] and first.done and second.done
    gate.opened.clear()
    gate.entered.clear()
    left = as_client("crowd", engine, Generate("a", seed=6, steps=100))
    assert gate.entered.wait(30)
    later = [as_client(name, engine, Generate("c", seed=n, steps=n)) for name, n in (("crowd", 7), ("new", 8))]
    left.cancel()
    gate.open()
    assert later[0].result(60) and gate.batches[-2:] == [[8], [7]]
    assert len(engine._used) <= 4, "who has no more than a share is forgotten"


class VirtualTime:
    """An engine without a model, whose steps take a unit of time: 16 honest clients, and 200 that queue 100 steps and
    leave, on 20 addresses. `waits` has the times of the honest requests, `refused` counts those that had no place."""

    def __init__(self, model, seed=0):
        self.random, self.now, self.events, self.waits, self.refused = random.Random(seed), 0, [], [], 0
        self.engine = Engine(model, max_queue=64, batch_wait=0)
        self.engine._run = self.run
        charge, self.charged = self.engine._charge, 0
        self.engine._charge = lambda batch, seconds: charge(batch, self.passed())

    def passed(self):
        before, self.charged = self.charged, self.now
        return self.charged - before

    def at(self, delay, what, *given):
        heapq.heappush(self.events, (self.now + delay, len(self.events) + self.random.random(), what, given))

    def start(self):
        self.engine.submit(Generate("a", steps=1, seed=0))
        for number in range(200):
            self.at(1, self.leaving, number)
        for number in range(16):
            self.at(1, self.honest, number)

    def honest(self, number):
        steps, count = self.random.choice([4, 5, 6, 7, 8]), self.random.choice([1, 1, 2])
        try:
            ticket = as_client(f"honest {number}", self.engine, Generate("b", count=count, steps=steps))
            ticket.listen(lambda event, since=self.now: event.kind == "end" and self.answered(number, ticket, since))
        except QueueFull:
            self.refused += 1
            self.at(4, self.honest, number)
        except Draining:
            pass

    def answered(self, number, ticket, since):
        if ticket.succeeded:
            self.waits.append(self.now - since)
        else:
            self.refused += 1
        self.at(1, self.honest, number)

    def leaving(self, number):
        try:
            ticket = as_client(f"address {number % 20}", self.engine, Generate("c", steps=100))
            self.at(self.random.randrange(1, 40), ticket.cancel)
        except (QueueFull, Draining):
            pass
        self.at(self.random.randrange(40, 80), self.leaving, number)

    def run(self, batch):
        for _ in range(batch[0].ticket.settings["num_inference_steps"]):
            self.now += 1
            while self.events and self.events[0][0] <= self.now:
                _, _, what, given = heapq.heappop(self.events)
                what(*given)
            self.engine._checkpoint(batch)
        for unit in batch:
            unit.ticket._made[unit.index] = unit
            if len(unit.ticket._made) == unit.ticket.job.count:
                unit.ticket._succeed()


def test_no_honest_client_waits_longer_than_for_one_batch_of_each_other(tiny_model):
    """In steps of the model, so that no machine is too slow for it: the batch at work and a full one for each of 16."""
    time_ = VirtualTime(tiny_model)
    with time_.engine:
        time_.start()
        end = time.monotonic() + 300
        while len(time_.waits) < 500 and time.monotonic() < end:
            time.sleep(0.01)
        waits, refused = list(time_.waits), time_.refused
        time_.engine._run = lambda batch: [unit.ticket.cancel() for unit in batch]
    assert len(waits) >= 500 and refused == 0 and max(waits) <= 17 * 8


def test_a_full_queue_has_places_for_who_holds_fewer(gated):
    engine, gate, _ = gated
    old, new = (as_client("crowd", engine, Generate("a", count=8, seed=n, steps=1)) for n in (0, 8))
    for name, count in (("crowd", 1), ("other", 10)):
        with pytest.raises(QueueFull):
            as_client(name, engine, Generate("b", count=count, steps=1))
    assert not old.done and not new.done and engine.stats().queued == 16, "refused before anything gave way"
    other = as_client("other", engine, Generate("b", count=3, steps=1))
    with pytest.raises(QueueFull, match="others came first") as caught:
        new.result(1)
    assert caught.value.retry_after >= 1 and not old.done and engine.stats().queued == 11
    with pytest.raises(QueueFull):
        as_client("other", engine, Generate("b", count=6, steps=1))
    gate.open()
    assert len(old.result(60).images) == 8 and len(other.result(60).images) == 3


def test_cancelling_while_waiting_frees_the_queue(gated):
    engine, gate, _ = gated
    ticket = engine.submit(Generate("a", count=5, seed=1, steps=1))
    assert engine.stats().queued == 5
    assert ticket.cancel() and not ticket.cancel()
    assert engine.stats().queued == 0
    with pytest.raises(Cancelled):
        ticket.result(1)
    gate.open()


def test_cancelling_stops_between_steps(engine):
    ticket = engine.submit(Generate("a", seed=1, steps=200))
    for event in ticket.events():
        if event.kind == "step":
            ticket.cancel()
    started = time.monotonic()
    assert engine.submit(Generate("b", seed=2, steps=1)).result(60).images
    assert time.monotonic() - started < 5
    assert sum(ticket._steps.values()) < 100, "the rest was computed for nobody"


def test_a_cancelled_member_does_not_harm_its_batch(gated):
    engine, gate, _ = gated
    job = Generate("a", seed=1, steps=3)
    one, two = engine.submit(job), engine.submit(Generate("b", seed=2, steps=3))
    two.listen(lambda event: event.kind == "step" and two.cancel())
    gate.open()
    assert close_to(one.result(60).images[0], engine.submit(job).result(60).images[0])
    with pytest.raises(Cancelled):
        two.result(1)


def test_deadlines_pass_in_the_queue_and_while_drawing(gated):
    engine, gate, _ = gated
    waiting = engine.submit(Generate("a", steps=1), deadline=0.01)
    gate.open()
    with pytest.raises(DeadlineExceeded):
        waiting.result(60)
    with pytest.raises(DeadlineExceeded):
        engine.submit(Generate("a", steps=200), deadline=0.05).result(60)


def test_drain_finishes_what_was_accepted(gated):
    engine, gate, first = gated
    second = engine.submit(Generate("a", steps=1))
    finished = []
    drainer = threading.Thread(target=lambda: finished.append(engine.drain(60)))
    drainer.start()
    while not engine.draining:
        time.sleep(0.01)
    with pytest.raises(Draining):
        engine.submit(Generate("late", steps=1))
    gate.open()
    drainer.join(60)
    assert finished == [True] and first.result(0).images and second.result(0).images


def test_drain_gives_up_after_its_time(gated):
    engine, gate, first = gated
    assert engine.drain(0.05) is False
    with pytest.raises(Draining):
        first.result(0)
    gate.open()


def test_a_failing_batch_is_tried_one_by_one(gated, monkeypatch):
    engine, gate, _ = gated
    tickets = [engine.submit(Generate(f"p{n}", seed=n, steps=1)) for n in range(3)]
    run = engine._run

    def fragile(batch):
        if any(unit.seed == 1 for unit in batch):
            raise RuntimeError("out of memory")
        run(batch)

    engine._run = fragile
    gate.open()
    assert tickets[0].result(60).images and tickets[2].result(60).images
    with pytest.raises(EngineFailed) as caught:
        tickets[1].result(60)
    assert "out of memory" not in str(caught.value)
    assert engine.alive


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Generate(""), PromptError),
        (Generate("word " * 600), PromptError),
        (Generate("a", negative_prompt="word " * 600), PromptError),
        (Generate("a", count=0), UniLIPError),
        (Generate("a", count=11), UniLIPError),
        (Generate("a", steps=0), UniLIPError),
        (Generate("a", steps=201), UniLIPError),
        (Generate("a", guidance_scale=float("nan")), UniLIPError),
        (Generate("a", solver="magic"), UniLIPError),
        (Generate("a", seed=-1), UniLIPError),
        (Generate("a", seed=2**63), UniLIPError),
        (Generate("a", image_size=57), UniLIPError),
        (Generate("a", image_size=140), UniLIPError),
        (Ask("a", max_new_tokens=0), UniLIPError),
        (Ask("a", max_new_tokens=1025), UniLIPError),
        (Ask("a", max_new_tokens=510), PromptError),
        (Ask("a", top_p=0.0), UniLIPError),
        (Ask("a", temperature=-1.0), UniLIPError),
        (Ask("a", max_tiles=13), UniLIPError),
        (Ask("a", history=(Turn("system", "x"),)), PromptError),
        (Edit("nothing", "a"), ImageError),  # type: ignore[arg-type]
    ],
)
def test_bad_jobs_never_reach_the_queue(engine, job, error):
    with pytest.raises(error):
        engine.submit(job)
    assert engine.stats().queued == 0


def test_limits_can_be_changed(tiny_model, picture):
    with Engine(tiny_model, limits=Limits(count=1, steps=2, image_size=56, new_tokens=3, images=1, tiles=1)) as engine:
        for job in (
            Generate("a", count=2), Generate("a", steps=3), Generate("a", steps=1, image_size=84),
            Ask("a", max_new_tokens=4), Ask("a", (picture(), picture()), max_new_tokens=3),
            Ask("a", max_new_tokens=3, max_tiles=2),
        ):  # fmt: skip
            with pytest.raises(UniLIPError):
                engine.submit(job)


def test_parts_that_are_missing_are_named(fresh_model):
    with Engine(fresh_model(parts=("encoder", "latent_head", "pixel_decoder"))) as engine:
        assert engine.verbs == ("reconstruct",)
        with pytest.raises(UniLIPError, match="mllm"):
            engine.submit(Generate("a"))


def test_it_can_be_awaited_and_a_cancelled_task_cancels(engine):
    async def follow():
        ticket = engine.submit(Generate("a", seed=1, steps=3))
        kinds = [event.kind async for event in ticket.events_async()]
        result = await ticket.result_async()
        lost = engine.submit(Generate("a", steps=200))
        task = asyncio.ensure_future(lost.result_async())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return kinds, result, lost

    kinds, result, lost = asyncio.run(follow())
    assert kinds == ["start", "step", "step", "step"] and len(result.images) == 1
    with pytest.raises(Cancelled):
        lost.result(5)


def test_batches_are_reported(tiny_model):
    seen = []
    with Engine(tiny_model, on_batch=lambda verb, size, seconds: seen.append((verb, size, seconds > 0))) as engine:
        engine.submit(Generate("a", count=2, steps=1)).result(60)
        engine.drain(60)
    assert seen == [("generate", 2, True)]


def test_a_hung_step_is_told_and_ends_at_its_deadline(tiny_model):
    release = threading.Event()
    with Engine(tiny_model, deadline=0.6) as engine:
        run, engine._run = engine._run, lambda batch: release.wait(20)
        first = engine.submit(Generate("a"), deadline=600)
        with pytest.raises(DeadlineExceeded):
            first.result(5)
        wait_until(lambda: not engine.alive)
        engine._run = run
        release.set()
        wait_until(lambda: engine.alive)


def test_failures_in_a_row_are_told_until_one_succeeds(tiny_model):
    with Engine(tiny_model) as engine:
        run, engine._run = engine._run, lambda batch: 1 / 0
        for number in range(5):
            assert engine.alive, number
            with pytest.raises(EngineFailed):
                engine.submit(Generate("a")).result(20)
        assert not engine.alive
        engine._run = run
        engine.submit(Generate("a", steps=1)).result(20)
        assert engine.alive


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_question_without_an_answer_fails_alone_and_is_told(gated, monkeypatch):
    """NaN in one row of a batch: that one fails, once, and the others are answered word by word as ever."""
    engine, gate, _ = gated
    logits, model = engine.model.mllm.logits, engine.model

    def spoiled(hidden):
        found = logits(hidden).clone()
        if len(found) == 3:
            found[1] = float("nan")
        return found

    monkeypatch.setattr(model.mllm, "logits", spoiled)
    tickets = [engine.submit(Ask(question, max_new_tokens=5)) for question in ("a", "b", "c")]
    gate.open()
    for number in (0, 2):
        text = "".join(event.text for event in tickets[number].events() if event.kind == "text")
        assert text == tickets[number].result(60).text
    with pytest.raises(EngineFailed):
        tickets[1].result(60)
    monkeypatch.setattr(model.mllm, "logits", lambda hidden: logits(hidden) * float("nan"))
    for number in range(5):
        assert engine.alive, number
        with pytest.raises(EngineFailed):
            engine.submit(Ask("a", max_new_tokens=5)).result(60)
    assert not engine.alive
    monkeypatch.setattr(model.mllm, "logits", logits)
    assert engine.submit(Ask("a", max_new_tokens=2)).result(60) and engine.alive


def test_changes_of_the_model_wait_for_a_batch(fresh_model):
    model = fresh_model()
    with Engine(model) as engine:
        expected = engine.submit(Generate("a", seed=1, steps=20)).result(60).images[0]
        ticket = engine.submit(Generate("a", seed=1, steps=20))
        next(event for event in ticket.events() if event.kind == "step")
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        assert ticket.done or not engine.stats().running
        assert close_to(ticket.result(60).images[0], expected)
        assert not close_to(engine.submit(Generate("a", seed=1, steps=20)).result(60).images[0], expected)
