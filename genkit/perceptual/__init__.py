"""Perceptual distances between images, to be minimised or measured: LPIPS, DISTS, and the edge-aware form of DISTS."""

from genkit.perceptual._weights import TORCHVISION
from genkit.perceptual.dists import DISTS, EADISTS, Padding, sobel
from genkit.perceptual.lpips import LPIPS, Net

__all__ = ["DISTS", "EADISTS", "LPIPS", "TORCHVISION", "Net", "Padding", "sobel"]
