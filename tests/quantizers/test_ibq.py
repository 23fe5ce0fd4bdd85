import pytest
import torch
from torch.nn import functional as F

from genkit.quantizers import ibq, make


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_plain_formula_and_its_gradients(rows, monkeypatch):
    monkeypatch.setattr(ibq, "_NUMBERS", rows * 12)
    quantizer = make("ibq", dim=4, codebook_size=12, entropy_weight=0.0).double()
    z = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    found = quantizer(z)
    codes = quantizer.embedding
    logits = z[0] @ codes.T
    p = logits.softmax(1)
    hard = F.one_hot(logits.argmax(1), 12).double()
    q = (hard - p.detach() + p) @ codes
    torch.testing.assert_close(found.z_q[0], q, rtol=0, atol=1e-13)
    assert torch.equal(found.indices[0], logits.argmax(1))
    plain = (
        F.mse_loss(q, z[0]) + F.mse_loss(z[0], (hard @ codes).detach()) + 0.25 * F.mse_loss(hard @ codes, z[0].detach())
    )
    torch.testing.assert_close(sum(found.losses.values()), plain, rtol=1e-12, atol=0)
    upstream = torch.randn(20, 4, dtype=torch.float64)
    for a, b in (
        ((found.z_q[0] * upstream).sum(), (q * upstream).sum()),
        (sum(found.losses.values()), plain),
    ):
        ours = torch.autograd.grad(a, (z, codes), retain_graph=True)
        wanted = torch.autograd.grad(b, (z, codes), retain_graph=True)
        for x, y in zip(ours, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_every_code_has_a_gradient_of_the_output():
    quantizer = make("ibq", dim=4, codebook_size=64)
    quantizer(torch.randn(1, 10, 4)).z_q.square().sum().backward()
    assert (quantizer.embedding.grad.abs().sum(1) > 0).all()


def test_published_losses():
    assert set(make("ibq", dim=4, codebook_size=12)(torch.randn(1, 9, 4)).losses) == {
        "commitment",
        "codebook",
        "straight",
        "entropy",
    }


def test_each_weight_is_of_the_loss_that_it_is_called_after():
    z = torch.randn(1, 9, 4)
    one = make("ibq", dim=4, codebook_size=12)(z).losses
    two = make("ibq", dim=4, codebook_size=12, beta=3.0, codebook_weight=0.5, straight_weight=2.0)(z).losses
    ratios = {name: (two[name] / one[name]).item() for name in one}
    assert ratios == pytest.approx(dict(commitment=3, codebook=2, straight=2, entropy=1), rel=1e-5)


def test_an_estimator_would_have_no_effect():
    with pytest.raises(ValueError, match="estimator has no effect: the gradient of ibq is that of its softmax"):
        make("ibq", dim=4, codebook_size=12, estimator="rotation")
