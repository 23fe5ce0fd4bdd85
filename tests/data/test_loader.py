from itertools import islice

import pytest
import torch

from genkit import data
from genkit.data.base import Source
from genkit.data.loader import batches
from genkit.rng import ItemRNG


class Numbers(Source):
    """``x0`` is the record, ``item`` the item."""

    shape = ()

    def __init__(self, length):
        super().__init__()
        self.length = length

    def read(self, records, items):
        return {"x0": records.float(), "item": items, "prompts": [str(r) for r in records.tolist()]}


def take(n, *args, **kwargs):
    return list(islice(batches(*args, **kwargs), n))


def joined(parts):
    together = {key: torch.cat([p[key] for p in parts]) for key in ("x0", "item", "index")}
    return together | {"prompts": sum((p["prompts"] for p in parts), [])}


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("x0", "item", "index")) and a["prompts"] == b["prompts"]


@pytest.mark.parametrize("length", [100, 7, 1])
def test_every_epoch_visits_each_item_once(length):
    stream = joined(take(25 * length, Numbers(length), 4, seed=3))["x0"].view(100, length)
    assert torch.equal(stream.sort(1).values, torch.arange(length).float().expand(100, length))
    if length > 1:
        assert len(stream.unique(dim=0)) > 90 * (length > 5)


def test_index_is_the_position_and_items_tell_visits_apart():
    stream = joined(take(50, Numbers(7), 4))
    assert torch.equal(stream["index"], torch.arange(200))
    assert torch.equal(stream["item"] % 7, stream["x0"].long())
    assert torch.equal(stream["item"] // 7, stream["index"] // 7)
    assert stream["prompts"] == [str(int(x)) for x in stream["x0"]]


@pytest.mark.parametrize("world_size, micro_batches", [(1, 4), (2, 1), (2, 3), (4, 3), (12, 1)])
def test_ranks_and_micro_batches_partition_the_global_batch(world_size, micro_batches):
    source, steps = Numbers(50), 11
    wanted = take(steps, source, 12, seed=1)
    ranks = [
        take(steps * micro_batches, source, 12, seed=1, rank=r, world_size=world_size, micro_batches=micro_batches)
        for r in range(world_size)
    ]
    for k in range(steps):
        parts = [part for rank in ranks for part in rank[k * micro_batches : (k + 1) * micro_batches]]
        assert {len(p["x0"]) for p in parts} == {12 // (world_size * micro_batches)}
        assert equal(joined(parts), wanted[k])


@pytest.mark.parametrize("start", [1, 5, 29, 1000])
def test_resuming_continues_the_run(start):
    layout = dict(seed=2, rank=1, world_size=2, micro_batches=2)
    whole = islice(batches(Numbers(33), 8, **layout), 2 * start, 2 * start + 8)
    assert all(equal(a, b) for a, b in zip(whole, take(8, Numbers(33), 8, start_step=start, **layout), strict=True))


def test_order_follows_the_seed_and_not_the_global_state():
    torch.manual_seed(1)
    first = joined(take(10, Numbers(40), 4, seed=5))
    state = torch.get_rng_state()
    take(10, Numbers(40), 4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert equal(first, joined(take(10, Numbers(40), 4, seed=5)))
    assert not torch.equal(first["x0"], joined(take(10, Numbers(40), 4, seed=6))["x0"])
    plain = joined(take(20, Numbers(40), 4, shuffle=False))
    assert torch.equal(plain["x0"], torch.arange(80).float() % 40)


def test_workers_read_the_same_stream_and_leave_the_global_state_alone():
    arguments = dict(seed=4, rank=1, world_size=2, micro_batches=2, start_step=3)
    wanted = take(12, Numbers(30), 8, **arguments)
    state = torch.get_rng_state()
    got = take(12, Numbers(30), 8, num_workers=2, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_endless_source_is_read_by_position():
    source = data.make("eight_gaussians", seed=3)
    ranks = [take(3, source, 8, rank=r, world_size=2, start_step=2**40) for r in range(2)]
    for k in range(3):
        positions = range((2**40 + k) * 8, (2**40 + k + 1) * 8)
        wanted = source.__getitems__(positions)
        assert torch.equal(torch.cat([rank[k]["x0"] for rank in ranks]), wanted["x0"])
        assert torch.equal(torch.cat([rank[k]["index"] for rank in ranks]), torch.tensor(positions))


def test_index_is_an_identity_for_noise():
    """The noise of an item is the same whichever rank draws it."""
    alone = take(1, Numbers(30), 6, seed=1)[0]
    second = take(1, Numbers(30), 6, seed=1, rank=1, world_size=2)[0]
    assert torch.equal(ItemRNG(0, alone["index"]).normal((3,))[3:], ItemRNG(0, second["index"]).normal((3,)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(global_batch_size=0), "global_batch_size=0: must be at least 1"),
        (dict(global_batch_size=-4), "global_batch_size=-4: must be at least 1"),
        (dict(world_size=3), "global_batch_size=8: must be a multiple of world_size . micro_batches = 3 . 1"),
        (dict(world_size=2, micro_batches=3), "= 2 . 3"),
        (dict(world_size=0), "world_size=0: must be at least 1"),
        (dict(micro_batches=0), "micro_batches=0: must be at least 1"),
        (dict(rank=2, world_size=2), "rank=2: must be below world_size=2"),
        (dict(rank=-1), "rank=-1: must be at least 0"),
        (dict(start_step=-1), "start_step=-1: must be at least 0"),
        (dict(num_workers=-1), "num_workers=-1: must be at least 0"),
        (dict(source=Numbers(0)), "source Numbers is empty"),
        (dict(pin_memory=True), "pin_memory=True needs num_workers"),
    ],
)
def test_errors_come_before_work(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"source": Numbers(5), "global_batch_size": 8, **settings})
