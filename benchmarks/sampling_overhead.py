"""The sampling loop against a bare Euler loop on the same network: at most 1.03x the time, in one run."""

import diffusers
import torch
from _common import paired, ratio, report

from genkit.denoisers import Condition, wrap
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps

STEPS, BATCH, ROUNDS = 8, 256, 41  # the batch in which `genkit demo` samples


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = DiT(hidden_size=160, patch_size=4).eval().to(device)
    for layer in (network.out, network.modulation, *(b.modulation for b in network.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.02)
    denoiser = wrap(network, Linear(), "flow_prediction")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x = ItemRNG(0, range(BATCH), device).normal((1, 8, 8))
    labels = torch.arange(BATCH, device=device) % 10
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 10)})

    def ours() -> torch.Tensor:
        set_timesteps(scheduler, STEPS, device)
        return sample(denoiser, scheduler, x, condition)

    @torch.no_grad()
    def bare() -> torch.Tensor:
        z = x
        for k in range(STEPS):
            t = torch.full((BATCH,), 1 - k / STEPS, device=device)
            z = z - network(z, t, None, labels) / STEPS
        return z

    torch.testing.assert_close(ours(), bare(), rtol=1e-4, atol=1e-4)  # the same work
    # The bare loop twice: the ratio of the two is the measurement's own noise.
    seconds = paired({"genkit": ours, "bare Euler": bare, "bare Euler again": bare}, rounds=ROUNDS)
    rows = [
        {"loop": name, "best ms a step": 1e3 * min(s) / STEPS, "ratio to bare": ratio(seconds, name, "bare Euler")}
        for name, s in seconds.items()
    ]
    report("sampling_overhead", rows, {"genkit / bare Euler": (ratio(seconds, "genkit", "bare Euler"), 1.03)})


if __name__ == "__main__":
    main()
