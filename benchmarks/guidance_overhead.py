"""What each guider costs beside the network: one evaluation on (8, 4, 128, 128) latents whose network costs nothing.

Printed over CFG's bare arithmetic ``u + w (c - u)``, and over Diffusers' guider of the same name where it has one. GFCG
and readout guidance run a small classifier and a small head, and the latter's gradient.
Bound: ours takes at most 1.0x the time of Diffusers' own, in one run.
"""

import diffusers
import torch
from _common import paired, ratio, report

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.guidance import Guider, Point
from genkit.guidance.readout import SpatialTarget
from genkit.interpolants import Linear
from genkit.networks.readout_head import ReadoutHead
from genkit.registry import members

GUIDERS = members("genkit.guidance", Guider)
SHAPE, ROUNDS = (8, 4, 128, 128), 31
# Settings under which both do their whole work: projection, cap and momentum.
APG = dict(guidance_scale=7.5, eta=0.0, momentum=-0.5)
THEIRS = {
    "cfg": diffusers.ClassifierFreeGuidance(guidance_scale=7.5),
    "apg": diffusers.AdaptiveProjectedGuidance(
        guidance_scale=7.5, eta=0.0, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=15.0
    ),
}
OURS = {"cfg": dict(guidance_scale=7.5), "apg": APG, "experts": dict(exponents={"cond": 7.5, "uncond": -6.5})}


class Free(Denoiser):
    """A network that costs nothing: whatever is asked, the same two predictions."""

    def __init__(self, device):
        super().__init__(None, Linear(), "flow_prediction")
        generator = torch.Generator().manual_seed(0)
        self.z, *self.raw = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(3))

    def many(self, z, t, conditions, *, timestep=None):
        self.calls += len(conditions)
        # Where a rule wants a gradient, there is one to take.
        raws = [raw + 0 * z if z.requires_grad else raw for raw in self.raw[: len(conditions)]]
        return [Prediction(raw, "flow_prediction", self.interpolant, z, t) for raw in raws]

    def forward(self, z, t, timestep, condition):
        return self.raw[0]


def given(name: str, device: str) -> dict:
    """What the guiders are given that need something; models that cost little."""
    if name == "autoguidance":
        return {"weak": Free(device)}
    if name == "gfcg":
        pool, last = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Linear(64, 11)
        return {"classifier": torch.nn.Sequential(pool, torch.nn.Flatten(), last).to(device)}
    if name == "h_transform":
        return {"reference": torch.zeros(1, *SHAPE[1:], device=device)}
    if name == "readout":
        head = ReadoutHead(["sample"], [SHAPE[1]], projection_dim=24, norm_num_groups=1).to(device)
        return {"targets": {"map": SpatialTarget(head=head, control=torch.zeros(1, 1, *SHAPE[2:], device=device))}}
    return {}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = Free(device)
    (cond, uncond), labels = denoiser.raw, torch.arange(SHAPE[0], device=device)
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
                # As its modular pipelines do at a step.
                guider.set_state(step=i, num_inference_steps=10, timestep=1000 * t)
                batches = guider.prepare_inputs({"encoder_hidden_states": (labels, labels + 1)})
                for batch, raw in zip(batches, denoiser.raw, strict=True):
                    batch.noise_pred = raw
                answer = guider(batches)  # held until the next
            del answer

        return evaluations

    candidates = {"bare CFG": bare}
    for name, cls in GUIDERS.items():
        candidates[name] = run(cls(**OURS.get(name, {})).using(**given(name, device)))
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
