"""What cannot be loaded is said in one line that names the setting."""

from pathlib import Path

import pytest

from genkit import rewards
from genkit.pipelines.commands import load_pipeline as load_for_sampling
from genkit.testing import tiny
from genkit.training import __main__ as command
from genkit.training.build import build, load_pipeline
from genkit.training.config import TrainConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_folder_that_is_not_there_and_looks_like_a_name(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"model.pretrained='outputs/nowhere': .*; accepted are .*owner/name") as found:
        load_pipeline("outputs/nowhere", "model.pretrained")
    assert "\n" not in str(found.value)
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{pretrained: outputs/nowhere}}\ndata: {{name: digits}}\n"
        "objective: {name: flow_matching}\nmax_train_steps: 1\nglobal_batch_size: 2\n"
    )
    assert command.main([str(tmp_path / "run.yaml")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "error: model.pretrained='outputs/nowhere': there is no such folder, and the Hub gave none"
    )


def test_a_folder_that_is_not_whole(tmp_path):
    tiny.pipeline("dit").save_pretrained(tmp_path)
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="teacher=.*: it could not be read: .*; accepted are") as found:
        load_pipeline(str(tmp_path), "teacher")
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="pipeline=.* could not be read: .*; accepted are"):
        load_for_sampling(tmp_path)


@pytest.mark.parametrize("name", ["pick_score", "hpsv2", "aesthetic"])
def test_a_reward_whose_weights_are_not_to_be_had(name):
    with pytest.raises(ValueError, match=rf"reward='{name}' with model='.*/.*' could not be loaded: .*; acc") as found:
        rewards.make(name)
    assert "\n" not in str(found.value)


def test_errors_of_a_model_begin_with_the_cause():
    recipe = CONFIGS / "digits" / "tokenizer_fvq.yaml"
    with pytest.raises(ValueError, match=r"^model: quantizer 'fsq': levels is missing \(ImageTokenizer of {"):
        build(load_config(recipe, ["model.quantizer.kind=fsq"]))
    with pytest.raises(ValueError, match="model.in_channels=1, model.out_channels=3: must agree"):
        build(load_config(recipe, ["model.out_channels=3"]))
    with pytest.raises(ValueError, match="no such folder: what a run has trained is in OUTPUT_DIR/pipeline"):
        build(load_config(CONFIGS / "digits" / "autoregressive_tokens.yaml", ["model.components.vqvae=none/pipeline"]))


@pytest.mark.parametrize(
    "objective",
    [
        dict(name="readout", kind="spatial", modules=["blocks.0.fc2"], projection_dim=48, norm_num_groups=4),
        dict(name="zoodip", token="3", quantization="none"),
        dict(name="zoodip", token="3", quantization="int8"),
    ],
    ids=["readout", "zoodip", "zoodip_int8"],
)
def test_an_adapter_that_nothing_would_train_is_refused(objective, toys, tmp_path):
    def made(**changes):
        settings = toys.settings(tmp_path, objective=objective, **changes)
        return build(TrainConfig(**{k: v for k, v in settings.items() if v is not None}).check())

    for adapter in (dict(kind="lora", rank=2), dict(kind="sara", threshold=0.05)):
        what = f"^adapter.kind={adapter['kind']}: objective='{objective['name']}' does not train the network; leave it"
        with pytest.raises(ValueError, match=what):
            made(adapter=adapter)
    with pytest.raises(ValueError, match="^gradient_checkpointing=True: objective=.* does not train the network"):
        made(gradient_checkpointing=True)
    assert made(adapter=None).objective.roles and made().objective.roles
