"""Pseudo-numerical methods: averages of network outputs as in classical solvers, moved along the DDIM map."""

from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.interpolants import DiscreteVP, Interpolant, Linear
from genkit.registry import unknown
from genkit.schedulers.base import PathScheduler, StepOutput

# Weights of the outputs at the start (t), the middle (m, twice) and the end (u) of a step.
WARMUPS = {"prk": (1 / 6, 1 / 3, 1 / 3, 1 / 6), "improved_euler": (1 / 2, 1 / 2), "ramp": (1.0,)}
SPACES = {"auto": None, "eps": "epsilon", "v": "flow_prediction"}
COEFFICIENTS = ("uniform", "variable")
FINALS = ("zero", "first")


class PseudoNumericalScheduler(PathScheduler):
    """Adams-Bashforth and Runge-Kutta averages ``q`` of the network's outputs, moved as is exact for a constant ``q``.

    From time ``t`` to ``u``, in the space of the noise or of the velocity ``dx_t/dt``::

        eps:  x <- (alpha_u / alpha_t) x + (sigma_u - sigma_t alpha_u / alpha_t) q
        v:    x <- x + (u - t) q

    =========  ==============================================  ==========================================
    method     settings                                        network calls for ``N`` steps
    =========  ==============================================  ==========================================
    S-PNDM     ``solver_order=2, warmup="improved_euler"``     ``N + 1``
    F-PNDM     ``solver_order=4, warmup="prk"``                ``N + 9``
    PLMS       ``solver_order=4, warmup="improved_euler"``     ``N + 1``
    =========  ==============================================  ==========================================

    The papers' forms have ``space="eps", coefficients="uniform"``, which is of second order at any ``solver_order``.
    True fourth order takes the Runge-Kutta warm-up and either ``v`` (best on the linear path), or ``eps`` with variable
    coefficients.

    The fourth-order weights amplify differences between outputs by 6.7 on equal steps, and by far more where steps
    grow: on a mixture with flow times shifted by 3, order 4 beats order 1 from 14 steps on and order 2 only from about
    25. A high guidance scale may need a lower order, too.

    An evaluation is a step of the pipeline: warm-up steps are several, at times that come twice, so ``timesteps`` is
    longer than ``num_inference_steps``. Image to image counts its strength along it, and had best use ``ramp``; begun
    within a warm-up step, a run completes that step by first-order moves.

    Args:
        num_train_timesteps, shift, path, timestep_spacing: see :class:`genkit.schedulers.base.PathScheduler`.
        solver_order: most outputs that an average takes, 1 (DDIM in ``eps``) to 4.
        warmup: how a run gets its history. ``prk``: ``solver_order - 1`` steps of pseudo Runge-Kutta, 4 calls each,
            whose middle is a fractional timestep; ``improved_euler``: a first step of 2 calls; ``ramp``: orders 1, 2, 3
            ... without further calls. They allow order 4, 3 and 2. A single step has none.
        space: ``eps``, ``v``, or ``auto``: ``v`` on the linear path, ``eps`` on others. In ``eps`` a first step from
            ``alpha = 0``, where the noise is all there is, is DDIM's, and the history begins after it.
        coefficients: ``uniform`` are those of equal steps; ``variable`` those of the steps taken, in ``sigma / alpha``
            in ``eps`` and in ``t`` in ``v``.
        final: ``zero`` ends at clean data, ``first`` at the first trained timestep, as Diffusers does without
            ``set_alpha_to_one``; steps that are not above it are left out.

    Raises:
        ValueError: an unknown setting; when times are set, unequal steps with uniform coefficients (the last step may
            be shorter), fewer steps than ``prk`` needs, or a start at ``alpha = 0`` with ``epsilon`` predictions.

    Source: Liu et al., "Pseudo numerical methods for diffusion models on manifolds", arXiv 2202.09778, equations 9, 12
    and 13, algorithm 2; variable coefficients: Zhang and Chen, "Fast sampling of diffusion models with exponential
    integrator", arXiv 2204.13902.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        solver_order: int = 4,
        warmup: str = "improved_euler",
        space: str = "auto",
        coefficients: str = "variable",
        final: str = "zero",
        path: dict | None = None,
        timestep_spacing: str = "uniform",
    ):
        if solver_order not in (1, 2, 3, 4):
            raise ValueError(f"solver_order={solver_order}: must be 1, 2, 3 or 4")
        for name, value, accepted in (
            ("warmup", warmup, WARMUPS),
            ("space", space, SPACES),
            ("coefficients", coefficients, COEFFICIENTS),
            ("final", final, FINALS),
        ):
            if value not in accepted:
                raise ValueError(unknown(name, value, accepted))
        # A step of several stages ends from the sample that it began at.
        self.remembers_samples = warmup != "ramp" and solver_order > 1
        super().__init__()

    @property
    def quantity(self) -> str:
        """The prediction type that is averaged: ``epsilon`` or ``flow_prediction``."""
        auto = "flow_prediction" if isinstance(self.interpolant, Linear) else "epsilon"
        return SPACES[self.config.space] or auto

    # -- the plan of a run ----------------------------------------------------------------------------------------

    def _set(self, t, device):
        end = self._end()
        t = t[t > end]
        if not len(t):
            raise ValueError(f"final={self.config.final!r}: no step begins above the final time {end.item():g}")
        singular = self.quantity == "epsilon" and self.interpolant.alpha(t[0]) == 0
        warm = self._warm_steps(len(t), int(singular))
        self._check_uniform(t, end)
        times: list[Tensor] = []
        self._stages: list[tuple[int, tuple[float, ...]]] = []
        for step, (now, then) in enumerate(pairwise((*t, end))):
            weights = WARMUPS[self.config.warmup] if step in warm else (1.0,)
            if len(weights) == 4:
                middle = self._middle(now, then)
                times += (now, middle, middle, then)
            else:
                times += (now, then)[: len(weights)]
            self._stages += enumerate([weights] * len(weights))
        super()._set(torch.stack(times), device)
        self.times[-1] = end
        self.sigmas = self.times.float()
        self._history: list[tuple[int, Tensor]] = []  # (evaluation, output), the newest last
        self._begun: tuple[int, Tensor, Tensor] | None = None  # a warm-up step: evaluation, sample, sum of outputs

    def _start(self, t):
        if self.prediction_type == "epsilon" and self.interpolant.alpha(t[0]) == 0:
            raise ValueError(
                f"the steps begin at t={t[0].item():g}, where alpha = 0 and prediction_type='epsilon' says nothing of "
                "the sample; begin at an earlier timestep"
            )
        return t

    def _end(self) -> Tensor:
        if self.config.final == "zero":
            return torch.zeros((), dtype=torch.float64)
        if not isinstance(self.interpolant, DiscreteVP):
            raise ValueError(f"final='first': the path {type(self.interpolant).__name__} has no first trained timestep")
        return self.interpolant.time(torch.zeros(()))

    def _warm_steps(self, steps: int, first: int) -> range:
        """The steps of several stages; ``first`` is the first that has a place in the history."""
        order, rest = self.config.solver_order, steps - first
        if order == 1 or rest <= 1 or self.config.warmup == "ramp":
            return range(0)
        if self.config.warmup == "improved_euler":
            return range(first, first + 1)
        if rest < order:
            raise ValueError(
                f"num_inference_steps={steps}: warmup='prk' with solver_order={order} takes at least {first + order} "
                f"steps (or {first + 1}); use warmup='improved_euler' or 'ramp'"
            )
        return range(first, first + order - 1)

    def _check_uniform(self, t: Tensor, end: Tensor) -> None:
        if self.config.coefficients != "uniform" or self.config.solver_order == 1 or len(t) == 1:
            return
        lengths, last = t[:-1] - t[1:], t[-1] - end
        longest, shortest = max(lengths.max(), last), lengths.min()
        if longest > shortest * (1 + 1e-4):
            raise ValueError(
                "coefficients='uniform' needs steps of one length, of which only the last may be shorter; got lengths "
                f"from {shortest.item():.4g} to {longest.item():.4g} in t; use coefficients='variable'"
            )

    def _middle(self, t: Tensor, u: Tensor) -> Tensor:
        """Half way from ``t`` to ``u`` in the variable in which the coefficients are those of a polynomial."""
        if self.quantity != "epsilon" or self.config.coefficients == "uniform":
            return (t + u) / 2
        wanted = (_ratio(self.interpolant, t) + _ratio(self.interpolant, u)) / 2
        low, high = u, t
        for _ in range(60):
            half = (low + high) / 2
            low, high = (low, half) if _ratio(self.interpolant, half) > wanted else (half, high)
        return high

    # -- the steps ------------------------------------------------------------------------------------------------

    def step(
        self, model_output: Tensor, timestep, sample: Tensor, return_dict: bool = True
    ) -> StepOutput | tuple[Tensor]:
        """Move to the next evaluation; ``sample`` ``(B, ...)``, ``model_output`` of the path's prediction type."""
        i = self._index(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        output = model_output.to(x.dtype)
        if self.quantity == "epsilon" and self.interpolant.alpha(self.times[i]) == 0:
            clean = self.interpolant.convert(output, self.prediction_type, "sample", x, self.times[i])
            x = self.interpolant.interpolate(clean, x / float(self.interpolant.sigma(self.times[i])), self.times[i + 1])
        else:
            q = self.interpolant.convert(output, self.prediction_type, self.quantity, x, self.times[i])
            x = self._multistep(i, x, q) if len(self._stages[i][1]) == 1 else self._stage(i, x, q)
        self._step_index = i + 1
        x = x.to(sample.dtype)
        return StepOutput(prev_sample=x) if return_dict else (x,)

    def _multistep(self, i: int, x: Tensor, q: Tensor) -> Tensor:
        self._remember(i, q)
        if self.config.coefficients == "uniform":
            nodes = torch.arange(len(self._history), dtype=torch.float64)
            weights = adams_weights(nodes, torch.tensor(float(len(nodes))))
        else:
            steps = torch.tensor([k for k, _ in self._history])
            weights = adams_weights(self._node(self.times[steps]), self._node(self.times[i + 1]))
        q = torch.zeros_like(q)
        for weight, (_, output) in zip(weights, self._history, strict=True):
            q = q + weight * output
        return self._transfer(x, q, i, i + 1)

    def _stage(self, i: int, x: Tensor, q: Tensor) -> Tensor:
        stage, weights = self._stages[i]
        if stage == 0:
            self._remember(i, q)
            self._begun = (i, x, weights[0] * q)
        elif self._begun is None:  # the run began within this step
            return self._transfer(x, q, i, i + 1)
        else:
            k, x, total = self._begun
            self._begun = (k, x, total + weights[stage] * q)
        k, x, total = self._begun
        if stage + 1 < len(weights):
            return self._transfer(x, q, k, i + 1)
        self._begun = None
        return self._transfer(x, total, k, i + 1)

    def _remember(self, i: int, q: Tensor) -> None:
        self._history = [*self._history, (i, q)][-self.config.solver_order :]

    def _node(self, t: Tensor) -> Tensor:
        return _ratio(self.interpolant, t) if self.quantity == "epsilon" else t

    def _transfer(self, x: Tensor, q: Tensor, i: int, j: int) -> Tensor:
        """From the time of evaluation ``i`` to that of ``j`` with ``q`` held fixed."""
        t, u = self.times[i], self.times[j]
        if self.quantity != "epsilon":
            return x + float(u - t) * q
        alpha, sigma, path = float(self.interpolant.alpha(t)), float(self.interpolant.sigma(t)), self.interpolant
        keep = float(path.alpha(u)) / alpha
        return keep * x + (float(path.sigma(u)) - keep * sigma) * q

    def gather(self, index: Tensor) -> None:
        """Let row ``j`` go on from the history of row ``index[j]``; ``index`` ``(B,)``."""
        self._history = [(k, output[index]) for k, output in self._history]
        if self._begun is not None:
            k, x, total = self._begun
            self._begun = (k, x[index], total[index])


def adams_weights(nodes: Tensor, end: Tensor) -> list[float]:
    """Weights ``c_j`` with which outputs at ``nodes`` ``(k,)``, the newest last, average a polynomial up to ``end``.

    ``c_j`` is the mean of the Lagrange polynomial of node ``j`` over the interval from the last node to ``end``: exact
    for polynomials of degree below ``k``. Equal distances give the Adams-Bashforth weights. float64.
    """
    s = (nodes - nodes[-1]) / (end - nodes[-1])
    degree = torch.arange(len(nodes), dtype=torch.float64)
    return torch.linalg.solve(s[None] ** degree[:, None], 1 / (degree + 1)).tolist()


def _ratio(interpolant: Interpolant, t: Tensor) -> Tensor:
    return interpolant.sigma(t) / interpolant.alpha(t)
