"""Randomness is a pure function of (seed, item) and passes the checks a sampler relies on."""

import pytest
import torch

from genkit.rng import ItemRNG, hash_seed


def draws(rng):
    return rng.normal((3, 5)), rng.uniform((2,)), rng.integers(10), rng.normal((7,), dtype=torch.float64)


def test_a_row_does_not_depend_on_its_batch():
    whole = draws(ItemRNG(3, range(16)))
    for rows in ([5], [15, 0], [4, 4]):
        for full, part in zip(whole, draws(ItemRNG(3, rows)), strict=True):
            assert torch.equal(full[rows], part)


def test_indexing_keeps_the_place_in_the_stream():
    rng = ItemRNG(0, range(8))
    rng.normal((2,))
    part = rng[torch.tensor([6, 1])]
    assert torch.equal(rng.normal((2,))[[6, 1]], part.normal((2,)))


def test_seeds_items_and_draws_differ():
    rng = ItemRNG(0, range(4))
    first, second = rng.normal((64,)), rng.normal((64,))
    other = ItemRNG(1, range(4)).normal((64,))
    rows = torch.cat((first, second, other))
    assert len({tuple(r.tolist()) for r in rows}) == len(rows)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.55  # 66 pairs of 64 draws: 4.4 standard errors


def test_negative_and_huge_seeds_are_distinct():
    seeds = [0, 1, -1, 2**31, 2**63 - 1, 2**64 + 1]
    values = [hash_seed(s, 7) for s in seeds]
    assert len(set(values)) == len(seeds) - 1  # 2**64 + 1 is 1 in 64 bits
    assert all(0 <= v < 2**63 for v in values)
    assert hash_seed(1, 2) != hash_seed(2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments(dtype):
    z = ItemRNG(0, range(40_000)).normal((10,), dtype=dtype).double()
    n = z.numel()
    # Standard errors: 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n); five of each.
    for power, mean, se in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean().item() - mean) < 5 * se / n**0.5
    u = ItemRNG(1, range(40_000)).uniform((10,), dtype=dtype).double()
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert 40 < chi2 < 180  # 99 degrees of freedom
    k = ItemRNG(2, range(40_000)).integers(7, (10,))
    assert k.min() == 0 and k.max() == 6
    assert ((torch.bincount(k.flatten()) / n - 1 / 7).abs() < 5 * (6 / 49 / n) ** 0.5).all()


def test_neighbouring_items_are_uncorrelated():
    z = ItemRNG(0, range(20_001)).normal((8,), dtype=torch.float64)
    for lag in (z[:-1] * z[1:], z[:, :-1] * z[:, 1:]):
        assert (lag.mean(0).abs() < 5 / lag.shape[0] ** 0.5).all()


def test_generators_follow_the_item():
    a = ItemRNG(5, [2, 9]).generators()
    b = ItemRNG(5, [9]).generators()
    assert torch.equal(torch.randn(4, generator=a[1]), torch.randn(4, generator=b[0]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"items must have shape \(B,\)"):
        ItemRNG(0, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="high=0"):
        ItemRNG(0, [1]).integers(0)
