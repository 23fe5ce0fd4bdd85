"""Whether a reward is learned or exploited: warnings, early ends that are remembered, distances from the start."""

import logging

import pytest
import torch
from torch import nn

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.interpolants import Linear
from genkit.testing import tiny
from genkit.training.adapters import add_lora, base_network
from genkit.training.export import export
from genkit.training.objectives.base import DivergedError
from genkit.training.objectives.draft import DRaFT
from genkit.training.parts.trends import Trends, distance_from_start
from genkit.training.sections import Adapter
from tests.training.reward_toys import batch, losses, named, objective

RISING, FALLING = torch.linspace(0, 1, 20), torch.linspace(1, 0, 20)


def course(trained, *held_out, window=20, noise=0.01):
    """The warnings of a run whose rewards go like this."""
    trends = Trends([f"held{i}" for i in range(len(held_out))], window)
    generator = torch.Generator().manual_seed(0)
    warnings = []
    for values in zip(trained, *held_out, strict=True):
        trends.note(torch.stack(values) + noise * torch.randn(6, 1 + len(held_out), generator=generator))
        warnings.append(trends.update())
    return [w for w in warnings if w]


def test_a_held_out_reward_that_falls_while_the_trained_one_rises():
    (warning,) = course(RISING, FALLING, RISING)
    assert "trained reward rises (0." in warning and "held0 0." in warning and "held1" not in warning
    assert "exploited" in warning


@pytest.mark.parametrize("trained, held_out", [(RISING, RISING), (FALLING, FALLING), (FALLING, RISING)])
def test_other_courses_are_not_warned_of(trained, held_out):
    assert not course(trained, held_out)


def test_noise_alone_is_not_warned_of():
    still = torch.zeros(400)
    assert not course(still, still, noise=1.0)
    assert not course(RISING)


def test_a_warning_comes_once_in_half_a_window():
    long = torch.linspace(0, 3, 60)
    assert len(course(long, -long)) == 5  # after 20, 30, ... 60 steps


def test_the_objective_warns(caplog):
    made = objective(DRaFT, reward=named("total"), held_out=[named("parabola", centre=-3.0)], trend_window=8)
    optimizer = torch.optim.SGD(made.student.module.parameters(), lr=0.05)
    with caplog.at_level(logging.WARNING, "genkit.training"):
        for step in range(12):
            losses(made, batch(step=0))
            optimizer.step()
            optimizer.zero_grad()
            made.updated(made.phases(step)[0])
    assert "parabola" in caplog.text and "being exploited" in caplog.text


def test_what_is_not_a_number_is_left_out():
    trends = Trends(["held"], 4)
    trends.note(torch.tensor([[1.0, torch.nan], [3.0, torch.nan], [torch.nan, torch.nan]]))
    trends.update()
    assert trends.recent(1) == 2.0
    trends.note(torch.full((2, 2), torch.nan))
    with pytest.raises(DivergedError):
        trends.update()


def test_the_recent_mean_waits_for_as_many_steps():
    trends = Trends([], 4)
    for step in range(7):
        assert (trends.recent(3) is None) == (step < 3)
        trends.note(torch.full((2, 1), float(step)))
        trends.update()
    assert trends.recent(3) == 5.0


def test_micro_batches_are_one_step():
    trends = Trends([], 4)
    trends.note(torch.ones(1, 1))
    trends.note(torch.full((3, 1), 5.0))
    trends.update()
    assert trends.recent(1) == 4.0 and trends.steps == 1


def test_a_copy_knows_what_was_seen():
    made, other = Trends(["held"], 4), Trends(["held"], 4)
    made.note(torch.tensor([[1.0, 2.0]]))
    made.update()
    other.load_state_dict(made.state_dict())
    assert other.recent(1) == made.recent(1) == 1.0


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_the_distance_of_a_lora_is_that_of_its_change(name):
    student = from_pipeline(tiny.pipeline(name))
    base = {key: w.clone() for key, w in base_network(student).named_parameters()}
    add_lora(student, Adapter(rank=3, alpha=5))
    distance = distance_from_start(student)
    assert distance() == 0
    network = base_network(student)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, w in network.named_parameters():
            if ".lora_" in key:
                w.normal_(std=0.1)
    wanted = 0.0
    for module in network.modules():
        if hasattr(module, "get_delta_weight"):
            wanted = wanted + module.get_delta_weight("default").double().square().sum()
    assert len(base) and wanted > 0
    torch.testing.assert_close(distance(), wanted.sqrt(), rtol=1e-6, atol=0)


def test_the_distance_of_other_weights_is_from_a_copy():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    distance = distance_from_start(FunctionDenoiser(net, Linear(), "flow_prediction"))
    with torch.no_grad():
        net.weight.add_(2.0)
        net.bias.add_(100.0)
    assert distance().item() == pytest.approx((6 * 4) ** 0.5, rel=1e-6)


# -- a run that ends early ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(toys, tmp_path_factory):
    return export(toys.run(toys.digits(tmp_path_factory.mktemp("teacher"), max_train_steps=1, checkpointing_steps=1)))


def test_a_run_that_is_good_enough_ends_and_stays_ended(toys, teacher, tmp_path):
    def trainer(folder, **changes):
        reward = dict(name="function", path="tests.training.parts.test_trends:bright", differentiable=True)
        settings = dict(
            objective=dict(name="draft", num_inference_steps=2, rewards=[reward], stop_at_reward=0.0),
            model=dict(pretrained=str(teacher)),
            max_train_steps=30,
            checkpointing_steps=30,
        )
        return toys.digits(folder, **(settings | changes))

    first = toys.run(trainer(tmp_path / "run"))
    assert first.step == 10 and "mean reward of the last ten steps" in first.objective.done
    again = toys.run(trainer(tmp_path / "run", resume="latest"))
    assert again.step == 10 and again.objective.done == first.objective.done
    assert [p.name for p in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-10"]


def bright(images):
    return images.flatten(1).mean(1)
