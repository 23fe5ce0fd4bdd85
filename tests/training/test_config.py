"""Settings: overrides, and errors that say what is wrong."""

import re
from pathlib import Path

import pytest
import yaml

from genkit.training.__main__ import main
from genkit.training.build import build
from genkit.training.config import TrainConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.fixture
def recipe(toys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toys.settings(tmp_path / "run")))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_recipe_is_valid(path):
    load_config(path)
    load_config(path, data="synthetic")


def test_there_are_recipes():
    assert len(RECIPES) >= 2


def test_overrides(recipe):
    overrides = ["optimizer.lr=1e-3", "optimizer.betas=[0.5,0.9]", "ema.decays=[0.99]", "max_grad_norm=null"]
    config = load_config(recipe, [*overrides, "objective.condition_dropout=0.5", "model.hidden_size=32"])
    assert config.optimizer.settings == {"lr": 1e-3, "betas": [0.5, 0.9]}
    assert config.ema.decays == [0.99] and config.max_grad_norm is None
    assert config.objective_config().condition_dropout == 0.5
    assert config.model.settings["hidden_size"] == 32 and config.model.settings["num_layers"] == 1


def test_no_is_a_precision_on_a_command_line_too(recipe):
    """YAML takes it for false; errors of full_precision advise it."""
    assert load_config(recipe, ["mixed_precision=bf16"]).mixed_precision == "bf16"
    recipe.write_text(recipe.read_text() + "mixed_precision: bf16\n")
    assert load_config(recipe, ["mixed_precision=no"]).mixed_precision == "no"
    recipe.write_text(recipe.read_text().replace("mixed_precision: bf16", "mixed_precision: no"))
    assert load_config(recipe).mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision=True: .*'no', 'fp16' or 'bf16'"):
        load_config(recipe, ["mixed_precision=true"])


def test_a_section_given_as_a_name_replaces_it(recipe):
    config = load_config(recipe, ["objective=flow_map", "objective.loss=esd", "data.name=eight_gaussians"])
    assert config.objective.name == "flow_map" and config.objective_config().loss == "esd"
    assert load_config(recipe, ["optimizer=SGD", "optimizer.lr=0.1"]).optimizer.settings == {"lr": 0.1}


@pytest.mark.parametrize(
    "override, text",
    [
        ("learning_rte=1", r"unknown key in the config: key='learning_rte' is not known"),
        ("max_train_step=1", "did you mean 'max_train_steps'"),
        ("ema.decay=[0.9]", "unknown key in ema: key='decay' is not known; did you mean 'decays'"),
        ("model.hidden_sizes=3", "unknown key in model: key='hidden_sizes' is not known; did you mean 'hidden_size'"),
        ("model.scheduler.name=EulerDiscreetScheduler", "did you mean 'EulerDiscreteScheduler'"),
        ("model.scheduler.shft=3", "unknown key in model.scheduler: key='shft' is not known; did you mean 'shift'"),
        ("model.network=dti", "model.network='dti' is not known; did you mean 'dit'"),
        ("model.pretrained=x", "exactly one of network and pretrained must be set"),
        ("objective.time_distributon=uniform", "did you mean 'time_distribution'"),
        ("objective.time_distribution=normal", "objective.time_distribution='normal': .*'uniform' or 'logit_normal'"),
        ("objective.name=flow_mtching", "objective.name='flow_mtching' is not known; did you mean 'flow_matching'"),
        ("data.name=digit", "data.name='digit' is not known; did you mean 'digits'"),
        ("data.sed=1", "unknown key in data: 'sed'; it takes no settings"),
        ("optimizer.name=Adamw2", "did you mean"),
        (
            "optimizer.weigt_decay=1",
            "unknown key in optimizer: key='weigt_decay' is not known; did you mean 'weight_decay'",
        ),
        ("lr_scheduler=cosin", "lr_scheduler='cosin' is not known; did you mean 'cosine'"),
        ("lr_scheduler=constant", "lr_warmup_steps=3 needs a schedule with warm-up"),
        ("global_batch_size=0", "global_batch_size=0: Input should be greater than or equal to 1"),
        ("gradient_accumulation_steps=3", "global_batch_size=8 is not a multiple of gradient_accumulation_steps=3"),
        ("mixed_precision=fp8", "mixed_precision='fp8': .*'no', 'fp16' or 'bf16'"),
        ("ema.decays=[1.0]", r"decays must be distinct numbers in \[0, 1\)"),
        ("adapter.kind=dora", "adapter.kind='dora'"),
        ("teacher=somewhere", "objective='flow_matching' takes no teacher"),
        ("max_train_steps", "override 'max_train_steps' is not of the form key=value"),
        ("seed=[1", "cannot be read"),
    ],
)
def test_errors_say_what_is_wrong(override, text, recipe):
    with pytest.raises(ValueError, match=text) as error:
        load_config(recipe, [override])
    assert "pydantic" not in str(error.value)


def test_missing_files_and_keys(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml' is not a file"):
        load_config("nowhere.yaml")
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ValueError, match="output_dir is missing and has no default\nmodel is missing"):
        load_config(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="empty.yaml' cannot be read"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="is not a mapping"):
        load_config(path)


def test_command(recipe, tmp_path, capsys):
    assert main([str(recipe), "max_train_steps=2", "--quiet"]) == 0
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    assert main([str(recipe), "max_train_steps=2", "--quiet"]) == 1
    assert "set resume=latest" in capsys.readouterr().err
    assert main([str(recipe), "max_train_step=2"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown key")


LEAPS = CONFIGS / "digits" / "leapalign.yaml"


@pytest.mark.parametrize(
    "override, section, expected",
    [
        ("objective.loss.kind=linear", "loss", {"kind": "linear"}),
        ("objective.loss={kind: target, value: 1}", "loss", {"kind": "target", "value": 1}),
        ("objective.loss.threshold=-0.1", "loss", {"kind": "hinge", "threshold": -0.1}),
        ("objective.loss.kind=hinge", "loss", {"kind": "hinge", "threshold": -0.05}),
        ("objective.rewards.0.name=thickness", "rewards", [{"name": "thickness"}]),
        ("objective.rewards[0].wanted=5", "rewards", [{"name": "digits", "wanted": 5}]),
        ("objective.rewards=thickness", "rewards", "thickness"),
    ],
)
def test_an_override_of_another_kind_leaves_nothing_of_the_former(override, section, expected):
    assert load_config(LEAPS, [override]).objective.settings[section] == expected


def test_another_source_by_its_name_takes_no_settings_of_the_former():
    config = load_config(LEAPS, ["data.name=digits"])
    assert config.data.name == "digits" and not config.data.settings


def test_optimisers_share_their_settings():
    config = load_config(LEAPS, ["optimizer.name=Adam"])
    assert config.optimizer.name == "Adam" and config.optimizer.settings["lr"] == 5e-5


def test_no_averages():
    assert load_config(LEAPS, ["ema=null"]).ema.decays == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective.rewards.3.name=digits", "override 'objective.rewards.3.name=digits': list index out of range"),
        ("objective.rewards=[{name: thickness, power: 2}]", "reward thickness: 'power'; it takes no settings"),
        ("objective.rewards=[{name: jpeg, power: 2}]", "reward jpeg: key='power' is not known. Accepted: quality"),
        ("objective.rewards=[{name: sharpness}]", "name='sharpness' is not known"),
    ],
)
def test_overrides_that_lead_nowhere(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(LEAPS, [override])


@pytest.mark.parametrize("recipe", [LEAPS, CONFIGS / "digits" / "flow_matching.yaml"])
def test_what_a_run_writes_can_be_run_again(recipe, tmp_path):
    config = load_config(recipe)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_reward_trains_a_lora_unless_told_otherwise():
    values = load_config(LEAPS).model_dump(mode="json")
    assert values.pop("adapter")["kind"] == "full"
    assert TrainConfig(**values).adapter.kind == "lora"
    assert TrainConfig(**(values | {"objective": {"name": "flow_matching"}})).adapter.kind == "full"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.perceptual.wheight=2", "unknown key in objective.perceptual: key='wheight' .* mean 'weight'"),
        ("objective.perceptual.weight=-2", "^objective.perceptual.weight=-2: Input should be greater than 0"),
        ("model.quantizer=vq", "model.quantizer='vq': expected settings, as model.quantizer.kind=NAME"),
        ("model.quantizer=null", "model.quantizer=None: expected settings"),
        ("objective.perceptual={weight: 1}", "objective.perceptual=.*: kind is missing; accepted are lpips, laplacian"),
        ("objective.perceptual.kind=laplace", "objective.perceptual.kind='laplace' is not known; .*'laplacian'"),
        (
            "objective.perceptual=lpips",
            "objective.perceptual='lpips': expected settings, as objective.perceptual.kind",
        ),
        (
            "objective.adversarial.discriminator={num_layers: 2}",
            "^objective.adversarial.discriminator={'num_layers': 2}: kind is missing; accepted are patch, dino$",
        ),
        (
            "objective.adversarial.discriminator.kind=vgg",
            "discriminator.kind='vgg' is not known. Acc.*dino, patch",
        ),
        ("objective.adversarial.discriminator=patch", "discriminator.kind=NAME; accepted are patch, dino"),
        (
            "objective.adversarial=patch",
            "objective.adversarial='patch': expected settings, a mapping; accepted are",
        ),
        ("ema=0.9", "^ema=0.9: expected settings, a mapping; accepted are decays"),
    ],
)
def test_sections_of_several_kinds(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / "digits/tokenizer_fvq.yaml", ["objective.perceptual.kind=laplacian", override])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["kind=vq"], {"codebook_size": 256, "dim": 16, "kind": "vq"}),
        (["codebook_size=64", "kind=simvq"], {"codebook_size": 64, "dim": 16, "kind": "simvq"}),
        (["kind=fsq", "levels=[8,6]", "dim=2"], {"dim": 2, "kind": "fsq", "levels": [8, 6]}),
        (["kind=fvq"], {"kind": "fvq", "codebook_size": 256, "dim": 16, "width": 64}),
        (["kind=vqq"], {"kind": "vqq"}),  # which is refused when the model is made
        (
            ["kind=residual", "depth=2", "quantizer={kind: vq, codebook_size: 8}", "quantizer.kind=ibq"],
            {"dim": 16, "kind": "residual", "depth": 2, "quantizer": {"codebook_size": 8, "kind": "ibq"}},
        ),
    ],
)
def test_another_quantizer_keeps_what_it_has_as_well(overrides, expected):
    config = load_config(CONFIGS / "digits/tokenizer_fvq.yaml", [f"model.quantizer.{text}" for text in overrides])
    assert config.model.settings["quantizer"] == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=vqq", "model: quantizer.kind='vqq' is not known; did you mean 'vq'"),
        ("kind=fsq", "model: quantizer 'fsq': levels is missing"),
        ("codebook_size=0", "model: quantizer 'fvq': codebook_size=0: Input should be greater than or equal to 1"),
    ],
)
def test_a_quantizer_that_cannot_be_made(override, message):
    with pytest.raises(ValueError, match=message):
        build(load_config(CONFIGS / "digits/tokenizer_fvq.yaml", [f"model.quantizer.{override}"]))


def test_a_quantizer_without_a_kind():
    """Its settings are told as they were given, without the seed that would be drawn for them."""
    config = load_config(CONFIGS / "digits/tokenizer_fvq.yaml", ["model.quantizer={dim: 8}"])
    with pytest.raises(
        ValueError, match="model: quantizer={'dim': 8}: kind is missing; accepted are fsq, fvq, grouped"
    ):
        build(config)


def test_a_model_setting_without_default(tmp_path):
    values = yaml.safe_load((CONFIGS / "digits/tokenizer_fvq.yaml").read_text())
    del values["model"]["quantizer"]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="model.quantizer is missing and has no default"):
        load_config(tmp_path / "a.yaml")
