import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from genkit.cli import app
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


@pytest.fixture
def sampled_with(tmp_path):
    """``check(pipe, folder, *asked)``: ``genkit sample`` takes none, all and two halves of the adapter in ``folder``.

    Returns the command up to its output folder; one with the whole adapter is ``tmp_path / "one"``.
    """

    def check(pipe, folder, *asked):
        pipe.save_pretrained(tmp_path / "model")
        arguments = ["sample", str(tmp_path / "model"), "--steps", "2", "--quiet", *asked, "--output"]

        def files(output, *more):
            result = CliRunner().invoke(app, [*arguments, str(output), *more])
            assert result.exit_code == 0, result.output
            return [p.read_bytes() for p in sorted(output.rglob("grid.png"))]

        plain = files(tmp_path / "plain")
        assert files(tmp_path / "none", "--adapter", f"{folder}=0") == plain
        one = files(tmp_path / "one", "--adapter", str(folder))
        assert one != plain
        assert files(tmp_path / "halves", "--adapter", f"{folder}=0.5", "--adapter", f"{folder}=0.5") == one
        settings = json.loads((tmp_path / "halves" / "settings.json").read_text())
        assert settings["adapters"] == [[str(folder), 0.5]] * 2
        return arguments

    return check
