"""What holds for every training method: a new file is tried once it has its cases in ``ready.py``."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap
from genkit.interpolants import Linear, VariancePreserving, expand
from genkit.registry import members
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian
from genkit.training import checkpoint, logs
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.objectives.base import Batch, Condition, Objective
from genkit.training.trainer import Trainer
from tests.training.planar import MLP
from tests.training.ready import READY, Case

OBJECTIVES = members("genkit.training.objectives", Objective)
CASES = [(name, i) for name, cases in READY.items() for i in range(len(cases))]
every = pytest.mark.parametrize("name, i", CASES, ids=[f"{n}-{i}" for n, i in CASES])


def test_every_objective_has_a_case():
    assert set(READY) == set(OBJECTIVES), "tests/training/ready.py, READY: a case or more for each"


@pytest.fixture(scope="module")
def teacher(toys, tmp_path_factory):
    """A pipeline on digits that has learned something."""
    return toys.teacher(tmp_path_factory.mktemp("teacher"))


def test_the_teacher_has_learned(teacher):
    first, last = (logs.read(teacher.parent / logs.FILE)[i]["loss"] for i in (0, -1))
    assert last < 0.8 * first


def make(toys, teacher, name, case: Case, folder, **changes) -> Trainer:
    settings = toys.case_settings(folder, name, case, teacher, **changes)
    return Trainer(build(TrainConfig(**settings).check()), quiet=True)


@every
def test_what_it_minimises_falls(name, i, toys, teacher, tmp_path):
    case = READY[name][i]
    changes = dict(max_train_steps=60, checkpointing_steps=60, global_batch_size=32, logging_steps=1) | case.learns
    toys.run(make(toys, teacher, name, case, tmp_path, **changes))
    key, ratio = case.falls
    values = [line[key] for line in logs.read(tmp_path / logs.FILE)]
    first, last = sum(values[:10]) / 10, sum(values[-10:]) / 10
    assert math.isfinite(last) and last < ratio * first, f"{key}: {first:.4g} -> {last:.4g} ({last / first:.3f})"


@every
def test_a_killed_run_goes_on_bit_for_bit(name, i, toys, teacher, tmp_path):
    case = READY[name][i]
    changes = dict(max_train_steps=6, checkpointing_steps=3, logging_steps=1)
    toys.run(make(toys, teacher, name, case, tmp_path / "whole", **changes))
    toys.run(make(toys, teacher, name, case, tmp_path / "part", **changes), stop=3)
    torch.manual_seed(99)
    toys.run(make(toys, teacher, name, case, tmp_path / "part", resume="latest", **changes))
    folders = [checkpoint.found(tmp_path / run)[6] for run in ("whole", "part")]
    files = sorted(p.name for p in folders[0].glob("*.safetensors"))
    assert files and files == sorted(p.name for p in folders[1].glob("*.safetensors"))
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    lines = [(tmp_path / run / logs.FILE).read_text() for run in ("whole", "part")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 6


class Exact(nn.Module):
    """The exact prediction of a Gaussian whose mean its condition moves; a weight that leaves it as it is, for methods
    that train a copy."""

    def __init__(self, law, prediction_type):
        super().__init__()
        self.law, self.path, self.prediction_type = law.denoiser("sample"), law.interpolant, prediction_type
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, prompt_embeds):
        move = prompt_embeds.sum(1)
        clean = self.law(x - expand(self.path.alpha(t), x) * move, t).sample + move
        return self.path.convert(clean, "sample", self.prediction_type, x, t) * self.scale


class Student(nn.Module):
    """The toy's network, which sees its condition as a displacement."""

    def __init__(self, two_times):
        super().__init__()
        self.net = MLP(two_times).double()
        nn.init.normal_(self.net.body[-1].weight, std=0.3)

    def forward(self, x, t, s=None, *, prompt_embeds, **scalars):
        return self.net(x + prompt_embeds.sum(1), t, s)


def values(name, case: Case, path, prediction_type) -> Iterator[float]:
    """Every loss of one step, in float64, under an exact teacher of ``prediction_type``."""
    cls = OBJECTIVES[name]
    law = Gaussian(torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5, interpolant=path)
    torch.manual_seed(0)
    net = Student(cls.needs_flow_map)
    student = FunctionFlowMap(net, path) if cls.needs_flow_map else FunctionDenoiser(net, path, "flow_prediction")
    teacher = FunctionDenoiser(Exact(law, prediction_type), path, prediction_type)
    torch.manual_seed(1)
    objective = cls(cls.Config(**case.objective), student, teacher).double()
    items = torch.arange(16)
    embeds = ItemRNG(5, items).normal((3, 2), dtype=torch.float64) / 3
    condition = Condition({"prompt_embeds": embeds}, {"prompt_embeds": torch.zeros_like(embeds)})
    x0 = law.sample(16, generator=torch.Generator().manual_seed(3)).double()
    for phase in objective.phases(0):
        batch = Batch(x0, condition, items, {"x0": x0, "fake": x0.flip(0) / 2, "lose": x0.flip(0) / 2}, 3, 10)
        for loss in objective.losses(phase, batch, ItemRNG(7, items)):
            yield loss.value.item()


INDEPENDENT = [(n, i, p) for n, i in CASES for p in READY[n][i].paths if OBJECTIVES[n].needs_teacher != "never"]
INDEPENDENT = [(n, i, p) for n, i, p in INDEPENDENT if READY[n][i].teacher or OBJECTIVES[n].needs_teacher == "required"]


@pytest.mark.parametrize("name, i, path", INDEPENDENT, ids=[f"{n}-{i}-{p}" for n, i, p in INDEPENDENT])
def test_the_loss_does_not_depend_on_what_the_teacher_predicts(name, i, path):
    """Exact eps, x0, v and flow teachers teach the same, to 1e-10."""
    interpolant = {"linear": Linear, "vp": VariancePreserving}[path]()
    kinds = ("flow_prediction", "sample", "epsilon") + (("v_prediction",) if path == "vp" else ())
    got = {kind: list(values(name, READY[name][i], interpolant, kind)) for kind in kinds}
    reference = got.pop("flow_prediction")
    assert reference and all(map(math.isfinite, reference))
    for kind, others in got.items():
        assert others == pytest.approx(reference, rel=1e-10, abs=1e-10), kind


@every
def test_what_was_trained_can_be_loaded(name, i, toys, teacher, tmp_path):
    """The folder that a run exports is there and whole."""
    from genkit.training.export import export

    trainer = toys.run(make(toys, teacher, name, READY[name][i], tmp_path, max_train_steps=2, checkpointing_steps=2))
    folder = export(trainer)
    assert folder.is_dir() and any(folder.rglob("*.safetensors"))
    assert all(json.loads(p.read_text()) for p in folder.rglob("*.json"))
