"""Runs of the reward strategies: a batch may be cut, and a killed process goes on."""

import pytest
import yaml
from safetensors.torch import load_file

from genkit.registry import members
from genkit.training import logs
from genkit.training.objectives._reward import RewardObjective
from tests.training.processes import kill_at_a_checkpoint
from tests.training.ready import READY

STRATEGIES = members("genkit.training.objectives", RewardObjective)
CASES = [
    pytest.param(name, i, id=f"{name}-{i}", marks=[pytest.mark.slow] if i else [])
    for name in STRATEGIES
    for i in range(len(READY.get(name, [])))
]


@pytest.fixture(scope="module")
def base(toys, tmp_path_factory):
    return toys.teacher(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name, i", CASES)
def test_a_batch_of_four_is_four_of_one(name, i, base, toys, tmp_path):
    case, found, weights = READY[name][i], [], []
    for pieces in (1, 4):
        # The rate is small: Adam divides rounding by itself where a gradient is nothing else.
        changes = dict(
            global_batch_size=4,
            gradient_accumulation_steps=pieces,
            max_train_steps=3,
            checkpointing_steps=3,
            logging_steps=1,
            optimizer=dict(name="AdamW", lr=2e-4, eps=1e-3),
        )
        toys.run(toys.digits(**toys.case_settings(tmp_path / str(pieces), name, case, base, **changes)))
        found.append(logs.read(tmp_path / str(pieces) / logs.FILE))
        weights.append(load_file(tmp_path / str(pieces) / "checkpoint-3/student.safetensors"))
    for one, two in zip(*found, strict=True):
        # Diversity is that of the images which are judged together, and one alone has none.
        assert one.keys() - {"diversity"} == two.keys() - {"diversity"} >= {"loss", "reward"}
        for key in two.keys() - {"diversity", "grad_norm/student"}:
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6), (one["step"], key)
        # Of some hundreds, in float32, through all steps of the sampler.
        assert two["grad_norm/student"] == pytest.approx(one["grad_norm/student"], rel=1e-5)
    for key, weight in weights[0].items():
        assert (weights[1][key] - weight).abs().max() < 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leapalign", "draft_lv"])
def test_a_killed_process_goes_on_bit_for_bit(name, base, toys, tmp_path):
    # A rate that does not depend on where the run ends, so that the killed one cannot end by itself.
    changes = dict(checkpointing_steps=3, lr_scheduler="constant", lr_warmup_steps=0)
    settings = toys.case_settings(tmp_path / "killed", name, READY[name][0], base, **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings | dict(max_train_steps=10**6)))
    step = kill_at_a_checkpoint(recipe, tmp_path / "killed")
    settings["max_train_steps"] = step + 3
    toys.run(toys.digits(**settings | dict(resume="latest")))
    toys.run(toys.digits(**settings | dict(output_dir=str(tmp_path / "whole"))))
    files = sorted(p.name for p in (tmp_path / f"whole/checkpoint-{step + 3}").glob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = (tmp_path / run / f"checkpoint-{step + 3}" / file for run in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), file
