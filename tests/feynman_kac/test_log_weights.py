"""Log-weights: statistics with known values, evidence across resamplings, groups."""

import math

import pytest
import torch

from genkit.feynman_kac import LogWeights
from genkit.feynman_kac.resampling import RESAMPLERS
from genkit.rng import ItemRNG

F64 = torch.float64
W = torch.tensor([[0.7, 0.2, 0.05, 0.05]], dtype=F64)


def weights(values, memory=0):
    values = torch.as_tensor(values, dtype=F64)
    return LogWeights.equal(*values.shape, memory).add(values)


def test_statistics():
    log_weights = weights(W.log() + 3)
    assert log_weights.ess.item() == pytest.approx(1 / (W**2).sum().item(), abs=1e-12)
    assert log_weights.ess.item() == pytest.approx(1.8692, abs=5e-5)
    assert log_weights.entropy.item() == pytest.approx(0.6284, abs=5e-5)
    assert log_weights.log_z.item() == pytest.approx(3 - math.log(4), abs=1e-12)
    assert LogWeights.equal(2, 5).ess.tolist() == pytest.approx([5, 5]) and LogWeights.equal(1, 1).entropy.item() == 1
    assert LogWeights.equal(1, 2).entropy.item() == pytest.approx(1)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_evidence_does_not_change_by_resampling(name):
    before = weights([[0.3, -1.0, 2.0], [5.0, 5.0, 5.0]])
    after, _ = before.resample(name, ItemRNG(0, range(2)))
    torch.testing.assert_close(after.log_z, before.log_z, rtol=0, atol=1e-12)
    assert bool((after.values == 0).all())


@pytest.mark.parametrize("name", ["systematic", "ssp", "multinomial"])
def test_residual_weights_keep_weighted_means(name):
    """Whatever distribution ancestors are drawn from, the mean of ``Z sum W f`` stays, over 40000 groups."""
    groups, f = 40000, torch.tensor([1.0, -3.0, 2.0, 7.0], dtype=F64)
    values = torch.tensor([0.5, -1.0, 0.0, -2.5], dtype=F64).expand(groups, -1)
    before = LogWeights.equal(groups, 4).add(values)
    after, index = before.resample(
        name,
        ItemRNG(5, range(groups)),
        temperature=torch.full((groups,), 2.0, dtype=F64),
        modulation=torch.tensor([0.0, 1.0, -0.5, 0.7], dtype=F64).expand(groups, -1),
    )
    for g in (torch.ones(4, dtype=F64), f):
        truth = (values[0].exp() * g).mean()
        estimate = after.log_z.exp() * (after.normalised * g[index]).sum(1)
        assert abs(estimate.mean() - truth) <= 4 * estimate.std() / math.sqrt(groups)


def test_without_residual_evidence_is_nan_only_where_it_was_tempered():
    before = weights([[0.0, 1.0], [0.0, 1.0]])
    after, _ = before.resample(
        "systematic", ItemRNG(0, range(2)), temperature=torch.tensor([2.0, 1.0], dtype=F64), residual=False
    )
    assert after.log_z[0].isnan() and after.log_z[1].item() == pytest.approx(before.log_z[1].item())


def test_temperature_one_draws_the_same_ancestors():
    before = weights(ItemRNG(1, range(5)).normal((8,), dtype=F64))
    plain = before.resample("systematic", ItemRNG(0, range(5)))
    tempered = before.resample("systematic", ItemRNG(0, range(5)), temperature=torch.ones(5, dtype=F64))
    assert torch.equal(plain[1], tempered[1]) and torch.equal(plain[0].values, tempered[0].values)


def test_only_the_chosen_groups_are_resampled_and_the_others_draw_the_same_later():
    before = weights([[3.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    rng, alone = ItemRNG(0, [7, 8]), ItemRNG(0, [8])
    after, index = before.resample("multinomial", rng, where=torch.tensor([True, False]))
    assert index[1].tolist() == [0, 1, 2, 3] and torch.equal(after.values[1], before.values[1])
    assert after.roots[1].tolist() == [0, 1, 2, 3] and torch.equal(after.roots[0], index[0])
    one = LogWeights.equal(1, 4).add(before.values[1:])
    one.resample("multinomial", alone, where=torch.tensor([False]))
    later, _ = after.resample("multinomial", rng)
    assert torch.equal(later.roots[1:], one.resample("multinomial", alone)[0].roots)


def test_genealogy_and_memory_follow():
    start = LogWeights.equal(1, 3, memory=1).add(torch.tensor([[-math.inf, 0.0, -math.inf]]))
    after, index = start.resample("systematic", ItemRNG(0, [0]))
    assert index.tolist() == [[1, 1, 1]] and after.distinct_roots.tolist() == [1]
    assert start.distinct_roots.tolist() == [3]
    moved = LogWeights(
        torch.zeros(2, 2, dtype=F64),
        torch.tensor([1.0, 2.0], dtype=F64),
        torch.tensor([[0, 1], [1, 0]]),
        torch.arange(4, dtype=F64).view(2, 2, 1),
    ).gather(torch.tensor([3, 3, 0, 1]))
    assert moved.collected.tolist() == [2, 1] and moved.memory.flatten().tolist() == [3, 3, 0, 1]
    assert moved.roots.tolist() == [[0, 0], [0, 1]]


def test_choose_draws_by_weight():
    groups = 20000
    chosen = LogWeights.equal(groups, 4).add(W.log().expand(groups, -1)).choose(ItemRNG(0, range(groups)))
    assert torch.equal(chosen // 4, torch.arange(groups))
    share = torch.bincount(chosen % 4, minlength=4) / groups
    torch.testing.assert_close(share.double(), W[0], rtol=0, atol=0.015)


def test_dead_particles_and_dead_groups():
    log_weights = weights([[0.0, 0.0]]).add(torch.tensor([[math.nan, 1.0]]))
    assert log_weights.values.tolist() == [[-math.inf, 1.0]] and log_weights.ess.item() == 1
    assert weights([[0.0, 0.0]]).add(torch.tensor([[math.inf, 1.0]])).values.tolist() == [[-math.inf, 1.0]]
    with pytest.raises(ValueError, match="no particle of group 1 has a finite weight"):
        weights([[0.0, 0.0], [0.0, 0.0]]).add(torch.tensor([[0.0, 0.0], [math.nan, -math.inf]]))


def test_bad_input():
    log_weights = weights([[0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="mixes prompts in a group of num_particles=2"):
        log_weights.gather(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="3 entries"):
        log_weights.gather(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="modulation must be finite"):
        log_weights.resample("systematic", ItemRNG(0, range(2)), modulation=torch.tensor([[0.0, math.nan], [0, 0]]))
    with pytest.raises(ValueError, match="values must be"):
        LogWeights.equal(2, 0)
