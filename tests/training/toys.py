"""Small runs that the trainer's tests share; as a script, the scenarios that need processes of their own."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from genkit.data.eight_gaussians import EightGaussians
from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.registry import members, unknown
from genkit.training.build import Run, build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.objectives.base import Batch, Loss, Objective, Phase, Role
from genkit.training.trainer import Trainer
from tests.training.ready import READY, Case


def settings(output_dir, **changes) -> dict:
    """A recipe on digits with a network of 9,000 weights."""
    model = dict(network="dit", hidden_size=16, num_layers=1, num_heads=2)
    values = dict(
        output_dir=str(output_dir),
        model=model,
        adapter=dict(kind="full"),
        objective=dict(name="flow_matching"),
        data=dict(name="digits"),
        optimizer=dict(name="AdamW", lr=2e-3),
        lr_scheduler="cosine",
        lr_warmup_steps=3,
        global_batch_size=8,
        max_train_steps=20,
        max_grad_norm=10.0,
        ema=dict(decays=[0.9, 0.3]),
        checkpointing_steps=10,
        logging_steps=4,
    )
    return values | changes


def digits(output_dir, **changes) -> Trainer:
    config = TrainConfig(**settings(output_dir, **changes)).check()
    return Trainer(build(config), quiet=True)


class Adversarial(Objective):
    """A generator with two losses, a discriminator updated twice; dropout, running statistics, a counter, and a network
    that no optimiser moves but the method does."""

    def __init__(self, student, diverge_at=None):
        super().__init__(None, student)
        self.discriminator = nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 1)
        )
        self.frozen = nn.Linear(2, 2)
        self.reference = nn.Linear(2, 2)
        self.diverge_at = diverge_at
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def roles(self):
        return {
            "student": Role(self.student_module, ema=True),
            "discriminator": Role(self.discriminator, optimizer={"lr": 5e-3, "betas": [0.0, 0.9]}),
            "frozen": Role(self.frozen, trains=False),
            "reference": Role(self.reference, trains=False, kept=True),
        }

    def updated(self, phase):
        if phase.name == "student":
            self.reference.bias.lerp_(self.student_module.network[-1].bias, 0.1)

    def phases(self, step):
        phases = [Phase("discriminator", trains=("discriminator",), repeats=2)]
        return phases + ([Phase("student", trains=("student",), backwards=2)] if step % 2 else [])

    def losses(self, phase, batch, rng):
        t = torch.ones(len(batch.x0))
        fake = self.student(rng.normal((2,)), t).raw
        if phase.name == "discriminator":
            self.updates += 1
            logits = self.discriminator(torch.cat((fake.detach(), batch.x0)))
            value = (
                nn.functional.softplus(logits[: len(fake)]).mean() + nn.functional.softplus(-logits[len(fake) :]).mean()
            )
            if self.diverge_at is not None and self.updates > self.diverge_at:
                value = value * float("nan")
            yield Loss(value, {})
        else:
            yield Loss(nn.functional.softplus(-self.discriminator(fake)).mean(), {})
            again = self.student(rng.normal((2,)), t).raw
            yield Loss((self.frozen(again) + self.reference(again) - again).square().mean(), {"moment": again.mean()})


def adversarial(output_dir, **changes) -> Trainer:
    objective_settings = {k: changes.pop(k) for k in ("diverge_at",) if k in changes}
    config = TrainConfig(**settings(output_dir, **changes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        student = FunctionDenoiser(lambda x, t: network(x), Linear(), "sample")
        student.network = _Callable(network)
        objective = Adversarial(student, **objective_settings)

    def inputs(read, device):
        return Batch(read["x0"].to(device), Condition(), read["index"].to(device))

    return Trainer(Run(config, None, student, objective, EightGaussians(), inputs), quiet=True)


class _Callable(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x)


def run(trainer: Trainer, stop: int | None = None) -> Trainer:
    """Train; with ``stop`` as if killed after that step."""
    for step in trainer.steps():
        if step == stop:
            break
    return trainer


def losses(folder) -> list[dict]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or k.startswith("loss")} for line in lines]


def teacher(folder) -> Path:
    """A pipeline on digits that has learned something: its folder."""
    trainer = run(digits(folder, max_train_steps=200, checkpointing_steps=200, global_batch_size=32))
    return export(trainer)


def case_settings(folder, name: str, case: Case, teacher: Path, **changes) -> dict:
    """Settings of a run by ``case`` of objective ``name``, from the weights of ``teacher``."""
    objective = members("genkit.training.objectives", Objective)[name]
    values = dict(model=dict(pretrained=str(teacher)), objective=dict(name=name, **case.objective))
    if case.teacher or objective.needs_teacher == "required":
        values["teacher"] = str(teacher)
    return settings(folder, **(values | case.run | changes))


# What runs on two processes: all methods, or those that a variable of the environment names.
METHODS = [name for name in os.environ.get("GENKIT_METHODS", "").split(",") if name] or list(READY)
for name in METHODS:
    if name not in READY:
        raise ValueError(unknown("GENKIT_METHODS", name, READY))
PARALLEL = {f"{name}-{i}": (name, case) for name in METHODS for i, case in enumerate(READY[name])}


# Runs anew, at a rate as in use: what leaves no residual too small to be held to relative errors.
STRICT = {
    "flow_matching": dict(objective=dict(name="flow_matching")),
    "lsd": dict(objective=dict(name="flow_map", loss="lsd", diagonal_fraction=0.5)),
    "psd_u": dict(objective=dict(name="flow_map", loss="psd_u"), gradient_accumulation_steps=2),
}


def parallel(folder: Path, pipeline: Path) -> None:
    """Under ``accelerate launch``: the same runs as on one process, and whether ranks agree on weights."""
    torch.set_num_threads(1)
    report = {}
    for key, (name, case) in PARALLEL.items():
        # Adam divides rounding by itself where a gradient is nothing else.
        changes = dict(max_train_steps=4, checkpointing_steps=4, optimizer=dict(name="AdamW", lr=2e-4, eps=1e-3))
        config = TrainConfig(**case_settings(folder / key, name, case, pipeline, **changes))
        trainer = run(Trainer(build(config.check()), quiet=True))
        own = torch.cat([p.detach().flatten() for p in trainer.objective.parameters()])
        everyone = trainer.accelerator.gather(own[None].contiguous())
        report[key] = (everyone - everyone[:1]).abs().max().item()
        processes, main = trainer.accelerator.num_processes, trainer.accelerator.is_main_process
    for key, changes in STRICT.items():
        run(digits(folder / key, max_train_steps=6, checkpointing_steps=6, **changes))
    trainer = adversarial(folder / "adversarial", max_train_steps=6, checkpointing_steps=6)
    for module in trainer.objective.modules():  # statistics of a batch, and dropout, are not the items' own
        if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
            module.eval()
    run(trainer)
    if main:
        (folder / "report.json").write_text(json.dumps({"processes": processes, "spread": report}))


if __name__ == "__main__":
    parallel(*map(Path, sys.argv[1:]))
    PartialState().destroy_process_group()
