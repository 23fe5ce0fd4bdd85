"""An autoencoder of digits' patches about each quantizer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genkit.data.digits import Digits
from genkit.quantizers import make
from genkit.quantizers.usage import CodeUsage


def patches():
    """28,752 of 4 x 4 grey levels, of the digits doubled in size."""
    images = F.interpolate(Digits().images, scale_factor=2, mode="bilinear")
    return F.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 16)


def mlp(*widths):
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def train(quantizer, steps, batch, rate=1e-3):
    """Error and usage over all patches."""
    data, dim = patches(), quantizer.dim
    encoder, decoder = mlp(16, 64, 64, dim), mlp(dim, 64, 64, 16)
    weights = [p for m in (encoder, quantizer, decoder) for p in m.parameters()]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        u = max(0.0, (step - 25) / (steps - 26))
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 25, 1, 0.01 + 0.99 * (1 - u) / 0.7)
        x = data[torch.randint(len(data), (batch,))]
        found = quantizer(encoder(x)[None])
        optimizer.zero_grad()
        (F.mse_loss(decoder(found.z_q[0]), x) + sum(found.losses.values())).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    quantizer.eval()
    with torch.no_grad():
        found = quantizer(encoder(data)[None])
        return F.mse_loss(decoder(found.z_q[0]), data).item(), CodeUsage(quantizer.codebook_size).update(found.indices)


# The variance of the data is 0.41: after a few steps a quantizer that learns is below 0.2, plain VQ among them, which
# hardly uses its codes.
SOON = {
    "vq": dict(dim=16, codebook_size=256),
    "vq, ema, restart": dict(kind="vq", dim=16, codebook_size=256, rule="ema", restart_threshold=1.0),
    "simvq": dict(dim=16, codebook_size=256),
    "fvq": dict(dim=16, codebook_size=256, width=32),
    "ibq": dict(dim=16, codebook_size=64),
    "fsq": dict(dim=3, levels=(8, 6, 5)),
    "lfq": dict(dim=8),
}


@pytest.mark.parametrize("name", SOON)
def test_error_falls(name):
    settings = {"kind": name} | SOON[name]
    error, usage = train(make(**settings), 120, 128, rate=4e-3)
    assert error < 0.2
    if "restart" in name:
        assert usage.usage > 0.5 and error < 0.1


@pytest.mark.slow
def test_fvq_uses_its_whole_codebook():
    error, usage = train(make("fvq", dim=16, codebook_size=1024, width=64, group_size=16), 1500, 1024)
    assert usage.usage >= 0.99 and error < 0.008
