"""MeanFlow, improved MeanFlow and SoFlow reach the specification's toy table; sCM is measured. `make test-slow`."""

import pytest
import torch

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap
from genkit.interpolants import Linear
from genkit.schedulers import RenoiseScheduler
from genkit.training.objectives.improved_mean_flow import ImprovedMeanFlow, ImprovedMeanFlowConfig
from genkit.training.objectives.mean_flow import MeanFlow, MeanFlowConfig
from genkit.training.objectives.scm import Scm, ScmConfig
from genkit.training.objectives.so_flow import SoFlow, SoFlowConfig
from tests.training.planar import MLP, Exact, distances, jumps, rmse, show, train

UNIFORM = dict(law="uniform")
HALF = dict(diagonal_fraction=0.5, weight_power=0.0, time=UNIFORM)

# SW2 at 1, 2, 4, 8 steps and the distance to the exact endpoints at 1; the accepted bound of SW2 is 1.5 times that.
TABLE = {
    "mean_flow": (MeanFlow, MeanFlowConfig(**HALF), (0.097, 0.080, 0.088, 0.095), 0.289),
    "improved_mean_flow": (ImprovedMeanFlow, ImprovedMeanFlowConfig(**HALF), (0.092, 0.087, 0.088, 0.083), 0.256),
    "so_flow": (
        SoFlow,
        SoFlowConfig(**HALF, diagonal_time=UNIFORM, end_time=UNIFORM, rho_start=0.02, rho_end=0.02),
        (0.113, 0.079, 0.085, 0.089),
        0.296,
    ),
}

# The same of sCM at one step, measured: the specification has no row for it.
SCM = {"data": 0.122, "teacher": 0.093}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_reaches_the_table(name, tmp_path, capsys):
    cls, config, published, endpoint = TABLE[name]
    torch.manual_seed(0)
    student = FunctionFlowMap(MLP(), Linear())
    trainer, seconds = train(tmp_path, cls(config, student))
    with trainer.averaged():
        got, noise = distances(jumps(student))
        error = rmse(jumps(student)(noise, 1), noise)
    show(capsys, f"{name}, SW2", got, seconds, RMSE=error)
    for value, bound in zip(got, published, strict=True):
        assert value <= 1.5 * bound
    assert error <= 1.5 * endpoint


@pytest.mark.slow
@pytest.mark.parametrize("source", ["data", "teacher"])
def test_scm_in_one_step(source, tmp_path, capsys):
    torch.manual_seed(0)
    student = FunctionDenoiser(MLP(two_times=False), Linear(), "flow_prediction")
    teacher = FunctionDenoiser(Exact(), Linear(), "flow_prediction") if source == "teacher" else None
    config = ScmConfig(time=dict(law="logit_normal", mean=0.0, std=1.6), sigma_data=1.446, tangent_warmup_steps=200)
    trainer, seconds = train(tmp_path, Scm(config, student, teacher))
    with trainer.averaged():
        draw = jumps(student, RenoiseScheduler)
        got, noise = distances(draw)
        error = rmse(draw(noise, 1), noise)
    show(capsys, f"scm from {source}, SW2", got, seconds, RMSE=error)
    assert got[0] < 1.5 * SCM[source]
