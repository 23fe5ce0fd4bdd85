"""A denoiser on another path than its own: the same law of data, seen at the same noise in another scale."""

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import Interpolant, Linear, expand


def change_path(x: Tensor, t: Tensor, source: Interpolant, target: Interpolant) -> tuple[Tensor, Tensor]:
    """``(x', t')`` on ``target`` where ``x`` at ``t`` is on ``source``: same ends, other coefficients.

    ``t'`` is where ``sigma'/alpha' = sigma/alpha``, and ``x' = x alpha'/alpha = x sigma'/sigma``. To the linear path:
    ``t' = sigma / (alpha + sigma)``, ``x' = x / (alpha + sigma)``. Trajectories of the probability-flow ODE go over
    into each other. Where ``source`` is noisier than ``target`` ever gets, ``t'`` is its end and ``x'`` has there the
    variance that it would have of ends of variance 1: pure noise becomes the noise that samplers start from.

    Args:
        x, t: ``(B, ...)`` and ``(B,)`` or ``()``.

    Returns:
        ``x'`` in float32 at least, ``t'`` in float64.
    """
    wide = t.to(torch.promote_types(x.dtype, torch.float32)).double()
    alpha, sigma = source.alpha(wide), source.sigma(wide)
    there = target.time_at(alpha, sigma)
    scale = torch.hypot(target.alpha(there), target.sigma(there)) / torch.hypot(alpha, sigma)
    scale = scale.to(torch.promote_types(x.dtype, torch.float32))
    return expand(scale, x) * x, there


class OnPath(Denoiser):
    """The velocity of ``denoiser`` on ``interpolant``, by exact reparametrisation (see :func:`change_path`).

    ``(x0, eps)`` that the network predicts at its own ``(x', t')`` are those at ``(x, t)``, and
    ``v = alpha' x0 + sigma' eps`` with the coefficients of ``interpolant``. Beyond the last noise of the network's own
    path its clean sample stands, and ``eps`` is what then explains ``x``. Networks, conditions and the count of calls
    are shared with ``denoiser``.

    Args:
        denoiser: on any path, of any prediction type, but no flow map.
        interpolant: the path to be on; linear by default.

    Raises:
        TypeError: a flow map, whose jumps are not those of another path.

    Source: Liu et al., "InstaFlow", arXiv 2309.06380; Karras et al., arXiv 2206.00364, section 4 (a path's scaling and
    time are free).
    """

    def __init__(self, denoiser: Denoiser, interpolant: Interpolant | None = None):
        if hasattr(denoiser, "average_velocity"):
            raise TypeError(
                f"denoiser={type(denoiser).__name__} is a flow map: off its diagonal it has a path of its own"
            )
        super().__init__(denoiser.network, interpolant or Linear(), "flow_prediction")
        self.denoiser = denoiser
        self._count = denoiser._count

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        own, path = self.denoiser.interpolant, self.interpolant
        x, there = change_path(z, t, path, own)
        raw = self.denoiser.forward(x.to(z.dtype), there.to(t.dtype), own.timestep(there), condition)
        x0, eps = own.ends(raw, self.denoiser.prediction_type, x, there)
        alpha, sigma = path.alpha(t.double()), path.sigma(t.double())
        # Compared crosswise, since alpha may be 0 on either; the slack is above rounding and below any step of a path.
        beyond = sigma * own.alpha(there) > alpha * own.sigma(there) + 1e-9
        rest = (z - expand(alpha, z).to(x) * x0) / expand(sigma.where(beyond, 1), z).to(x)
        return path.velocity(x0, rest.where(expand(beyond, eps), eps), t)

    @property
    def module(self) -> nn.Module:
        return self.denoiser.module

    def encode(self, *args, **inputs) -> Condition:
        """As the denoiser's."""
        return self.denoiser.encode(*args, **inputs)

    def _around(self, network):
        return type(self)(self.denoiser.with_network(network), self.interpolant)

    def _submodules(self) -> dict[str, nn.Module]:
        return self.denoiser._submodules()
