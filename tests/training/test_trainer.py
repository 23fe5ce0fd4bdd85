"""The loop: resume, accumulation, phases, signals, divergence."""

import logging
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState

from genkit.training import checkpoint, logs
from genkit.training.compare import first_difference
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.interrupt import Stopped
from genkit.training.objectives.base import DivergedError, Phase
from genkit.training.roles import state


def weights(trainer) -> torch.Tensor:
    tensors = [t for role in trainer.roles.values() for f in role.tensors().values() for t in f.values()]
    tensors += [t for role in trainer.objective.roles.values() if role.kept for t in state(role.module).values()]
    return torch.cat([t.flatten().double() for t in tensors])


def optimizer_state(trainer) -> torch.Tensor:
    states = [s for role in trainer.roles.values() for s in role.optimizer.state_dict()["state"].values()]
    return torch.cat([v.flatten().double() for s in states for v in s.values()])


@pytest.mark.parametrize("kind", ["digits", "adversarial"])
def test_resumed_run_is_the_same_bit_for_bit(kind, toys, tmp_path):
    make = getattr(toys, kind)
    whole = toys.run(make(tmp_path / "whole"))
    toys.run(make(tmp_path / "parts"), stop=13)
    assert list(checkpoint.found(tmp_path / "parts")) == [10]
    # The global state of the process that goes on is another one.
    torch.manual_seed(99)
    resumed = make(tmp_path / "parts", resume="latest")
    assert resumed.step == 10
    toys.run(resumed)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(optimizer_state(whole), optimizer_state(resumed))
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("whole", "parts"))
    assert a == b and [line["step"] for line in a] == list(range(1, 21))
    assert [r.ema.updates for r in resumed.roles.values() if r.ema] == [20 if kind == "digits" else 10]
    if kind == "adversarial":
        assert whole.objective.updates.item() == resumed.objective.updates.item() == 40


def test_sampling_and_logging_change_nothing(toys, tmp_path):
    quiet = toys.run(toys.digits(tmp_path / "quiet", max_train_steps=6))
    sampling = dict(every=2, num_samples=4, num_inference_steps=2)
    noisy = toys.run(toys.digits(tmp_path / "noisy", max_train_steps=6, sampling=sampling, logging_steps=1))
    assert torch.equal(weights(quiet), weights(noisy))
    pictures = sorted(p.name for p in (tmp_path / "noisy/samples").glob("*.png"))
    assert pictures == ["step-2.png", "step-4.png", "step-6.png"]
    first, last = (logs.read(tmp_path / "noisy/samples/metrics.jsonl")[i] for i in (0, -1))
    assert first["step"] == 2 and last["step"] == 6 and last["samples/variance_ratio"] > 0


def test_samples_can_be_evaluated(toys, tmp_path):
    sampling = dict(every=2, num_samples=70, num_inference_steps=1, evaluate="digits")
    toys.run(toys.digits(tmp_path, max_train_steps=2, sampling=sampling))
    line = logs.read(tmp_path / "samples/metrics.jsonl")[0]
    names = [k for k in line if k.startswith("eval/")]
    assert names and all(line[k] == line[k] for k in names)


@pytest.mark.parametrize("objective", [dict(name="flow_matching"), dict(name="flow_map", loss="psd_m")])
def test_accumulation_equals_one_batch(objective, toys, tmp_path):
    one = toys.run(toys.digits(tmp_path / "one", max_train_steps=8, objective=objective))
    four = toys.run(
        toys.digits(tmp_path / "four", max_train_steps=8, objective=objective, gradient_accumulation_steps=4)
    )
    torch.testing.assert_close(weights(one), weights(four), rtol=1e-4, atol=1e-5)
    a, b = toys.losses(tmp_path / "one"), toys.losses(tmp_path / "four")
    assert first_difference(a, b, 1e-5) is None and first_difference(a, b[:-1]) is not None


@pytest.mark.parametrize(
    "objective",
    [
        dict(name="flow_matching"),
        dict(name="flow_matching", time_distribution="logit_normal"),
        *(dict(name="flow_map", loss=loss) for loss in ("lsd", "esd", "psd_m", "psd_u")),
        dict(name="flow_map", loss="lsd", jvp="finite_difference"),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_objectives_learn(objective, toys, tmp_path):
    toys.run(
        toys.digits(
            tmp_path,
            objective=objective,
            global_batch_size=64,
            max_train_steps=80,
            checkpointing_steps=80,
            optimizer=dict(name="AdamW", lr=1e-2),
        )
    )
    losses = [line["loss"] for line in toys.losses(tmp_path)]
    # Predicting the mean leaves E|eps - x0|^2 = 64 (1 + 0.56) = 100, of which 3/4 is drawn for flow maps and more.
    assert sum(losses[:5]) / 5 > 70
    assert sum(losses[-10:]) / 10 < 58


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_of_the_variance_preserving_path(prediction_type, toys, tmp_path):
    scheduler = dict(name="DDIMScheduler", prediction_type=prediction_type, clip_sample=False)
    model = dict(network="dit", hidden_size=16, num_layers=1, num_heads=2, scheduler=scheduler)
    trainer = toys.digits(
        tmp_path, model=model, global_batch_size=64, max_train_steps=60, optimizer=dict(name="AdamW", lr=1e-2)
    )
    toys.run(trainer)
    losses = [line["loss"] for line in toys.losses(tmp_path)]
    assert trainer.run.student.prediction_type == prediction_type
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_only_the_phase_s_roles_move(toys, tmp_path):
    trainer = toys.adversarial(tmp_path, max_train_steps=1, lr_scheduler="constant", lr_warmup_steps=0)
    before = {n: [p.clone() for p in r.parameters.values()] for n, r in trainer.roles.items()}
    frozen = [p.clone() for p in trainer.objective.frozen.parameters()]
    toys.run(trainer)  # step 0 has no student phase
    moved = {
        n: any(not torch.equal(p, q) for p, q in zip(before[n], r.parameters.values(), strict=True))
        for n, r in trainer.roles.items()
    }
    assert moved == {"student": False, "discriminator": True}
    assert all(torch.equal(p, q) for p, q in zip(frozen, trainer.objective.frozen.parameters(), strict=True))
    assert trainer.roles["discriminator"].optimizer.param_groups[0]["betas"] == (0.0, 0.9)
    files = {p.name for p in (tmp_path / "checkpoint-1").iterdir()}
    weights = {"student.safetensors", "student.ema.safetensors", "discriminator.safetensors", "objective.safetensors"}
    weights.add("reference.safetensors")
    assert files == weights | {checkpoint.OPTIMIZERS, checkpoint.MANIFEST}


@pytest.mark.parametrize("backwards, word", [(1, "more than 1"), (3, "yields 2")])
def test_wrong_number_of_losses_is_refused(backwards, word, toys, tmp_path, monkeypatch):
    phases = (Phase("student", trains=("student",), backwards=backwards),)
    monkeypatch.setattr(toys.Adversarial, "phases", lambda self, step: phases)
    with pytest.raises(ValueError, match=word):
        toys.adversarial(tmp_path).train()


def test_weights_without_role_are_refused(toys, tmp_path, monkeypatch):
    roles = toys.Adversarial.roles.fget
    monkeypatch.setattr(toys.Adversarial, "roles", property(lambda self: {"student": roles(self)["student"]}))
    with pytest.raises(ValueError, match=r"'discriminator\.0\.weight' must belong to one role"):
        toys.adversarial(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(number, toys, tmp_path, monkeypatch):
    trainer = toys.digits(tmp_path)
    step = trainer._train_step

    def interrupted(stream):
        if trainer.step == 7:
            os.kill(os.getpid(), number)
        return step(stream)

    monkeypatch.setattr(trainer, "_train_step", interrupted)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match="step 8, which is saved") as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    assert list(checkpoint.found(tmp_path)) == [8]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = toys.run(toys.digits(tmp_path, resume="latest"))
    whole = toys.run(toys.digits(tmp_path / "whole"))
    assert torch.equal(weights(whole), weights(resumed))


def test_nan_stops_before_the_update(toys, tmp_path):
    # Two updates a step: the 23rd is the first of step 12.
    trainer = toys.adversarial(tmp_path, diverge_at=22)
    with pytest.raises(DivergedError, match="step 12: the loss of phase 'discriminator' is nan.*is checkpoint-10"):
        trainer.train()
    assert weights(trainer).isfinite().all()
    assert list(checkpoint.found(tmp_path)) == [10]
    assert logs.read(tmp_path / logs.FILE)[-1]["step"] == 11


def test_infinite_gradient_is_not_saved(toys, tmp_path, monkeypatch):
    trainer = toys.digits(tmp_path, logging_steps=100)
    role, update = trainer.roles["student"], trainer.roles["student"].update
    monkeypatch.setattr(role, "update", lambda *a: update(*a) * (float("inf") if trainer.step == 9 else 1))
    with pytest.raises(DivergedError, match="step 10: the gradient of role 'student' has norm inf; there is no"):
        trainer.train()
    assert not checkpoint.found(tmp_path)


def test_gradient_spike_is_reported(toys, tmp_path, caplog):
    trainer = toys.digits(tmp_path)
    norms = [
        *[0.0] * 30,
        *[1.0, 0.0] * 30,
        50.0,
    ]  # a loss that has nothing to teach at most steps is no sign of trouble
    trainer.metrics.flush = lambda: [{"step": i, "grad_norm/student": norm} for i, norm in enumerate(norms)]
    with caplog.at_level(logging.WARNING, "genkit.training"):
        trainer._flush()
    assert caplog.messages == ["step 90: gradient norm of student is 50, 50 times its running median 1"]


def test_saturated_and_collapsed_samples_are_reported(toys, tmp_path):
    health = toys.digits(tmp_path).health
    data = torch.randn(64, 1, 8, 8)
    assert health.samples(1, torch.randn(64, 1, 8, 8), data)[1] == []
    measures, alarms = health.samples(2, 9 * torch.randn(64, 1, 8, 8), data)
    assert len(alarms) == 1 and "saturate" in alarms[0] and measures["samples/saturation"] > 0.5
    measures, alarms = health.samples(3, data[:1].expand(64, -1, -1, -1) + 0.01 * data, data)
    assert len(alarms) == 1 and "collapse" in alarms[0] and measures["samples/variance_ratio"] < 1e-3
    with pytest.raises(DivergedError, match="step 4: samples hold NaN"):
        health.samples(4, data * float("nan"), data)
    assert health.samples(5, 9 * data, None) == ({}, [])  # no data to compare with


def test_samples_that_stay_bad_stop_the_run(toys, tmp_path):
    """The last good checkpoint is kept, and one good sampling starts the count anew."""
    sampling = dict(every=2, num_samples=64, num_inference_steps=1)
    trainer = toys.digits(tmp_path, sampling=sampling, health=dict(patience=2), checkpointing_steps=3)
    trainer.sampler.draw = lambda shape, device: 9 * torch.randn(64, *shape)
    with pytest.raises(
        DivergedError, match=r"step 4: samples saturate.*health.patience=2 samplings in a row; the last"
    ):
        trainer.train()
    assert list(checkpoint.found(tmp_path)) == [3]
    watch = toys.digits(tmp_path / "other", health=dict(patience=2)).health
    data = torch.randn(64, 1, 8, 8)
    for step, samples in enumerate((9 * data, data, 9 * data)):
        watch.samples(step, samples, data)
    with pytest.raises(DivergedError, match="step 4: samples saturate"):
        watch.samples(4, 9 * data, data)


def test_mixed_precision_keeps_the_gradient(toys, tmp_path):
    """A weight that is first cast under no_grad, as for a target, must still get its gradient afterwards."""
    norms = [first_gradient_norm(toys, tmp_path / precision, precision) for precision in ("no", "bf16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and norms[0] > 1


def first_gradient_norm(toys, folder, mixed_precision) -> float:
    AcceleratorState._reset_state()
    trainer = toys.digits(
        folder,
        mixed_precision=mixed_precision,
        max_train_steps=1,
        objective=dict(name="flow_map", loss="psd_m", diagonal_fraction=0.01, stopgrad="convex"),
        logging_steps=1,
    )
    trainer.train()
    return logs.read(folder / logs.FILE)[0]["grad_norm/student"]


@pytest.mark.parametrize("name", ["RAdam", "lion"])
def test_optimizers_of_both_libraries(name, toys, tmp_path):
    if name == "lion":
        pytest.importorskip("pytorch_optimizer")
    optimizer = dict(name=name, lr=1e-4, betas=[0.8, 0.95])
    whole = toys.run(toys.digits(tmp_path / "whole", max_train_steps=12, optimizer=optimizer))
    assert type(whole.roles["student"].optimizer).__name__.lower() == name.lower()
    assert whole.roles["student"].optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    toys.run(toys.digits(tmp_path / "parts", max_train_steps=12, optimizer=optimizer), stop=11)
    parts = toys.run(toys.digits(tmp_path / "parts", max_train_steps=12, optimizer=optimizer, resume="latest"))
    assert torch.equal(weights(whole), weights(parts))


def test_student_is_exported_with_its_averages(toys, tmp_path):
    from genkit.training.build import load_pipeline

    trainer = toys.run(toys.digits(tmp_path))
    folder = export(trainer)
    pipe = load_pipeline(str(folder), "pipeline")
    average = trainer.roles["student"].ema.averages[0.9]
    for (name, loaded), mean in zip(pipe.transformer.named_parameters(), average, strict=True):
        assert torch.equal(loaded, mean), name
    current = torch.cat([p.detach().flatten() for p in trainer.run.student.module.parameters()])
    assert not torch.equal(current, torch.cat([a.flatten() for a in average]))
    assert pipe([3, 4], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_flow_map_starts_from_a_pipeline_and_a_teacher(toys, tmp_path):
    folder = export(toys.run(toys.digits(tmp_path / "teacher", max_train_steps=2)))
    trainer = toys.digits(
        tmp_path / "student",
        model=dict(pretrained=str(folder)),
        teacher=str(folder),
        objective=dict(name="flow_map"),
        max_train_steps=2,
    )
    teacher = dict(trainer.objective.teacher_module.named_parameters())
    for name, parameter in trainer.run.student.module.named_parameters():
        assert torch.equal(parameter, teacher[name]) and parameter is not teacher[name]
    before = [p.clone() for p in teacher.values()]
    toys.run(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.values(), strict=True))
    index = (export(trainer) / "scheduler/scheduler_config.json").read_text()
    assert "FlowMapScheduler" in index


def test_synthetic_data_fits_the_model(toys, tmp_path):
    model = dict(network="dit", sample_size=4, in_channels=3, hidden_size=16, num_layers=1, num_heads=2, num_classes=5)
    trainer = toys.digits(tmp_path, model=model, data=dict(name="synthetic"), max_train_steps=2)
    toys.run(trainer)
    assert trainer.x0.shape == (8, 3, 4, 4) and trainer.run.source.num_classes == 5


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(data=dict(name="checkerboard")), r"samples of shape \(2,\), the model takes \(1, 8, 8\)"),
        (dict(model=dict(network="dit", num_classes=3)), "10 classes, the model takes class labels 0 to 2"),
        (dict(model=dict(network="dit", patch_size=3)), "sample_size=8 is not a multiple of patch_size=3"),
        (dict(model=dict(pretrained="nowhere")), "model.pretrained='nowhere' is neither a pipeline folder nor a name"),
        (dict(report_to=["tensorbord"]), "report_to='tensorbord' is not known; did you mean 'tensorboard'"),
        (dict(optimizer=dict(name="AdamW", lr=-1.0)), "Invalid learning rate: -1.0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, text, toys, tmp_path):
    with pytest.raises(ValueError, match=text):
        toys.digits(tmp_path, **changes)


def test_averages_follow_their_formula(toys, tmp_path):
    trainer = toys.digits(tmp_path, max_train_steps=6)
    role = trainer.roles["student"]
    name = "out.bias"
    expected = {d: role.parameters[name].detach().double() for d in (0.9, 0.3)}
    for n in trainer.steps():
        for d in expected:
            keep = min(d, (1 + n) / (10 + n))
            expected[d] = keep * expected[d] + (1 - keep) * role.parameters[name].detach().double()
    for d, value in expected.items():
        average = role.ema.averages[d][role.ema.names.index(name)]
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-7)
    assert (expected[0.9] - expected[0.3]).abs().max() > 1e-5


def test_trackers_get_settings_and_values(toys, tmp_path):
    pytest.importorskip("tensorboard")
    toys.run(toys.digits(tmp_path, max_train_steps=4, report_to="tensorboard"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_toy_settings_are_valid(toys, tmp_path):
    assert TrainConfig(**toys.settings(tmp_path)).check().ema.decays == [0.9, 0.3]
