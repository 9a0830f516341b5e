"""The order of samples: a pure function of (seed, epoch, lane), every sample once an epoch, few shards at a time."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unilip.data.order import BLOCK, Mixture, Order
from unilip.errors import DataError

COUNTS = [3, 0, 7, 1, 12, 5, 9]


def epoch_of(order: Order, epoch: int, lane: int = 0) -> list[tuple[int, int]]:
    total = order.total(lane)
    return [order.place(epoch * total + i, lane) for i in range(total)]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 50),
    window=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_sample_comes_once_an_epoch(counts, seed, window, epoch):
    order = Order(counts, seed, "x", window)
    wanted = sorted((shard, place) for shard, count in enumerate(counts) for place in range(count))
    assert sorted(epoch_of(order, epoch)) == wanted


def test_epochs_and_seeds_differ_and_any_number_can_be_asked_for_first():
    order = Order(COUNTS, 3, "x", 2)
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epoch_of(Order(COUNTS, 4, "x", 2), 0) != epochs[0]
    fresh = Order(COUNTS, 3, "x", 2)
    assert [fresh.place(2 * 37 + i) for i in range(30, 37)] == epochs[2][30:], "the middle of the third epoch"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_of_shards_is_read_at_a_time(window):
    order = Order(COUNTS, 0, "x", window)
    shards = [shard for shard, _ in epoch_of(order, 0)]
    blocks, seen = [], set()
    at = 0
    while at < len(shards):  # a block ends when all samples of its shards have come
        block = set()
        size = 0
        while not block or size < sum(COUNTS[s] for s in block):
            block.add(shards[at + size])
            size += 1
        blocks.append(block)
        assert not block & seen
        seen |= block
        at += size
    assert max(map(len, blocks)) <= window
    if window > 1:
        assert any(a != b for a, b in zip(sorted(shards[:5]), shards[:5], strict=True)), "mixed inside"


def test_what_is_ahead_is_what_comes():
    order = Order([4] * 6, 1, "x", 2)
    wanted = {shard for shard, _ in (order.place(i) for i in range(8, 16))}
    assert set(order.ahead(0)) == set(order.ahead(7)) == wanted
    assert set(order.ahead(23)) == {shard for shard, _ in (order.place(i) for i in range(24, 32))}, "the next epoch"


def test_lanes_share_out_the_shards():
    order = Order([5] * 8, 2, "x", 2, lanes=4)
    own = [{shard for shard, _ in epoch_of(order, 0, lane)} for lane in range(4)]
    assert all(len(shards) == 2 for shards in own) and set().union(*own) == set(range(8))
    assert [{shard for shard, _ in epoch_of(order, 5, lane)} for lane in range(4)] == own, "in every epoch the same"
    with pytest.raises(DataError, match="2 shards with samples for 3 lanes"):
        Order([5, 0, 5], 0, "x", lanes=3)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.72, 0.28), (5, 0, 2), (1, 999)])
def test_a_mixture_is_exact_and_counts_its_streams(weights):
    mixture = Mixture(weights, 0, "x")
    drawn = [mixture.pick(i) for i in range(BLOCK, 3 * BLOCK)]
    seen = Counter(stream for stream, _ in drawn)
    for stream, weight in enumerate(weights):
        assert abs(seen[stream] - 2 * BLOCK * weight / sum(weights)) <= 2
        numbers = [number for which, number in drawn if which == stream]
        assert numbers == list(range(seen[stream] // 2, seen[stream] // 2 + seen[stream])), "one after the other"


def test_a_mixture_is_mixed():
    picks = [Mixture((1, 1), 0, "x").pick(i)[0] for i in range(40)]
    assert 10 < sum(picks) < 30 and picks != sorted(picks)
    assert picks != [Mixture((1, 1), 1, "x").pick(i)[0] for i in range(40)]


@pytest.mark.parametrize("weights", [(), (0, 0), (1, -1), (1, float("nan")), (1, 1e-6)])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(DataError, match="weight"):
        Mixture(weights, 0, "x")
