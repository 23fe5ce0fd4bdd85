"""LoRAs in genkit's pipelines: what they add, that they add up, and that nothing of them stays."""

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from genkit._flow_map_files import CONFIG_NAME
from genkit.adapters import mix_adapters
from genkit.cli import app
from genkit.denoisers import from_pipeline
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline, TextToImagePipeline
from genkit.testing import tiny
from genkit.training.adapters import add_lora, base_network, save_lora
from genkit.training.sections import Adapter


def make(kind):
    if kind == "dit":
        pipe = ClassConditionalPipeline.from_pipe(tiny.pipeline("dit"))
    elif kind == "digits":
        torch.manual_seed(0)
        net = DiT(hidden_size=16, num_layers=2, num_heads=2, patch_size=4)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        pipe = ClassConditionalPipeline(net.eval(), diffusers.FlowMatchEulerDiscreteScheduler())
    else:
        pipe = TextToImagePipeline.from_pipe(tiny.pipeline(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(folder, kind, seed=0, **settings):
    """A LoRA with random weights, made and written as training does."""
    student = from_pipeline(make(kind))
    add_lora(student, Adapter(**dict(kind="lora", rank=2, alpha=3) | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in base_network(student).named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return save_lora(student, folder)


def weights(pipe):
    """What every layer multiplies by, its LoRAs included."""
    found = {}
    for name, module in pipe.network.named_modules():
        if hasattr(module, "lora_A"):
            found[name] = module.weight + sum(module.get_delta_weight(a) for a in module.active_adapters)
    return {name: w.detach().double() for name, w in found.items()}


def state(pipe):
    return {k: (v.clone(), v.requires_grad) for k, v in pipe.network.state_dict(keep_vars=True).items()}


def draw(pipe, kind):
    asked = ["a cat"] if kind == "sd15" else [3]
    return pipe(asked, 2, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("kind", ["digits", "dit", "sd15"])
def test_loaded_added_up_and_gone(kind, tmp_path):
    a = adapter(tmp_path / "a", kind, rank=3)
    b = adapter(tmp_path / "b", kind, seed=1)
    pipe = make(kind)
    base, plain = state(pipe), draw(pipe, kind)
    parts = {}
    for name, folder in (("a", a), ("b", b)):
        pipe.load_lora_weights(folder, name)
        parts[name] = weights(pipe)
        assert not torch.allclose(draw(pipe, kind), plain, atol=1e-3)
        pipe.unload_lora_weights()
        after = state(pipe)
        assert after.keys() == base.keys() and not hasattr(pipe.network, "peft_config")
        assert all(torch.equal(after[k][0], v) and after[k][1] == grad for k, (v, grad) in base.items())
        assert torch.equal(draw(pipe, kind), plain)
    pipe.load_lora_weights(a, "one", scale=0.7)
    pipe.load_lora_weights(b / "pytorch_lora_weights.safetensors", "two", scale=-0.3)
    both, drawn = weights(pipe), draw(pipe, kind)
    assert not any(module.training for module in pipe.network.modules())
    mixed = make(kind)
    mixed.load_lora_weights(mix_adapters([(a, 0.7), (b, -0.3)], tmp_path / "mix"))
    assert parts["a"] and both.keys() == parts["a"].keys() == weights(mixed).keys()
    for name, found in weights(mixed).items():
        origin = base[f"{name}.weight"][0].double()
        expected = origin + 0.7 * (parts["a"][name] - origin) - 0.3 * (parts["b"][name] - origin)
        for value in (found, both[name]):
            assert (value - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.allclose(draw(mixed, kind), drawn, atol=1e-4 * drawn.abs().max().item())
    nothing = make(kind)
    nothing.load_lora_weights(a, scale=0)
    assert torch.equal(draw(nothing, kind), plain)


def test_a_half_precision_base_keeps_its_dtype(tmp_path):
    folder = adapter(tmp_path / "a", "digits")
    pipe = make("digits").to(dtype=torch.bfloat16)
    pipe.load_lora_weights(folder)
    assert draw(pipe, "digits").isfinite().all()
    pipe.unload_lora_weights()
    assert {p.dtype for p in pipe.network.parameters()} == {torch.bfloat16}


def test_what_is_refused(tmp_path):
    folder, other = adapter(tmp_path / "a", "digits"), adapter(tmp_path / "b", "dit")
    pipe = make("digits")
    base = state(pipe)
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        pipe.load_lora_weights(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is no file; wanted a folder with a pytorch_lora_weights"):
        pipe.load_lora_weights(tmp_path / "empty")
    with pytest.raises(ValueError, match="but DiT has no layer"):
        pipe.load_lora_weights(other)
    with pytest.raises(ValueError, match="scale=nan: accepted is a finite number"):
        pipe.load_lora_weights(folder, scale=float("nan"))
    assert state(pipe).keys() == base.keys()
    pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="adapter_name='default' is taken"):
        pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match=r"carries the LoRAs \['default'\].*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    assert state(ClassConditionalPipeline.from_pretrained(tmp_path / "saved")).keys() == base.keys()
    (folder / CONFIG_NAME).write_text("{}")
    with pytest.raises(ValueError, match="holds a flow map.*load_flow_map"):
        pipe.load_lora_weights(folder)


def test_loras_of_another_hand_are_left_alone(tmp_path):
    folder, pipe = adapter(tmp_path / "a", "sd15"), make("sd15")
    pipe.classic.load_lora_weights(folder, adapter_name="theirs")
    with pytest.raises(ValueError, match=r"carries the LoRAs \['theirs'\]; fuse or unload"):
        pipe.load_lora_weights(folder)


@pytest.mark.parametrize("kind", ["digits", "sd15"])
def test_command(kind, tmp_path, sampled_with):
    folder = adapter(tmp_path / "a", kind)
    asked = ["--prompt", "a cat"] if kind == "sd15" else ["--labels", "3"]
    arguments = sampled_with(make(kind), folder, *asked)
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "one"), "--adapter", f"{folder}=2"])
    assert "holds images made with {'adapters'" in str(result.exception)


def test_a_lora_without_an_alpha_is_refused(tmp_path):
    """Its strength would be a guess."""
    from safetensors.torch import load_file, save_file

    folder = adapter(tmp_path / "a", "digits")
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="lora_alpha is unknown"):
        make("digits").load_lora_weights(folder)
