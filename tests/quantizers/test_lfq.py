import pytest
import torch

from genkit.quantizers import make
from tests.quantizers.test_entropy import plain


def test_signs_and_little_endian_indices():
    quantizer = make("lfq", dim=3).eval()
    z = torch.tensor([[[0.2, -3.0, -0.1], [-1.0, 0.0, 2.0]]])
    found = quantizer(z)
    assert found.z_q.tolist() == [[[1, -1, -1], [-1, 1, 1]]] and found.indices.tolist() == [[1, 6]]
    assert torch.equal(quantizer(quantizer.codebook()[None]).indices[0], torch.arange(8))


def test_codes_on_the_sphere():
    quantizer = make("lfq", dim=4, spherical=True).eval()
    assert quantizer.codebook().norm(dim=1).tolist() == [1.0] * 16
    assert quantizer.codebook().abs().unique().tolist() == [0.5]


@pytest.mark.parametrize("spherical", [False, True])
def test_entropy_is_that_of_all_codes(spherical):
    quantizer = make("lfq", dim=5, spherical=spherical, entropy_tau=0.9, entropy_weight=0.3, entropy_gamma=0.7).double()
    z = torch.randn(1, 30, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.nn.functional.normalize(z[0], dim=1) if spherical else z[0]
    codes = quantizer.codebook().double()
    wanted = 0.3 * plain(-torch.cdist(rows, codes).square(), 0.9, 0.7)
    loss = quantizer(z).losses["entropy"]
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)  # of the sphere, codes are of float32
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(wanted, z)[0], rtol=1e-5, atol=1e-7)


def test_entropy_of_a_vector_is_that_of_its_bits():
    """Exactly; that of the batch is bounded by it."""
    z = torch.randn(1, 30, 6, dtype=torch.float64)
    settings = dict(dim=6, entropy_weight=1.0, entropy_tau=1.3)

    def loss(gamma, kind):
        return make("lfq", **settings, entropy_gamma=gamma, batch_entropy=kind).double()(z).losses["entropy"].item()

    assert loss(0.0, "joint") == pytest.approx(loss(0.0, "bits"), abs=1e-13)
    joint, bits = (loss(0.0, kind) - loss(1.0, kind) for kind in ("joint", "bits"))
    assert joint <= bits + 1e-12 and bits > 0


def test_commitment_and_straight_through():
    quantizer = make("lfq", dim=4, beta=0.5, entropy_weight=0.0)
    z = torch.randn(1, 9, 4, requires_grad=True)
    found = quantizer(z)
    torch.testing.assert_close(found.losses["commitment"], 0.5 * (z - z.sign()).square().mean())
    upstream = torch.randn(1, 9, 4)
    assert torch.equal(torch.autograd.grad((found.z_q * upstream).sum(), z)[0], upstream)


def test_reste_follows_the_progress_of_training():
    quantizer = make("lfq", dim=4, estimator="reste", entropy_weight=0.0)
    z = torch.full((1, 1, 4), 0.5, requires_grad=True)
    slopes = []
    for quantizer.progress in (0.0, 1.0):
        slopes.append(torch.autograd.grad(quantizer(z).z_q.sum(), z)[0][0, 0, 0].item())
    assert slopes == pytest.approx([1.0, 0.529134], abs=1e-6)


def test_bad_settings():
    for wrong, message in (
        (dict(dim=63), "dim=63"),
        (dict(dim=19), "batch_entropy='joint' is a softmax over 2\\^19 codes; above 18 take 'bits'"),
        (dict(dim=4, reste_end=2.0), "reste_end is of estimator='reste'"),
        (dict(dim=4, entropy_weight=0.0, batch_entropy="bits"), "batch_entropy without effect"),
    ):
        with pytest.raises(ValueError, match=message):
            make("lfq", **wrong)
    assert make("lfq", dim=62, batch_entropy="bits").codebook_size == 2**62
