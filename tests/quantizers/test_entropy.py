import pytest
import torch

from genkit.quantizers import entropy, make
from genkit.quantizers.entropy import entropy_loss


def plain(affinity, tau, gamma):
    """Of all affinities ``(N, K)`` at once."""
    p = (affinity / tau).softmax(1)
    own = -(p * p.clamp(min=1e-300).log()).sum(1).mean()
    mean = p.mean(0)
    return own + gamma * (mean * mean.clamp(min=1e-300).log()).sum()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_plain_formula_and_its_gradients(rows, monkeypatch):
    monkeypatch.setattr(entropy, "_NUMBERS", rows * 12)
    for tau, gamma in ((1.0, 1.0), (0.3, 0.5)):
        z = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
        codes = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
        loss = entropy_loss(z, lambda r, c=codes: -torch.cdist(r, c).square(), 12, tau=tau, gamma=gamma)
        wanted = plain(-torch.cdist(z, codes).square(), tau, gamma)
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
        for a, b in zip(torch.autograd.grad(loss, (z, codes)), torch.autograd.grad(wanted, (z, codes)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_sharp_softmaxes_stay_finite():
    z = (10 * torch.randn(50, 4)).requires_grad_()
    loss = entropy_loss(z, lambda r: 100 * r @ torch.randn(4, 30), 30, tau=0.01, gamma=1.0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("measure", ["euclidean", "dot", "cosine"])
def test_the_loss_of_a_quantizer(measure):
    quantizer = make(
        "vq", dim=4, codebook_size=12, init="normal", measure=measure, entropy_weight=0.3, entropy_tau=0.7
    ).double()
    z = torch.randn(1, 20, 4, dtype=torch.float64)
    rows, codes = z[0], quantizer.embedding.detach()
    if measure == "cosine":
        rows, codes = (torch.nn.functional.normalize(x, dim=1) for x in (rows, codes))
    affinity = -torch.cdist(rows, codes).square() if measure == "euclidean" else rows @ codes.T
    torch.testing.assert_close(quantizer(z).losses["entropy"], 0.3 * plain(affinity, 0.7, 1.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [dict(rule="ema", decay=0.5), dict(restart_threshold=2.0)])
def test_a_codebook_that_moves_by_itself_leaves_the_gradient_alone(settings):
    """The gradient computes affinities again, after the codes have moved."""
    quantizer = make(
        "vq", dim=4, codebook_size=12, init="normal", beta=0.0, entropy_weight=0.3, entropy_tau=0.7, **settings
    ).double()
    codes = quantizer.embedding.detach().clone()
    z = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    found = quantizer(z)
    assert not torch.equal(quantizer.embedding, codes)
    (gradient,) = torch.autograd.grad(found.losses["entropy"], z)
    (wanted,) = torch.autograd.grad(0.3 * plain(-torch.cdist(z[0], codes).square(), 0.7, 1.0), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="entropy_tau=0: expected above 0"):
        entropy_loss(torch.randn(2, 3), lambda r: r, 3, tau=0, gamma=1.0)
