"""Every pipeline as a portable folder: Diffusers' stock loader takes it, in a process that finds no genkit."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import genkit
from genkit.guidance import APG, CFG
from genkit.guidance.h_transform import HTransform
from genkit.hub import save_portable
from genkit.pipelines import (
    CoarseGuidedPipeline,
    FewStepPipeline,
    FeynmanKacPipeline,
    ProductPipeline,
    TextToImagePipeline,
)
from genkit.testing import tiny
from tests.pipelines.test_few_step import write_student

CHILD = """
import sys
sys.path = [p for p in sys.path if p not in ("", {root!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import importlib.util
assert importlib.util.find_spec("genkit") is None
import json
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
made = {{}}
for name, settings in json.loads({settings!r}).items():
    pipe = DiffusionPipeline.from_pretrained({folder!r} + "/" + name, trust_remote_code=True)
    first = () if name != "CoarseGuidedPipeline" else (torch.linspace(0, 1, 192).view(1, 3, 8, 8),)
    out = pipe(*first, generator=torch.Generator().manual_seed(0), output_type="latent", **settings)
    made[name] = type(pipe).__name__, out.images.tolist()
print(json.dumps(made))
"""


def test_portable_folders_load_without_genkit(tiny_pipeline, tmp_path):
    sd15, sd3 = tiny_pipeline("sd15"), tiny_pipeline("sd3")
    write_student(tiny_pipeline("sd15"), tmp_path / "student", scalars={"guidance_scale": 3.0})
    few = FewStepPipeline.from_pipe(tiny_pipeline("sd15"))
    few.load_flow_map(tmp_path / "student")
    pipes = [
        TextToImagePipeline.from_pipe(sd15, guider=APG(guidance_scale=6.0)),
        few,
        CoarseGuidedPipeline.from_pipe(sd3, guider=HTransform(exponent=2.0, guidance_scale=3.0)),
        FeynmanKacPipeline.from_pipe(sd15, guider=CFG(guidance_scale=3.0)),
        ProductPipeline.from_pipe(sd15, network_2=tiny.pipeline("sd15", seed=1).unet),
    ]
    settings, wanted = {}, {}
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        name = type(pipe).__name__
        save_portable(pipe, tmp_path / name)
        settings[name] = dict(prompt="a cat", num_inference_steps=2, height=32, width=32)
        if hasattr(pipe, "transformer") and pipe.transformer is not None:
            settings[name] |= dict(max_sequence_length=16)
        if isinstance(pipe, FeynmanKacPipeline):
            settings[name] |= dict(num_particles=2)
        if pipe is few:
            settings[name] |= dict(guidance_scale=6.0)
        first = (torch.linspace(0, 1, 192).view(1, 3, 8, 8),) if name == "CoarseGuidedPipeline" else ()
        seeded = torch.Generator().manual_seed(0)
        wanted[name] = pipe(*first, generator=seeded, output_type="latent", **settings[name]).images
    root = str(Path(genkit.__file__).parents[1])
    code = CHILD.format(root=root, settings=json.dumps(settings), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert set(got) == set(wanted)
    for name, (cls, images) in got.items():
        assert cls == name
        torch.testing.assert_close(torch.tensor(images), wanted[name], rtol=1e-5, atol=1e-5)
