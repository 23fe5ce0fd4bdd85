"""Closed-form data laws: for these the exact denoiser, velocity, score, density and (Gaussian) flow map are known.

A law is a callable oracle on any interpolant ``x_t = alpha(t) x0 + sigma(t) eps``: every prediction type, at any time
and for any event shape, so that guiders, solvers and losses can be checked against the truth.
"""

import math
from functools import partial

import torch
from torch import Tensor

from genkit.data.eight_gaussians import RADIUS, STD, centres
from genkit.denoisers.function import FunctionDenoiser
from genkit.interpolants import PREDICTION_TYPES, Interpolant, Linear, expand
from genkit.registry import unknown


class GaussianMixture:
    """``p(x0) = sum_k w_k N(x0; m_k, diag(c_k^2))`` and its path under an interpolant.

    Given component ``k``, ``x_t ~ N(alpha m_k, V_k)`` with ``V_k = alpha^2 c_k^2 + sigma^2``, and with posterior
    weights ``r_k(x, t)`` proportional to ``w_k N(x; alpha m_k, V_k)``::

        E[x0 | x]  = sum_k r_k (m_k + alpha c_k^2 (x - alpha m_k) / V_k)
        E[eps | x] = sum_k r_k sigma (x - alpha m_k) / V_k
        v(x, t)    = alpha' E[x0 | x] + sigma' E[eps | x]

    No formula divides by ``alpha`` or ``sigma``: both ends are exact. Work is done in float64 for float64 samples and
    times, else in float32, and results come back in the dtype of ``x``.

    Args:
        means: ``(K, *shape)``; ``shape`` is the event shape.
        stds: standard deviations, above 0: a number, ``(K,)``, or per coordinate ``(K, *shape)``.
        weights: ``(K,)``, above 0, normalised here; equal by default.
        labels: ``(K,)`` int64, the class of each component. Needed for class-conditional predictions.
        interpolant: the path; linear by default.
    """

    def __init__(self, means, stds, weights=None, labels=None, *, interpolant: Interpolant | None = None):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim < 2 or not len(self.means):
            raise ValueError(f"means must have shape (components, *event shape), got {tuple(self.means.shape)}")
        self.shape = tuple(self.means.shape[1:])
        stds = torch.as_tensor(stds, dtype=torch.float64)
        self.stds = expand(stds, self.means).expand_as(self.means)
        if not bool((self.stds > 0).all()):
            raise ValueError(f"stds must be above 0, got {self.stds.min().item():g}")
        weights = torch.ones(len(self.means)) if weights is None else torch.as_tensor(weights)
        if weights.shape != (len(self.means),) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {len(self.means)} numbers above 0, got {weights.tolist()}")
        self.weights = weights.double() / weights.double().sum()
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if self.labels is not None and (self.labels.shape != weights.shape or bool((self.labels < 0).any())):
            raise ValueError(f"labels must be {len(self.means)} classes >= 0, got {self.labels.tolist()}")
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        self.interpolant = Linear() if interpolant is None else interpolant

    def sample(self, n: int, class_labels: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws of ``x0``, float64, shape ``(n, *shape)``: of the classes ``(n,)``, or of the whole law."""
        chances = self._log_weights(n, class_labels).exp()
        component = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        return self.means[component] + self.stds[component] * noise

    def predict(self, prediction_type: str, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The exact prediction at ``x`` ``(B, *shape)``, ``t`` ``(B,)`` or ``()``: a perfectly trained network's.

        ``class_labels`` ``(B,)`` restricts the law to the components of each row's class; the label ``num_classes`` is
        the null class (the whole law), which ``None`` means for all rows.

        Raises:
            ValueError: an unknown prediction type; a label outside ``[0, num_classes]``, without a component, or given
                to a law without labels; a wrong event shape.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(unknown("prediction_type", prediction_type, PREDICTION_TYPES))
        x_, alpha, sigma, offset, variance, log_joint = self._components(x, t, class_labels)
        posterior = expand(log_joint.softmax(1), offset)
        x0 = (
            posterior * (self._like(self.means, x_) + alpha * self._like(self.stds, x_) ** 2 * offset / variance)
        ).sum(1)
        whitened = (posterior * offset / variance).sum(1)  # minus the score
        alpha, sigma = alpha.squeeze(1), sigma.squeeze(1)
        if prediction_type == "sample":
            out = x0
        elif prediction_type == "epsilon":
            out = sigma * whitened
        elif prediction_type == "v_prediction":
            out = alpha * sigma * whitened - sigma * x0
        else:
            time = self._time(t, x_)
            d_alpha, d_sigma = (expand(d(time), x_) for d in (self.interpolant.d_alpha, self.interpolant.d_sigma))
            # sigma' is infinite only where a variance-preserving path meets the data: sigma sigma' = -alpha alpha'.
            growth = torch.where(d_sigma.isfinite(), sigma * d_sigma, -alpha * d_alpha)
            out = d_alpha * x0 + growth * whitened
        return out.to(x.dtype)

    def denoise(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``E[x0 | x_t = x]``; arguments as in :meth:`predict`."""
        return self.predict("sample", x, t, class_labels)

    def epsilon(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``E[eps | x_t = x]``; arguments as in :meth:`predict`."""
        return self.predict("epsilon", x, t, class_labels)

    def velocity(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``E[dx_t/dt | x_t = x]``, the drift of the probability-flow ODE; arguments as in :meth:`predict`."""
        return self.predict("flow_prediction", x, t, class_labels)

    def score(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``grad_x log p_t(x)``; arguments as in :meth:`predict`."""
        _, _, _, offset, variance, log_joint = self._components(x, t, class_labels)
        return -(expand(log_joint.softmax(1), offset) * offset / variance).sum(1).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``log p_t(x)`` in nats, shape ``(B,)``, float32 or float64; arguments as in :meth:`predict`."""
        return self._components(x, t, class_labels)[-1].logsumexp(1)

    def denoiser(self, prediction_type: str = "flow_prediction") -> FunctionDenoiser:
        """The law as a perfectly trained network; its condition may hold ``class_labels``."""
        return FunctionDenoiser(partial(self.predict, prediction_type), self.interpolant, prediction_type)

    # -- shared work --------------------------------------------------------------------------------------------

    def _time(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.as_tensor(t, device=x.device).to(x.dtype)

    @staticmethod
    def _like(parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.to(device=x.device, dtype=x.dtype)

    def _log_weights(self, batch: int, class_labels: Tensor | None) -> Tensor:
        """Log-weights of the components for each row, ``(B, K)``, renormalised within the row's class."""
        log_weights = self.weights.log().expand(batch, -1)
        if class_labels is None:
            return log_weights
        if self.labels is None or self.num_classes is None:
            raise ValueError("class_labels were given to a law without labels; pass labels= when it is made")
        wanted = torch.as_tensor(class_labels).cpu()
        if wanted.shape != (batch,):
            raise ValueError(f"class_labels must have shape ({batch},), got {tuple(wanted.shape)}")
        keep = (wanted[:, None] == self.labels) | (wanted == self.num_classes)[:, None]
        if not bool(keep.any(1).all()):
            bad = wanted[~keep.any(1)][0].item()
            known = sorted(set(self.labels.tolist()))
            raise ValueError(f"class_labels={bad}: accepted are {known} and the null class {self.num_classes}")
        return log_weights.masked_fill(~keep, -math.inf).log_softmax(1)

    def _components(self, x: Tensor, t: Tensor, class_labels: Tensor | None):
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        t = torch.as_tensor(t, device=x.device)
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, torch.float32), t.dtype))
        time = self._time(t, x)
        each = x[:, None]  # (B, 1, *shape) against components (K, *shape)
        alpha, sigma = expand(self.interpolant.alpha(time), each), expand(self.interpolant.sigma(time), each)
        if not time.ndim:
            alpha, sigma = (c.reshape((1,) * each.ndim) for c in (alpha, sigma))
        offset = each - alpha * self._like(self.means, x)
        variance = alpha**2 * self._like(self.stds, x) ** 2 + sigma**2
        log_normal = -0.5 * (offset**2 / variance + variance.log() + math.log(2 * math.pi)).flatten(2).sum(2)
        log_joint = self._like(self._log_weights(len(x), class_labels), x) + log_normal
        return x, alpha, sigma, offset, variance, log_joint


class Gaussian(GaussianMixture):
    """``N(mean, diag(std^2))``: a law whose flow map is known too.

    Args:
        mean: ``(*shape)``.
        std: above 0, a number or per coordinate ``(*shape)``.
        interpolant: the path; linear by default.
    """

    def __init__(self, mean, std, *, interpolant: Interpolant | None = None):
        mean = torch.as_tensor(mean, dtype=torch.float64)
        std = torch.as_tensor(std, dtype=torch.float64).expand(mean.shape)
        super().__init__(mean[None], std[None], interpolant=interpolant)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability-flow ODE carries ``x`` from time ``t`` to ``s``, on any interpolant.

        ``X(x, t, s) = alpha_s m + sqrt(V_s / V_t) (x - alpha_t m)``; ``x`` ``(B, *shape)``, times ``(B,)`` or ``()``.
        """
        x_, _, _, offset, variance_t, _ = self._components(x, t, None)
        _, alpha_s, _, _, variance_s, _ = self._components(x, s, None)
        out = alpha_s * self._like(self.means, x_) + (variance_s / variance_t).sqrt() * offset
        return out.squeeze(1).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``u(x, t, s) = (X(x, t, s) - x) / (s - t)`` on the linear path, without that division: exact at ``s = t``.

        With ``V_t = (1-t)^2 c^2 + t^2``::

            u = -m + q (x - (1 - t) m)      q = [(s + t) - (2 - s - t) c^2] / [sqrt(V_t) (sqrt(V_s) + sqrt(V_t))]

        Differentiable, also by ``torch.func.jvp``, in ``x``, ``t`` and ``s``.

        Raises:
            ValueError: another interpolant than the linear one.
        """
        if not isinstance(self.interpolant, Linear):
            name = type(self.interpolant).__name__
            raise ValueError(f"interpolant={name}: average_velocity has a closed form here on Linear only")
        t, s = expand(t, x), expand(s, x)
        mean, c2 = self._like(self.means[0], x), self._like(self.stds[0], x) ** 2
        root_t, root_s = (((1 - time) ** 2 * c2 + time**2).sqrt() for time in (t, s))
        q = ((s + t) - (2 - s - t) * c2) / (root_t * (root_s + root_t))
        return -mean + q * (x - (1 - t) * mean)


def eight_gaussians(*, interpolant: Interpolant | None = None) -> GaussianMixture:
    """Eight Gaussians on a circle of radius 2, std 0.3, class ``k`` at angle ``k pi / 4``; the 2-D toy law."""
    return GaussianMixture(centres() * RADIUS, STD, labels=range(8), interpolant=interpolant)


def two_class_mixture(
    dim: int = 16, offset: float = 0.5, std: float = 0.5, *, interpolant: Interpolant | None = None
) -> GaussianMixture:
    """Two Gaussians in ``dim`` dimensions, class 0 at ``+offset`` in every coordinate and class 1 at ``-offset``."""
    means = torch.full((2, dim), float(offset), dtype=torch.float64) * torch.tensor([[1.0], [-1.0]])
    return GaussianMixture(means, std, labels=[0, 1], interpolant=interpolant)


def probability_flow(velocity, x: Tensor, t: float, s: float, steps: int = 200) -> Tensor:
    """Solve ``dx/dt = velocity(x, t)`` from time ``t`` to ``s`` by the classical fourth-order Runge-Kutta rule.

    ``velocity(x, t)`` takes ``t`` of shape ``(B,)``, in float64 for float64 ``x``.
    """
    times = torch.linspace(t, s, steps + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for now, then in zip(times[:-1], times[1:], strict=True):
        h, batch = then - now, x.shape[:1]
        middle = ((now + then) / 2).expand(batch)
        k1 = velocity(x, now.expand(batch))
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        k4 = velocity(x + h * k3, then.expand(batch))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
