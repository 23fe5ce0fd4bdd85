"""Low-rank students of a Diffusers network: what is trained, and what comes back from its files."""

import pytest
import torch
from safetensors.torch import load_file

from genkit import load_flow_map
from genkit._flow_map_files import LORA_NAME
from genkit.adapters import mix_adapters
from genkit.denoisers import TwoTime, from_pipeline
from genkit.training import checkpoint
from genkit.training.export import export


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from genkit.testing import tiny

    folder = tmp_path_factory.mktemp("sd3")
    tiny.pipeline("sd3").save_pretrained(folder)
    return folder


def make(toys, folder, base, **changes):
    settings = dict(
        model=dict(pretrained=str(base)),
        data=dict(name="synthetic"),
        adapter=dict(kind="lora", rank=4, alpha=8),
        optimizer=dict(name="AdamW", lr=1e-2),
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=2,
    )
    return toys.digits(folder, **settings | changes)


def outputs(student, condition):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.1])
    with torch.no_grad():
        if isinstance(student, TwoTime):
            return student.average_velocity(x, t, s, condition)
        return student(x, t, condition).velocity


@pytest.mark.parametrize("objective", ["flow_matching", "flow_map"])
def test_student_survives_its_files(objective, base, toys, tmp_path):
    objective = dict(name=objective) | (dict(loss="psd_m") if objective == "flow_map" else {})
    trainer = make(toys, tmp_path / "whole", base, objective=objective)
    condition = from_pipeline(trainer.run.pipe).encode(trainer.run.pipe, prompt=["a cat", "seven dogs"])
    with trainer.averaged():
        before = outputs(trainer.run.student, condition)
    names = list(trainer.roles["student"].parameters)
    assert names and all("lora" in n or "gap_embedder" in n for n in names)
    assert any("gap_embedder" in n for n in names) == (objective["name"] == "flow_map")
    toys.run(trainer)
    assert all(r.gradient_norm(None).isfinite() for r in trainer.roles.values())
    with trainer.averaged():
        after = outputs(trainer.run.student, condition)
    assert (after - before).abs().max() > 1e-2
    # In fresh weights of the base.
    pipe = type(trainer.run.pipe).from_pretrained(base)
    folder = export(trainer)
    if objective["name"] == "flow_map":
        loaded = load_flow_map(pipe, folder)
    else:
        pipe.load_lora_weights(folder)
        loaded = from_pipeline(pipe)
    torch.testing.assert_close(outputs(loaded, condition), after, rtol=0, atol=1e-5)
    # The checkpoint holds the low-rank weights alone, and the run goes on from it bit for bit.
    size = (tmp_path / "whole/checkpoint-2/student.safetensors").stat().st_size
    assert size < sum(p.numel() * 4 for p in trainer.run.student.module.parameters()) / 4
    resumed = make(toys, tmp_path / "again", base, objective=objective, resume=str(tmp_path / "whole/checkpoint-2"))
    toys.run(resumed)
    ours, theirs = (checkpoint.load_file(tmp_path / n / "checkpoint-4/student.safetensors") for n in ("whole", "again"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and ours.keys() == theirs.keys()


def test_targets_that_match_nothing_are_refused(base, toys, tmp_path):
    adapter = dict(kind="lora", target_modules=["to_q", "to_kk"])
    with pytest.raises(
        ValueError, match="adapter.target_modules='to_kk' matches no layer of SD3Transformer2DModel.*to_k,"
    ):
        make(toys, tmp_path, base, adapter=adapter)


def test_genkit_s_own_network_takes_a_lora(toys, tmp_path):
    trainer = toys.digits(tmp_path, adapter=dict(kind="lora", rank=2), max_train_steps=2)
    assert {n.split(".")[2] for n in trainer.roles["student"].parameters} == {"qkv", "proj"}
    toys.run(trainer)
    assert (export(trainer) / "pytorch_lora_weights.safetensors").is_file()


def test_what_was_trained_can_be_mixed(toys, tmp_path):
    changes = dict(adapter=dict(kind="lora", rank=2, alpha=6), max_train_steps=2, checkpointing_steps=2)
    folder = export(toys.run(toys.digits(tmp_path / "run", **changes)))
    mixed = load_file(mix_adapters([(folder, 0.5)], tmp_path / "mix") / LORA_NAME)
    plain = load_file(folder / LORA_NAME)
    ups = [key for key in plain if "lora_B" in key]
    assert ups and plain.keys() == mixed.keys()
    assert all(torch.allclose(mixed[k], 0.5 * 3 * plain[k]) for k in ups)


def test_gradient_checkpointing_changes_no_gradient(base, toys, tmp_path):
    runs = [
        toys.run(make(toys, tmp_path / str(on), base, gradient_checkpointing=on, max_train_steps=2))
        for on in (False, True)
    ]
    a, b = (toys.losses(tmp_path / str(on)) for on in (False, True))
    assert a == b
    assert runs[1].run.student.module.is_gradient_checkpointing


def test_pictures_are_encoded_and_decoded(base, toys, tmp_path):
    data = dict(name="synthetic", shape=[3, 32, 32], prompts=True)
    trainer = make(toys, tmp_path, base, data=data, sampling=dict(every=2, num_samples=2, num_inference_steps=1))
    toys.run(trainer)
    assert trainer.x0.shape == (2, 4, 16, 16)
    assert (tmp_path / "samples/step-4.png").is_file()
    from PIL import Image

    assert Image.open(tmp_path / "samples/step-4.png").size == (128, 64)


def test_what_is_frozen_can_be_kept_in_half_precision(base, toys, tmp_path):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make(toys, tmp_path / dtype, base, frozen_dtype=dtype)
        weights = list(trainer.run.student.module.parameters())
        assert {p.dtype for p in weights if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in weights if not p.requires_grad} == {getattr(torch, dtype)}
        assert trainer.run.pipe.text_encoder.dtype == getattr(torch, dtype)
        assert trainer.run.pipe.vae.dtype == torch.float32
        toys.run(trainer)
        assert trainer.roles["student"].gradient_norm(None).isfinite()
        lines[dtype] = [line["loss"] for line in toys.losses(tmp_path / dtype)]
    assert lines["bfloat16"] != lines["float32"]
    assert lines["bfloat16"] == pytest.approx(lines["float32"], rel=2e-2)


def test_methods_of_small_differences_refuse_half_precision(base, toys, tmp_path):
    with pytest.raises(ValueError, match="frozen_dtype='float16': objective='ddo' learns from small differences"):
        make(toys, tmp_path, base, objective=dict(name="ddo"), frozen_dtype="float16")


@pytest.mark.parametrize("fake", [dict(kind="full"), dict(kind="lora", rank=2)], ids=lambda fake: fake["kind"])
def test_what_a_method_makes_of_a_rounded_teacher_trains_in_float32(fake, base, toys, tmp_path):
    objective = dict(name="score_distillation", method="dmd", fake=fake, timesteps=[999])
    changes = dict(teacher=str(base), frozen_dtype="bfloat16", adapter=dict(kind="full"))
    trainer = make(toys, tmp_path, base, objective=objective, **changes)
    weights = list(trainer.objective.parameters())
    assert {p.dtype for p in weights if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in weights if not p.requires_grad}
    assert "fake" in trainer.roles
    toys.run(trainer)
