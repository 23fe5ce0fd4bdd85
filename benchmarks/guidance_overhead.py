"""What each guider costs beside the network: one evaluation on (8, 4, 128, 128) latents whose network costs nothing.

Printed over CFG's bare arithmetic ``u + w (c - u)``, and over Diffusers' guider of the same name where it has one.
Bound: ours takes at most 1.0x the time of Diffusers' own, in one run.
"""

import sys
from pathlib import Path

import diffusers
import torch
from _common import paired, ratio, report

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.guidance import Point
from genkit.interpolants import Linear

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.ready import GUIDERS, ready  # noqa: E402  (what each guider needs to run)

SHAPE, ROUNDS = (8, 4, 128, 128), 31
# Settings under which both do their whole work: projection, cap and momentum.
APG = dict(guidance_scale=7.5, eta=0.0, momentum=-0.5)
THEIRS = {
    "cfg": diffusers.ClassifierFreeGuidance(guidance_scale=7.5),
    "apg": diffusers.AdaptiveProjectedGuidance(
        guidance_scale=7.5, eta=0.0, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=15.0
    ),
}
OURS = {"cfg": dict(guidance_scale=7.5), "apg": APG}


class Free(Denoiser):
    """A network that costs nothing: whatever is asked, the same two predictions."""

    def __init__(self, device):
        super().__init__(None, Linear(), "flow_prediction")
        generator = torch.Generator().manual_seed(0)
        self.z, *self.raw = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(3))

    def many(self, z, t, conditions, *, timestep=None):
        self.calls += len(conditions)
        return [Prediction(raw, "flow_prediction", self.interpolant, z, t) for raw in self.raw[: len(conditions)]]

    def forward(self, z, t, timestep, condition):
        return self.raw[0]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = Free(device)
    (cond, uncond), labels = denoiser.raw, torch.arange(8, device=device)
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 10)})
    times = torch.linspace(1, 0.5, 11, dtype=torch.float64)

    def run(guider):
        @torch.no_grad()
        def evaluations():
            state = None
            for t, t_next in zip(times[:-1], times[1:], strict=True):
                answer, state = guider.evaluate(Point(denoiser, denoiser.z, t, t_next, None, condition), state)
            del answer
            guider.start_run()

        return evaluations

    @torch.no_grad()
    def bare():
        for _ in times[1:]:
            answer = uncond + 7.5 * (cond - uncond)
        del answer

    def native(guider):
        @torch.no_grad()
        def evaluations():
            for i, t in enumerate(times[:-1]):
                guider.set_state(i, 10, 1000 * t)
                answer = guider.forward(cond, uncond)  # held until the next, as a pipeline holds it
            del answer

        return evaluations

    candidates = {"bare CFG": bare}
    for name, cls in GUIDERS.items():
        candidates[name] = run(ready(cls, SHAPE, **OURS.get(name, {})))
        if name in THEIRS:
            candidates[f"{name} (Diffusers)"] = native(THEIRS[name])
    seconds = paired(candidates, rounds=ROUNDS)
    rows = [
        {"guider": name, "best ms an evaluation": 1e2 * min(s), "ratio to bare CFG": ratio(seconds, name, "bare CFG")}
        for name, s in seconds.items()
    ]
    bounds = {
        f"{name} / Diffusers' {type(theirs).__name__}": (ratio(seconds, name, f"{name} (Diffusers)"), 1.0)
        for name, theirs in THEIRS.items()
    }
    report("guidance_overhead", rows, bounds)


if __name__ == "__main__":
    main()
