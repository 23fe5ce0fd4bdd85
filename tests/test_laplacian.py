"""The Laplacian-pyramid distance."""

import pytest
import torch

from genkit.perceptual.laplacian import LaplacianPyramid

F64 = torch.float64


def test_a_constant_difference_is_in_the_last_band_alone():
    x = torch.rand(3, 1, 9, 12, dtype=F64)
    offset = torch.tensor([0.1, -0.2, 0.0], dtype=F64).view(3, 1, 1, 1)
    torch.testing.assert_close(LaplacianPyramid()(x, x + offset), offset.flatten().abs())


def test_bands_by_hand():
    """A spike over one level: blurred by hand, and both bands."""
    x = torch.zeros(1, 1, 8, 8, dtype=F64)
    x[0, 0, 4, 4] = 1
    ramp = torch.tensor([1, 4, 6, 4, 1], dtype=F64) / 16
    coarse = torch.zeros(4, 4, dtype=F64)
    coarse[1:4, 1:4] = ramp[::2, None] * ramp[::2]
    up = torch.nn.functional.interpolate(coarse[None, None], size=(8, 8), mode="bilinear", align_corners=False)
    expected = (x - up).abs().mean() + coarse.abs().mean()
    torch.testing.assert_close(LaplacianPyramid(1)(x, torch.zeros_like(x)), expected[None])


def test_differences_over_many_pixels_cost_more():
    """Of one mean square: a chessboard is in the finest band alone, an edge in all."""
    flat = torch.zeros(1, 3, 16, 16)
    i = torch.arange(16)
    chess = 0.1 * (1 - 2 * ((i[:, None] + i) % 2)).float().expand(1, 3, 16, 16)
    halves = 0.1 * torch.sign(i - 7.5).expand(1, 3, 16, 16)
    fine, coarse = (LaplacianPyramid()(flat, y).item() for y in (chess, halves))
    assert 0.1 <= fine < 0.11 and coarse > 1.3 * fine
    assert LaplacianPyramid()(chess, chess).item() == 0


def test_gradient_and_precision():
    x, y = (torch.rand(2, 1, 5, 4, dtype=F64) for _ in range(2))
    x.requires_grad_()
    assert torch.autograd.gradcheck(LaplacianPyramid(2), (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LaplacianPyramid()(x, y), LaplacianPyramid()(x, y)) and LaplacianPyramid()(x, y).dtype == F64
    assert LaplacianPyramid()(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "act, text",
    [
        (lambda: LaplacianPyramid(0), "levels=0"),
        (lambda: LaplacianPyramid(3)(torch.zeros(1, 1, 7, 9), torch.zeros(1, 1, 7, 9)), "levels=3 takes 8 at least"),
        (lambda: LaplacianPyramid()(torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1, 9)), "1 x 9 pixels"),
        (lambda: LaplacianPyramid()(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)), "accepted are two"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(ValueError, match=text):
        act()
