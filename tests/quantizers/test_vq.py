import pytest
import torch
from torch.nn import functional as F

from genkit.quantizers import make


def test_losses_are_means_over_elements():
    z = torch.randn(2, 9, 4, requires_grad=True)
    quantizer = make("vq", dim=4, codebook_size=8, init="normal", beta=0.4, codebook_weight=0.7)
    found = quantizer(z)
    q = quantizer.embedding[found.indices]
    distance = F.mse_loss(q, z)
    assert set(found.losses) == {"commitment", "codebook"}
    torch.testing.assert_close(found.losses["commitment"], 0.4 * distance)
    torch.testing.assert_close(found.losses["codebook"], 0.7 * distance)
    (to_z,) = torch.autograd.grad(found.losses["commitment"], z, retain_graph=True)
    torch.testing.assert_close(to_z, 0.4 * 2 * (z - q) / z.numel())
    assert torch.autograd.grad(found.losses["codebook"], z, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(found.losses["commitment"], quantizer.embedding, allow_unused=True) == (None,)


def test_only_codes_that_were_hit_have_a_gradient():
    quantizer = make("vq", dim=4, codebook_size=512, init="normal")
    found = quantizer(torch.randn(1, 200, 4))
    sum(found.losses.values()).backward()
    hit = found.indices.unique()
    assert 50 < len(hit) < 200
    assert torch.equal(quantizer.embedding.grad.abs().sum(1).nonzero().flatten(), hit)


def test_averages_without_memory_are_the_means_of_clusters():
    quantizer = make("vq", dim=3, codebook_size=16, rule="ema", decay=0.0, init="normal").double()
    before = quantizer.embedding.clone()
    z = torch.randn(1, 60, 3, dtype=torch.float64)
    found = quantizer(z)
    assert set(found.losses) == {"commitment"} and not list(quantizer.parameters())
    for k in range(16):
        own = z[found.indices == k]
        wanted = own.mean(0) if len(own) else before[k]
        torch.testing.assert_close(quantizer.embedding[k], wanted, rtol=0, atol=1e-5 if len(own) else 0)
    assert torch.equal(found.z_q.detach()[0], z[0] + (before[found.indices[0]] - z[0]))


def test_smoothing_does_not_show_where_clusters_are_large():
    """With ``e = 1e-5`` the averages without memory are the means to 1e-7."""
    quantizer = make("vq", dim=3, codebook_size=8, rule="ema", decay=0.0, init="normal").double()
    z = torch.randn(1, 20_000, 3, dtype=torch.float64)
    indices = quantizer(z).indices
    wanted = torch.stack([z[indices == k].mean(0) for k in range(8)])
    assert indices.unique(return_counts=True)[1].min() > 500
    torch.testing.assert_close(quantizer.embedding, wanted, rtol=0, atol=1e-7)


def test_averages_follow_the_published_rule():
    quantizer = make("vq", dim=3, codebook_size=5, rule="ema", decay=0.9, init="normal").double()
    n, m = torch.ones(5, dtype=torch.float64), quantizer.embedding.clone()
    for _ in range(4):
        z = torch.randn(1, 30, 3, dtype=torch.float64)
        indices = quantizer(z).indices[0]
        hot = F.one_hot(indices, 5).double()
        n, m = 0.9 * n + 0.1 * hot.sum(0), 0.9 * m + 0.1 * hot.T @ z[0]
        smooth = (n + 1e-5) / (n.sum() + 5e-5) * n.sum()
        torch.testing.assert_close(quantizer.embedding, m / smooth[:, None], rtol=1e-12, atol=1e-12)


LLOYD_MAX = {2: 0.36337, 4: 0.11747, 8: 0.03454, 16: 0.009495}


@pytest.mark.parametrize("k", LLOYD_MAX)
@pytest.mark.parametrize("rule", ["ema", "gradient"])
def test_the_best_quantizers_of_a_normal_number(k, rule):
    """Distortions of Lloyd's and Max's quantizers, from stratified normal numbers."""
    quantiles = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    if rule == "ema":
        quantizer = make("vq", dim=1, codebook_size=k, rule="ema", decay=0.0, kmeans_init=True).double()
        for _ in range(100):
            quantizer(quantiles[None, :, None])
    else:
        quantizer = make("vq", dim=1, codebook_size=k, kmeans_init=True).double()
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
            optimizer.zero_grad()
            quantizer(quantiles[None, :, None]).losses["codebook"].backward()
            optimizer.step()
    fine = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    error = F.mse_loss(quantizer.eval()(fine[None, :, None]).z_q[0, :, 0], fine).item()
    assert error == pytest.approx(LLOYD_MAX[k], rel=0.02)


def test_restarted_codes_stay_where_they_were_put():
    """Their averages move with them, or the update would pull them back at once."""
    quantizer = make("vq", dim=3, codebook_size=50, rule="ema", restart_threshold=1.0).double()
    quantizer.embedding[10:] += 100
    quantizer.sums.copy_(quantizer.embedding)
    z = torch.randn(1, 80, 3, dtype=torch.float64)
    quantizer(z)
    moved = quantizer.embedding[10:]
    nearest = torch.cdist(moved, z[0]).min(1)
    assert nearest.values.max() < 1e-4  # ten-thousandths are the smoothing
    assert len(nearest.indices.unique()) == 40, "two dead codes got the same vector while there were enough"
    assert torch.equal(quantizer.counts[10:], torch.ones(40).double())
    torch.testing.assert_close(quantizer.sums[10:], z[0][nearest.indices])


def test_restart_under_the_gradient_rule():
    quantizer = make("vq", dim=3, codebook_size=50, restart_threshold=1.0).double()
    with torch.no_grad():
        quantizer.embedding[10:] += 100
    z = torch.randn(1, 80, 3, dtype=torch.float64)
    found = quantizer(z)
    (found.z_q.sum() + sum(found.losses.values())).backward()
    assert (quantizer.embedding[10:, None] == z[0]).all(2).any(1).all()
    assert quantizer.embedding.grad.abs().sum() > 0


def test_restart_with_fewer_vectors_than_dead_codes():
    quantizer = make("vq", dim=3, codebook_size=50, rule="ema", restart_threshold=2.0)
    z = torch.randn(1, 7, 3)
    for _ in range(3):
        quantizer(z)
    assert quantizer.embedding.isfinite().all()
    assert len(quantizer.eval()(z).indices.unique()) == 7


@pytest.mark.parametrize("rule", ["gradient", "ema"])
def test_few_vectors_go_to_the_least_used_codes_and_to_one_each(rule):
    quantizer = make("vq", dim=3, codebook_size=10, rule=rule, restart_threshold=5.0)
    used = 0.1 + 0.1 * torch.randperm(10)
    with torch.no_grad():
        quantizer.embedding.copy_(100 + torch.arange(30.0).view(10, 3))
    quantizer.counts.copy_(used)
    if rule == "ema":
        quantizer.sums.copy_(quantizer.embedding * used[:, None])
    z = torch.randn(1, 7, 3)  # which all hit one code, by 0.07 in its average: no place in the order
    quantizer(z)
    restarted = (quantizer.embedding < 50).all(1)
    assert torch.equal(restarted.nonzero().flatten(), used.argsort()[:7].sort().values)
    assert len(quantizer.embedding[restarted].unique(dim=0)) == 7
    assert (quantizer.counts[restarted] == 5).all() and (quantizer.counts[~restarted] < 5).all()


def test_restarts_fill_a_codebook_larger_than_a_batch():
    quantizer = make("vq", dim=3, codebook_size=50, rule="ema", restart_threshold=1.0)
    data = torch.randn(20, 1, 10, 3)
    for z in data:
        quantizer(z)
    assert len(quantizer.eval()(data.view(1, 200, 3)).indices.unique()) >= 45


def test_k_means_start():
    centres = 10 * torch.randn(8, 4)
    z = (centres[torch.arange(400) % 8] + 0.01 * torch.randn(400, 4))[None]
    quantizer = make("vq", dim=4, codebook_size=64, kmeans_init=True)
    quantizer(z)
    error = torch.cdist(z[0], quantizer.embedding.detach()).min(1).values.max()
    assert error < 0.05
    before = quantizer.embedding.detach().clone()
    quantizer(z + 5)
    assert torch.equal(quantizer.embedding, before), "only the first batch decides"


@pytest.mark.parametrize("rule", ["gradient", "ema"])
@pytest.mark.parametrize("n", [1, 5])
def test_k_means_with_fewer_vectors_than_codes(rule, n):
    quantizer = make("vq", dim=4, codebook_size=32, kmeans_init=True, rule=rule)
    z = torch.randn(1, n, 4)
    found = quantizer(z)
    assert found.z_q.isfinite().all() and quantizer.embedding.isfinite().all()
    torch.testing.assert_close(quantizer.eval()(z).z_q, z, rtol=0, atol=0.05)


def test_k_means_of_one_number():
    quantizer = make("vq", dim=1, codebook_size=4, kmeans_init=True)
    quantizer(torch.tensor([[[2.0]]]))
    assert quantizer.embedding.tolist() == [[2.0]] * 4


def test_k_means_survives_the_restart_that_follows():
    z = torch.randn(1, 600, 4)
    quantizer = make("vq", dim=4, codebook_size=16, kmeans_init=True, rule="ema", restart_threshold=2.0)
    quantizer(z)
    plain = make("vq", dim=4, codebook_size=16, kmeans_init=True, rule="ema")
    plain(z)
    torch.testing.assert_close(quantizer.embedding, plain.embedding)


def test_cosine_codes_and_vectors_are_of_length_one():
    quantizer = make("vq", dim=8, codebook_size=32, measure="cosine", init="normal").eval()
    z = torch.randn(1, 40, 8)
    found = quantizer(z)
    torch.testing.assert_close(found.z_q.norm(dim=-1), torch.ones(1, 40))
    best = F.normalize(z, dim=-1) @ F.normalize(quantizer.embedding, dim=-1).T
    assert torch.equal(found.indices, best.argmax(-1)) and torch.equal(quantizer(7 * z).indices, found.indices)


def test_averages_are_averaged_like_weights():
    """An averaged encoder goes with averaged codes; a codebook of weights is averaged anyway."""
    from genkit.training.ema import EMA
    from genkit.training.roles import averaged_buffers

    model = torch.nn.ModuleDict({"quantizer": make("vq", dim=3, codebook_size=8, rule="ema", decay=0.5)})
    found = averaged_buffers(model)
    assert list(found) == ["quantizer.embedding"] and not averaged_buffers(make("vq", dim=3, codebook_size=8))
    ema, seen = EMA(found, [0.5]), [model["quantizer"].embedding.clone()]
    for n in range(1, 4):
        model["quantizer"](torch.randn(1, 40, 3))
        ema.update()
        weight = 1 - min(0.5, (1 + n) / (10 + n))
        seen.append(torch.lerp(seen[-1], model["quantizer"].embedding, weight))
    now = model["quantizer"].embedding.clone()
    with ema.swapped():
        torch.testing.assert_close(model["quantizer"].embedding, seen[-1])
    assert torch.equal(model["quantizer"].embedding, now) and not torch.equal(now, seen[-1])


def test_settings_that_nothing_reads():
    for wrong, message in (
        (dict(decay=0.9), "decay is of the averages"),
        (dict(rule="ema", codebook_weight=2.0), "codebook_weight is of the codebook loss"),
        (dict(kmeans_init=True, init="normal"), "init has no effect under kmeans_init=True"),
        (dict(rule="ema", decay=1.0), "decay=1.0: Input should be less than 1"),
        (dict(restart_threshold=-1.0), "restart_threshold=-1.0"),
        (dict(rule="lloyd"), "rule='lloyd'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("vq", dim=3, codebook_size=8, **wrong)
