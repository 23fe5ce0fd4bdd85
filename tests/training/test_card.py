"""The card beside what was trained says how it is loaded, and that is true."""

import re

import pytest
import torch

from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.trainer import Trainer

DIT = dict(network="dit", hidden_size=16, num_layers=1, num_heads=2, patch_size=4)


@pytest.mark.parametrize(("num_classes", "asked"), [(10, "class_labels=[0, 1, 2, 3]"), (0, "batch_size=4")])
def test_the_code_of_a_card_runs(num_classes, asked, tmp_path):
    config = TrainConfig(
        output_dir=tmp_path / "mine",
        model=DIT | dict(num_classes=num_classes),
        data=dict(name="synthetic"),
        objective=dict(name="flow_matching"),
        global_batch_size=2,
        max_train_steps=1,
    ).check()
    trainer = Trainer(build(config), quiet=True)
    trainer.train()
    folder = export(trainer)
    card = (folder / "README.md").read_text()
    assert "# mine\n" in card and "A ClassConditionalPipeline, trained by flow_matching." in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert asked in code
    torch.manual_seed(0)
    made = {}
    exec(code, made)
    assert len(made["images"]) == 4 and type(made["pipe"]).__name__ == "ClassConditionalPipeline"


def test_the_card_of_a_network_that_is_no_denoiser(tmp_path):
    config = TrainConfig(
        output_dir=tmp_path / "mine",
        model=dict(network="gpt", hidden_size=16, num_layers=1, num_heads=2, sample_size=8),
        data=dict(name="digits"),
        objective=dict(name="autoregressive"),
        global_batch_size=2,
        max_train_steps=1,
    ).check()
    trainer = Trainer(build(config), quiet=True)
    trainer.train()
    card = (export(trainer) / "README.md").read_text()
    assert "An AutoregressivePipeline, trained by autoregressive." in card
    made = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], made)
    assert len(made["images"]) == 4
