"""The Laplacian-pyramid distance of images: perceptual without the weights of any network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.perceptual._weights import check_pictures


class LaplacianPyramid(nn.Module):
    """``sum_j mean |L_j x - L_j y|`` over the bands of a Laplacian pyramid, a distance ``>= 0`` of every pair.

    ``g_0 = x``, ``g_(j+1)`` is every other pixel of ``g_j`` blurred by (1, 4, 6, 4, 1) / 16,
    ``L_j = g_j - up(g_(j+1))`` with bilinear ``up``, and the last band is what is left. A band
    has a quarter of the pixels of the one before and weighs as much, as the eye sees fine contrasts less well. In place
    of learned distances where their weights are not at hand: errors that reach over many pixels cost more than under
    squared errors, but textures are still compared pixel by pixel.
    Computed in float32 at least, without autocast.

    Args:
        levels: halvings; by default as many as the shorter side allows, five at most.

    Raises:
        ValueError: fewer than one level.

    Source: Bojanowski et al., "Optimizing the latent space of generative networks", arXiv 1707.05776, section 3.1; the
    pyramid is that of Burt and Adelson, "The Laplacian pyramid as a compact image code", 1983.
    """

    def __init__(self, levels: int | None = None):
        super().__init__()
        if levels is not None and levels < 1:
            raise ValueError(f"levels={levels}: accepted is 1 or more")
        self.levels = levels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(B,)`` of pictures ``(B, C, H, W)``, ``C`` 3, or 1 for grey.

        Raises:
            ValueError: shapes that differ, are not those of pictures, or are too small for ``levels``.
        """
        check_pictures(x, y)
        possible = min(x.shape[2:]).bit_length() - 1
        levels = min(5, possible) if self.levels is None else self.levels
        if not 1 <= levels <= possible:
            raise ValueError(
                f"pictures of {x.shape[2]} x {x.shape[3]} pixels: levels={levels} takes {2 ** max(levels, 1)} at least"
            )
        with torch.autocast(x.device.type, enabled=False):
            # The pyramid is linear, so that of the difference is the difference.
            rest = x.to(torch.promote_types(x.dtype, torch.float32)) - y
            total = rest.new_zeros(len(rest))
            for _ in range(levels):
                coarse = _blurred(rest)[..., ::2, ::2]
                finer = F.interpolate(coarse, size=rest.shape[2:], mode="bilinear", align_corners=False)
                total = total + (rest - finer).abs().flatten(1).mean(1)
                rest = coarse
            return total + rest.abs().flatten(1).mean(1)


def _blurred(x: Tensor) -> Tensor:
    channels = x.shape[1]
    kernel = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
