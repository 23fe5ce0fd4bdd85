"""Flow maps distilled from tiny pipelines into LoRAs: trained, saved, loaded by another process, sampled."""

import json
import math
import subprocess
import sys

import pytest
import torch

from genkit.denoisers import from_pipeline
from genkit.pipelines import FewStepPipeline
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training.export import export

LAW = {"low": 1.0, "high": 8.0, "default": 4.0}
TEXT = dict(prompt=["a cat", "blue"], height=32, width=32)
INPUTS = {
    "sd15": TEXT,
    "sdxl": TEXT,
    "sd3": TEXT | dict(max_sequence_length=16),
    "flux": TEXT | dict(max_sequence_length=16),
    "dit": dict(class_labels=[3, 7]),
}
CALLS = (dict(num_inference_steps=1), dict(num_inference_steps=4, guidance_scale=[1.5, 7.0]))
CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from genkit.pipelines import FewStepPipeline
from genkit.rng import ItemRNG
folder, inputs, calls = json.loads(sys.argv[1])
made = {}
for name, told in inputs.items():
    pipe = FewStepPipeline.from_pretrained(f"{folder}/{name}/base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_flow_map(f"{folder}/{name}/run/flow_map")
    latents = ItemRNG(0, range(2)).normal((4, 16, 16))
    made[name] = [pipe(latents=latents, output_type="latent", **told, **call).images.tolist() for call in calls]
print(json.dumps(made))
"""


def settings(base, **changes):
    values = dict(
        model=dict(pretrained=str(base)),
        teacher=str(base),
        objective=dict(name="flow_map", loss="lsd", diagonal_fraction=0.5, guidance_scale=LAW),
        data=dict(name="synthetic"),
        adapter=dict(kind="lora", rank=4, alpha=8),
        optimizer=dict(name="AdamW", lr=1e-2),
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=4,
        max_train_steps=3,
        checkpointing_steps=3,
    )
    return values | changes


def test_lora_students_of_every_architecture(toys, tmp_path):
    expected = {}
    for name, told in INPUTS.items():
        base = tmp_path / name / "base"
        teacher = tiny.pipeline(name)
        teacher.save_pretrained(base)
        checkpointed = settings(base, gradient_checkpointing=name in ("sd15", "dit"))
        trainer = toys.run(toys.digits(tmp_path / name / "run", **checkpointed))
        trained = list(trainer.roles["student"].parameters)
        assert all("lora" in key or "gap_embedder" in key for key in trained)
        assert any("scalar_embedders.guidance_scale" in key for key in trained)
        assert all(math.isfinite(line["loss"]) for line in toys.losses(tmp_path / name / "run"))
        assert export(trainer) == tmp_path / name / "run" / "flow_map"
        pipe = FewStepPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_flow_map(tmp_path / name / "run" / "flow_map")
        assert pipe.scalars == {"guidance_scale": 4.0}
        latents = ItemRNG(0, range(2)).normal((4, 16, 16))
        images = [pipe(latents=latents, output_type="latent", **told, **call).images for call in CALLS]
        assert all(image.isfinite().all() for image in images)
        expected[name] = images
    arguments = json.dumps([str(tmp_path), INPUTS, CALLS])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    for name, images in expected.items():
        for mine, theirs in zip(images, got[name], strict=True):
            torch.testing.assert_close(torch.tensor(theirs), mine, rtol=1e-4, atol=1e-4)


def test_a_low_rank_student_of_the_network_of_two_times(toys, tmp_path):
    toys.run(toys.digits(tmp_path / "teacher", max_train_steps=4, checkpointing_steps=4))
    objective = dict(name="flow_map", loss="lsd", diagonal_fraction=0.5, guidance_scale=LAW)
    changes = dict(
        objective=objective, adapter=dict(kind="lora", rank=2, alpha=4), optimizer=dict(name="AdamW", lr=1e-2)
    )
    trainer = toys.run(toys.digits(tmp_path / "student", **changes))
    names = {key.split(".")[0] for key in trainer.roles["student"].parameters}
    assert names == {"gap_embed", "scalar_embed", "blocks"}
    folder = export(trainer)
    assert folder == tmp_path / "student/pipeline"
    assert hasattr(trainer.run.student.network, "peft_config")  # the run's own is left as it was
    pipe = FewStepPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    x = ItemRNG(0, range(2)).normal((1, 8, 8))
    told = dict(class_labels=[1, 2], latents=x, output_type="latent", num_inference_steps=1)
    with trainer.averaged(), torch.no_grad():
        condition = from_pipeline(pipe).encode(pipe, class_labels=[1, 2])
        one = torch.ones(2)
        for w, given in ((4.0, {}), (7.0, {"guidance_scale": 7.0})):
            told_w = condition.with_values({"guidance_scale": w * one})
            expected = trainer.run.student.jump(x, one, 0 * one, told_w)
            torch.testing.assert_close(pipe(**told, **given).images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("jvp", ["dual", "func"])
def test_resumes_bit_for_bit(jvp, toys, tmp_path):
    objective = dict(name="flow_map", loss="lsd", diagonal_fraction=0.5, guidance_scale=LAW, jvp=jvp)
    whole = toys.run(toys.digits(tmp_path / "whole", objective=objective, max_train_steps=6, checkpointing_steps=3))
    again = toys.digits(
        tmp_path / "again", objective=objective, max_train_steps=6, resume=str(tmp_path / "whole/checkpoint-3")
    )
    toys.run(again)
    for a, b in zip(whole.run.student.module.parameters(), again.run.student.module.parameters(), strict=True):
        assert torch.equal(a, b)
