import logging

import pytest
import torch
from diffusers import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks

from genkit.guidance import attach
from genkit.testing import tiny

BLOCKS = {"sd3": StableDiffusion3AutoBlocks, "sdxl": StableDiffusionXLAutoBlocks}


@pytest.fixture
def modular_pipeline(tiny_pipeline):
    """``modular_pipeline(name)``: ``(classic, modular)`` of the same components."""

    def get(name):
        classic = tiny_pipeline(name)
        modular = BLOCKS[name]().init_pipeline()
        names = {spec.name for spec in BLOCKS[name]().expected_components}
        modular.update_components(**{k: v for k, v in classic.components.items() if k in names and v is not None})
        modular.set_progress_bar_config(disable=True)
        return classic, modular

    return get


@pytest.fixture
def run_pipeline():
    """``run(pipe, name, **changes)``: the latents, with a negative prompt; guidance on in classic pipelines."""

    def run(pipe, name, **changes):
        arguments = tiny.call_arguments(name, 3) | dict(output_type="latent")
        if name == "dit":
            arguments |= dict(output_type="np")
        else:
            arguments |= dict(negative_prompt="two dogs")
        if hasattr(pipe, "update_components"):
            return pipe(**arguments | changes, output="images" if name == "sd3" else "latents")
        arguments |= dict(true_cfg_scale=2.0) if name == "flux" else dict(guidance_scale=2.0)
        arguments = {k: v for k, v in (arguments | changes).items() if v is not None}
        output = pipe(**arguments).images
        return output if isinstance(output, torch.Tensor) else torch.from_numpy(output)

    return run


@pytest.fixture
def run_modular(modular_pipeline, run_pipeline):
    """``run(name, guider)``: as ``run_pipeline``, of a modular pipeline that the guider is attached to."""

    def run(name, guider):
        _, modular = modular_pipeline(name)
        attach(modular, guider)
        return run_pipeline(modular, name)

    return run


@pytest.fixture
def relative():
    """The largest difference, in units of the largest value."""
    return lambda a, b: ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def warnings_of_genkit(caplog):
    caplog.set_level(logging.WARNING, logger="genkit")
    return caplog
