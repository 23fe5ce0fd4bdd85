"""Order of accuracy of the pseudo-numerical scheduler on a mixture of three Gaussians: within 0.3 of the stated orders.

Errors are mean distances to the exact flow, from standard normal starts, at doubling numbers of steps. The order is the
last two errors' (where it still changes, that of either pair of the last three). With the same exact model, predicting
``v_prediction`` must be as accurate as ``epsilon`` (ratio at most 1.001). Diffusers' PNDM is not: at 50 steps with
``v_prediction`` the error must be at most a 60th of its error. On flow times shifted by 3, whose steps grow, the table
says from how many steps on a higher order pays; at 28 the error of PLMS must be at most a fifth of Euler's.
"""

import math
from collections import deque
from functools import cache
from itertools import islice

import diffusers
import torch
from _common import report
from torch import Tensor

from genkit.interpolants import Interpolant, Linear, Trigonometric, VariancePreserving
from genkit.sampling import sample, trajectory
from genkit.schedulers.pndm import PseudoNumericalScheduler
from genkit.testing.oracles import GaussianMixture, probability_flow

STEPS, DIFFUSERS_STEPS, SHIFTED_STEPS = (20, 40, 80, 160, 320), (10, 20, 50, 100), (8, 14, 28, 56)
MODELS = ("epsilon", "v_prediction")


class MiddleInTime(PseudoNumericalScheduler):
    """The Runge-Kutta warm-up as published, also under variable coefficients."""

    def _middle(self, t, u):
        return (t + u) / 2


DDIM = dict(solver_order=1, space="eps")
S_PNDM = dict(solver_order=2, warmup="improved_euler")
F_PNDM = dict(solver_order=4, warmup="prk")
PLMS = dict(solver_order=4, warmup="improved_euler")
RAMP = dict(solver_order=4, warmup="ramp")
UNIFORM, EPS, V = dict(coefficients="uniform"), dict(space="eps"), dict(space="v")

PATHS: dict[str, tuple[Interpolant, float, float]] = {
    "VP": (VariancePreserving(0.1, 20.0), 1.0, 0.05),
    "flow": (Linear(), 0.98, 0.02),
}
CIRCLE = Trigonometric()
# path, method, its settings, samples, errors at STEPS and order(s), as an independent implementation has them.
TABLE = [
    ("VP", "DDIM", DDIM, 256, (8.5e-2, 4.2e-2, 2.1e-2, 1.0e-2, 5.2e-3), (1.0,)),
    ("VP", "S-PNDM, eps", S_PNDM | EPS | UNIFORM, 256, (1.5e-2, 4.1e-3, 1.1e-3, 2.8e-4, 7.1e-5), (1.98,)),
    ("VP", "F-PNDM, eps, uniform", F_PNDM | EPS | UNIFORM, 256, (7.7e-3, 8.6e-4, 1.6e-4, 3.9e-5, 9.8e-6), (2.0,)),
    ("VP", "F-PNDM, eps, variable", F_PNDM | EPS, 256, (9.9e-3, 1.0e-3, 7.0e-5, 4.2e-6, 2.5e-7), (4.1,)),
    ("VP", "F-PNDM, v", F_PNDM | V, 256, (9.0e-3, 6.5e-4, 3.6e-5, 1.8e-6, 9.1e-8), (4.3,)),
    ("VP", "ramp, v", RAMP | V, 256, (9.0e-3, 6.6e-4, 3.8e-5, 2.7e-6, 4.3e-7), (3.8, 2.6)),
    ("flow", "DDIM", DDIM, 64, (5.5e-2, 2.8e-2, 1.4e-2, 7.0e-3, 3.5e-3), (1.0,)),
    ("flow", "S-PNDM, v", S_PNDM | V, 64, (2.8e-3, 7.4e-4, 1.9e-4, 4.8e-5, 1.2e-5), (2.0,)),
    ("flow", "F-PNDM, eps, uniform", F_PNDM | EPS | UNIFORM, 64, (3.6e-3, 7.5e-4, 1.8e-4, 4.4e-5, 1.1e-5), (2.0,)),
    (
        "flow",
        "F-PNDM, eps, variable, middle in t",
        F_PNDM | EPS,
        64,
        (2.6e-3, 4.6e-4, 5.9e-5, 6.5e-6, 5.6e-7),
        (3.2, 3.6),
    ),
    ("flow", "F-PNDM, v", F_PNDM | V, 64, (5.6e-4, 3.2e-5, 1.8e-6, 1.1e-7, 6.9e-9), (4.0,)),
    ("flow", "PLMS, v", PLMS | V, 24, (9.6e-4, 5.4e-5, 2.8e-6, 2.2e-7, 2.4e-8), (3.7, 3.2)),
    ("flow", "ramp, v", RAMP | V, 24, (1.9e-3, 3.2e-4, 7.6e-5, 1.9e-5, 4.7e-6), (2.0,)),
]


def mixture(path: Interpolant) -> GaussianMixture:
    """The law of the data."""
    return GaussianMixture(
        [[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], [0.4, 0.3, 0.5], [0.4, 0.35, 0.25], interpolant=path
    )


def starts(count: int) -> Tensor:
    """The first of 256 standard normal points in the plane."""
    return torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:count]


def distance(x: Tensor, exact: Tensor) -> float:
    """Mean length of the difference."""
    return (x - exact).norm(dim=1).mean().item()


def solve(path_name: str, method: str, settings: dict, x: Tensor, steps: int, model: str) -> Tensor:
    """``x`` at the end of its path's range after equal steps; the grid goes on to data, the run does not."""
    path, t, end = PATHS[path_name]
    scheduler = (MiddleInTime if "middle in t" in method else PseudoNumericalScheduler)(**settings)
    scheduler.interpolant, scheduler.prediction_type = path, model
    step = (t - end) / steps
    grid = t - step * torch.arange(math.ceil(t / step - 1e-9), dtype=torch.float64)
    scheduler.set_timesteps(timesteps=path.num_train_timesteps * grid)  # type: ignore[attr-defined]
    calls = int((scheduler.times - end).abs().argmin())
    states = trajectory(mixture(path).denoiser(model), scheduler, x)
    return deque(islice(states, calls), maxlen=1)[0].x


@cache
def exact_ends(path: Interpolant, t: float, end: float) -> Tensor:
    """Where the flow carries all of the starts."""
    return probability_flow(mixture(path).velocity, starts(256), t, end, 1000)


def errors(path_name: str, method: str, settings: dict, samples: int, model: str = "epsilon") -> list[float]:
    """Errors at ``STEPS``."""
    x, exact = starts(samples), exact_ends(*PATHS[path_name])[:samples]
    return [distance(solve(path_name, method, settings, x, steps, model), exact) for steps in STEPS]


def orders(found: list[float], count: int) -> list[float]:
    """The last ``count`` orders of errors at doubling numbers of steps."""
    return [math.log2(a / b) for a, b in zip(found[:-1], found[1:], strict=True)][-count:]


def trained_errors(scheduler, model: str) -> list[float]:
    """Errors at ``DIFFUSERS_STEPS`` on DDPM's discrete path, from the first timestep to timestep 0."""
    path, found = PseudoNumericalScheduler.from_scheduler(scheduler).interpolant, []
    for steps in DIFFUSERS_STEPS:
        scheduler.set_timesteps(steps)
        t = path.time(torch.stack((scheduler.timesteps[0].double(), torch.zeros(()))))
        # alpha^2 + sigma^2 = 1: the same flow, on a path without the kinks of discrete times.
        angles = torch.atan2(path.sigma(t), path.alpha(t)) / (math.pi / 2)
        end = sample(mixture(path).denoiser(model), scheduler, starts(256))
        found.append(distance(end, exact_ends(CIRCLE, *angles.tolist())))
    return found


def shifted_errors(**settings) -> list[float]:
    """Errors at ``SHIFTED_STEPS`` from noise to data on the linear path, at times shifted by 3."""
    path, found = PATHS["flow"][0], []
    scheduler = PseudoNumericalScheduler(shift=3.0, **settings)
    for steps in SHIFTED_STEPS:
        scheduler.set_timesteps(steps)
        end = sample(mixture(path).denoiser("v_prediction"), scheduler, starts(256))
        found.append(distance(end, exact_ends(path, 1.0, 0.0)))
    return found


def discrete(cls, model: str, **settings):
    """DDPM's linear betas, from Diffusers' scheduler or around it."""
    theirs = diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type=model)
    if cls is diffusers.PNDMScheduler:
        return theirs
    return cls.from_scheduler(theirs, timestep_spacing="leading", final="first", **settings)


def written(values: list[float]) -> str:
    return " ".join(f"{v:.1e}" for v in values)


def main() -> None:
    torch.set_num_threads(1)
    rows, bounds, ratios = [], {}, []

    def add(path: str, method: str, steps, by_model: dict[str, list[float]], measured: str, stated: str) -> None:
        row = {"path": path, "method": method, "steps": " ".join(map(str, steps))}
        rows.append(row | {m: written(e) for m, e in by_model.items()} | {"order": measured, "stated": stated})

    for path, method, settings, samples, _, stated in TABLE:
        found = {model: errors(path, method, settings, samples, model) for model in MODELS}
        measured = orders(found["epsilon"], len(stated))
        gap = max(abs(m - s) for m, s in zip(measured, stated, strict=True))
        bounds[f"{path}, {method}: measured and stated order apart"] = (gap, 0.3)
        ratios += [v / e for e, v in zip(*found.values(), strict=True)]
        shown = (" ".join(f"{m:.2f}" for m in values) for values in (measured, stated))
        add(path, method, STEPS, found, *shown)
    by_method = {}
    for method, cls, settings in (
        ("Diffusers PNDM", diffusers.PNDMScheduler, {}),
        ("PLMS, eps, uniform", PseudoNumericalScheduler, PLMS | EPS | UNIFORM),
        ("PLMS, eps, variable", PseudoNumericalScheduler, PLMS | EPS),
    ):
        found = {model: trained_errors(discrete(cls, model, **settings), model) for model in MODELS}
        by_method[method] = found
        add("DDPM, 1000 betas", method, DIFFUSERS_STEPS, found, "", "")
        if cls is PseudoNumericalScheduler:
            ratios += [v / e for e, v in zip(*found.values(), strict=True)]
    shifted = {
        "Euler": shifted_errors(solver_order=1),
        "order 2, v": shifted_errors(**S_PNDM),
        "order 3, v": shifted_errors(solver_order=3),
        "PLMS, v": shifted_errors(**PLMS),
    }
    for method, found in shifted.items():
        add("flow, shift 3", method, SHIFTED_STEPS, {"epsilon": [], "v_prediction": found}, "", "")
    at = SHIFTED_STEPS.index(28)
    bounds["flow, shift 3: error at 28 steps, PLMS / Euler"] = (shifted["PLMS, v"][at] / shifted["Euler"][at], 0.2)
    bounds["error with v_prediction / with epsilon, the worst of all"] = (max(ratios), 1.001)
    at = DIFFUSERS_STEPS.index(50)
    ours, theirs = (by_method[m]["v_prediction"][at] for m in ("PLMS, eps, uniform", "Diffusers PNDM"))
    bounds["error with v_prediction at 50 steps, PLMS / Diffusers PNDM"] = (ours / theirs, round(1 / 60, 4))
    report("pndm_order", rows, bounds)


if __name__ == "__main__":
    main()
