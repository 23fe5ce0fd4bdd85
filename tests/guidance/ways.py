"""A guider in genkit's own loop, on what ``run_pipeline`` of the conftest gives a pipeline; networks in wrappers."""

import accelerate
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from genkit import sample
from genkit.denoisers import from_pipeline
from genkit.denoisers.flux import pack


def own_inputs(pipe, name):
    """The noise and the condition of ``run_pipeline``; sets the times."""
    settings = {
        "sd3": dict(max_sequence_length=16),
        "flux": dict(max_sequence_length=16),
        "sdxl": dict(height=32, width=32),
        "sd15": {},
    }[name]
    condition = from_pipeline(pipe).encode(pipe, "a cat", negative_prompt="two dogs", **settings)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    if name == "flux":
        pipe.scheduler.set_timesteps(sigmas=[1, 2 / 3, 1 / 3], mu=calculate_shift(64, 256, 4096, 0.5, 1.15))
    else:
        pipe.scheduler.set_timesteps(3)
    return x * getattr(pipe.scheduler, "init_noise_sigma", 1), condition


def own_latents(pipe, name, guider):
    """What the loop makes of those, laid out as the pipeline has it."""
    x, condition = own_inputs(pipe, name)
    made = sample(from_pipeline(pipe), pipe.scheduler, x, condition, guider=guider)
    return pack(made) if name == "flux" else made


def compiled(network):
    return torch.compile(network, backend="eager")


def offloaded(network):
    accelerate.cpu_offload(network, execution_device="cpu")
    return network


def model_offloaded(network):
    accelerate.cpu_offload_with_hook(network, "cpu")
    return network
