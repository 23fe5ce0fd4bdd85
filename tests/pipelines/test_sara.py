"""SaRAs in genkit's pipelines: loaded by themselves or beside LoRAs, added up, gone without a trace."""

import diffusers
import pytest
import torch

from genkit.adapters import mix_adapters
from genkit.denoisers import from_pipeline
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline, TextToImagePipeline
from genkit.sara import add_sara, sara_layers
from genkit.sara_files import SparseAdapter
from genkit.testing import tiny
from genkit.training.adapters import add_lora, base_network, save_lora
from genkit.training.sections import Adapter


def make(kind):
    if kind == "digits":
        torch.manual_seed(0)
        net = DiT(hidden_size=16, num_layers=2, num_heads=2, patch_size=4)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        pipe = ClassConditionalPipeline(net.eval(), diffusers.FlowMatchEulerDiscreteScheduler())
    else:
        pipe = TextToImagePipeline.from_pipe(tiny.pipeline(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(folder, kind, seed=0, count=300):
    network = make(kind).network
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for sara in add_sara(network, num_params=count).values():
            sara.delta.copy_(torch.randn(len(sara.delta), generator=generator))
    return SparseAdapter.of(network).save(folder)


def lora(folder, kind):
    student = from_pipeline(make(kind))
    add_lora(student, Adapter(kind="lora", rank=2))
    with torch.no_grad():
        for name, p in base_network(student).named_parameters():
            if "lora_B" in name:
                p += 0.3
    return save_lora(student, folder)


def state(pipe):
    return {k: v.clone() for k, v in pipe.network.state_dict().items()}


def draw(pipe, kind):
    asked = [3] if kind == "digits" else ["a cat"]
    return pipe(asked, 2, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("kind", ["digits", "sd15", "sdxl", "sd3"])
def test_loaded_added_up_and_gone(kind, tmp_path):
    a, b = adapter(tmp_path / "a", kind), adapter(tmp_path / "b", kind, seed=1, count=500)
    pipe = make(kind)
    base, plain = state(pipe), draw(pipe, kind)
    pipe.load_adapter(a, "one", scale=0.7)
    alone = draw(pipe, kind)
    pipe.load_adapter(b / "sara_weights.safetensors", "two", scale=-0.3)
    both = draw(pipe, kind)
    assert not torch.allclose(alone, plain, atol=1e-3) and not torch.allclose(alone, both, atol=1e-3)
    mixed = make(kind)
    mixed.load_adapter(mix_adapters([(a, 0.7), (b, -0.3)], tmp_path / "mix"))
    torch.testing.assert_close(draw(mixed, kind), both, rtol=1e-4, atol=1e-5)
    pipe.unload_sara_weights()
    assert all(torch.equal(v, base[k]) for k, v in state(pipe).items()) and torch.equal(draw(pipe, kind), plain)
    pipe.load_adapter(a, scale=0)
    assert all(torch.equal(v, base[k]) for k, v in state(pipe).items())


@pytest.mark.parametrize("kind", ["digits", "sd15"])
def test_beside_a_lora_in_either_order(kind, tmp_path):
    a, other = adapter(tmp_path / "a", kind), lora(tmp_path / "lora", kind)
    pipe = make(kind)
    base, plain = state(pipe), draw(pipe, kind)
    drawn = []
    for first, second in ((a, other), (other, a)):
        pipe.load_adapter(first)
        pipe.load_adapter(second, "other")
        drawn.append(draw(pipe, kind))
        pipe.unload_sara_weights()
        pipe.unload_lora_weights()
        assert all(torch.equal(v, base[k]) for k, v in state(pipe).items()) and torch.equal(draw(pipe, kind), plain)
    assert torch.equal(*drawn)
    for path in (a, other):
        pipe.load_adapter(path)
        assert not torch.allclose(draw(pipe, kind), drawn[0], atol=1e-3)
        pipe.unload_adapters()
        assert torch.equal(draw(pipe, kind), plain)


def test_a_pipeline_is_saved_with_them(tmp_path):
    pipe = make("digits")
    pipe.load_adapter(adapter(tmp_path / "a", "digits"))
    drawn = draw(pipe, "digits")
    pipe.save_pretrained(tmp_path / "saved")
    saved = ClassConditionalPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(draw(saved, "digits"), drawn) and not sara_layers(saved.network)


def test_refusals_change_nothing(tmp_path):
    a, foreign = adapter(tmp_path / "a", "digits"), adapter(tmp_path / "b", "sd15")
    pipe = make("digits")
    pipe.load_adapter(a)
    drawn = draw(pipe, "digits")
    with pytest.raises(ValueError, match="'default' is taken: .*; give a second one .* as adapter_name='default_2'"):
        pipe.load_adapter(a)
    with pytest.raises(ValueError, match="the SaRA is of another network"):
        pipe.load_adapter(foreign, "foreign")
    with pytest.raises(ValueError, match="scale=inf: accepted is a finite number"):
        pipe.load_adapter(a, "more", scale=float("inf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="empty holds an empty folder, no adapter; wanted .*lora.* or .*sara.* or"
    ):
        pipe.load_adapter(tmp_path / "empty", "more")
    for what in (lambda: pipe.load_adapter(tmp_path, "more"), lambda: mix_adapters([(tmp_path, 1)], tmp_path / "mix")):
        with pytest.raises(
            FileNotFoundError, match=f"no adapter; there is one in {tmp_path / 'a'}, {tmp_path / 'b'}; wanted"
        ):
            what()
    assert torch.equal(draw(pipe, "digits"), drawn)
    pipe.load_adapter(a, "more", scale=-1)
    pipe.unload_sara_weights()
    with torch.no_grad():
        pipe.network.out.weight[0, 0] += 1
        for p in pipe.network.blocks[0].parameters():
            p += 1
    with pytest.raises(ValueError, match="the SaRA is of another base model"):
        pipe.load_adapter(a)


def test_command(tmp_path, sampled_with):
    sampled_with(make("digits"), adapter(tmp_path / "a", "digits"), "--labels", "3")
