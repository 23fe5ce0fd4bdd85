import json
import subprocess
import sys

import pytest
import torch

from genkit.testing import tiny

SCALE = {"flux": "true_cfg_scale"}


@pytest.fixture
def diffusers_image():
    """``diffusers_image(pipe, name, **changes)``: what the pipeline of Diffusers itself makes, as a float array."""

    def call(pipe, name, **changes):
        arguments = tiny.call_arguments(name, 3) | dict(negative_prompt="two dogs") | changes
        scale = arguments.pop("scale", 3.0)
        arguments[SCALE.get(name, "guidance_scale")] = scale
        return torch.from_numpy(pipe(**arguments).images)

    return call


@pytest.fixture
def fresh_process():
    """``fresh_process(code)``: what ``code`` prints as JSON in a Python that has imported genkit and nothing else."""

    def run(code: str):
        code = "import genkit, json, torch\ntorch.set_num_threads(1)\n" + code
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
