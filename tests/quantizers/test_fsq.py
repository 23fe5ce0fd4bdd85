import math

import pytest
import torch

from genkit.quantizers import make


@pytest.mark.parametrize("levels", [(8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5)])
def test_indices_and_codes_are_one_to_one(levels):
    quantizer = make("fsq", dim=len(levels), levels=levels).eval()
    k = math.prod(levels)
    codes = quantizer.codebook()
    assert quantizer.codebook_size == k and len(codes.unique(dim=0)) == k
    widths = torch.tensor(levels)
    # The middle of each cell, back through the bound.
    half, offset = (widths - 1) * 1.001 / 2, torch.where(widths % 2 == 0, 0.5, 0.0)
    z = torch.atanh((codes * (widths // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer(z[None]).indices[0], torch.arange(k))


def test_published_codes_and_gradient():
    quantizer = make("fsq", dim=2, levels=(4, 5))
    assert quantizer.codebook()[:, 0].unique().tolist() == [-1, -0.5, 0, 0.5]
    assert quantizer.codebook()[:, 1].unique().tolist() == [-1, -0.5, 0, 0.5, 1]
    z = torch.tensor([[[0.0, 0.3]]], dtype=torch.float64, requires_grad=True)
    found = quantizer(z)
    (gradient,) = torch.autograd.grad(found.z_q[0, 0, 1], z)
    assert gradient[0, 0, 1].item() == pytest.approx(0.916052, abs=5e-7)
    assert found.losses == {} and found.z_q[0, 0, 0] == 0


def test_far_vectors_stay_in_range():
    quantizer = make("fsq", dim=3, levels=(8, 6, 1000)).eval()
    z = torch.tensor([[[1e9] * 3, [-1e9] * 3]])
    assert quantizer(z).indices.tolist() == [[7 + 8 * 5 + 48 * 999, 0]]


def test_bad_settings():
    for wrong, message in (
        (dict(levels=(8, 6)), "levels=.8, 6. are of 2 channels, dim=3"),
        (dict(levels=(8, 6, 2)), "expected 3 to 1000 each .for 2 take quantizer 'lfq'"),
        (dict(levels=(8, 6, 1001)), "expected 3 to 1000 each"),
        (dict(levels=()), "levels"),
        (dict(levels=(8, 6, 5), sharpness=2.0), "sharpness is of estimator='dgm'"),
        (dict(levels=(8, 6, 5), estimator="noise"), "estimator='noise'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("fsq", dim=3, **wrong)
