"""Several adapters on one network: which is in use, and what that leaves alone."""

import pytest
import torch

from genkit.denoisers import TwoTime, from_pipeline, wrap
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.testing import tiny
from genkit.training import adapters
from genkit.training.sections import Adapter

SETTINGS = Adapter(kind="lora", rank=2, alpha=4)


def student(kind):
    """A denoiser with a LoRA, its weights not zero, and what it is called with."""
    torch.manual_seed(0)
    if kind == "injected":  # genkit's own network has no mixin of Diffusers for adapters
        network = DiT(hidden_size=16, num_layers=2, num_heads=2)
        for layer in (network.out, *(b.modulation for b in network.blocks)):
            torch.nn.init.normal_(layer.weight, std=0.3)
        denoiser = wrap(network.requires_grad_(False).eval(), Linear(), "flow_prediction")
        condition = denoiser.encode(None, class_labels=[1, 2])
        shape = (2, 1, 8, 8)
    else:
        pipe = tiny.pipeline(kind)
        denoiser = from_pipeline(pipe)
        denoiser.module.requires_grad_(False)
        condition = denoiser.encode(pipe, prompt=["a", "b"], negative_prompt="")
        denoiser = TwoTime(denoiser)
        shape = (2, 4, 16, 16)
    x = torch.randn(shape)

    def output():
        return denoiser.average_velocity(x, torch.tensor([0.9, 0.4]), torch.tensor([0.9, 0.4]), condition)

    return denoiser, output


def fill(denoiser, name, value):
    with torch.no_grad():
        for key, parameter in adapters.adapter_weights(denoiser, name).items():
            if "lora_B" in key:
                parameter.fill_(value)


def flags(denoiser):
    return {n: p.requires_grad for n, p in denoiser.module.named_parameters()}


@pytest.mark.parametrize("kind", ["injected", "sd3", "flux"])
def test_adapters_are_switched_and_put_back(kind):
    denoiser, output = student(kind)
    with torch.no_grad():
        base = output()
    adapters.add_lora(denoiser, SETTINGS)
    fill(denoiser, "default", 0.1)
    before = flags(denoiser)
    with torch.no_grad():
        ours = output()
    adapters.add_adapter(denoiser, "fake", SETTINGS)
    assert {n: v for n, v in flags(denoiser).items() if ".fake" not in n} == before
    new = [v for n, v in flags(denoiser).items() if ".fake" in n]
    assert new and all(new)
    assert adapters.adapter_names(denoiser) == {"default", "fake"}
    before = flags(denoiser)
    with torch.no_grad():
        assert torch.equal(output(), ours)  # adding one changes nothing
        with adapters.using(denoiser, "fake"):
            torch.testing.assert_close(output(), base)
            fill(denoiser, "fake", -0.2)
            theirs = output()
            with adapters.without_adapter(denoiser):
                assert torch.equal(output(), base)
                with adapters.using(denoiser, "default"):
                    assert torch.equal(output(), ours)
                assert torch.equal(output(), base)
            assert torch.equal(output(), theirs)
        assert torch.equal(output(), ours)
    assert (theirs - ours).abs().max() > 1e-3 < (ours - base).abs().max()
    with pytest.raises(ZeroDivisionError), adapters.using(denoiser, "fake"), adapters.without_adapter(denoiser):
        _ = 1 / 0
    with torch.no_grad():
        assert torch.equal(output(), ours)
    assert flags(denoiser) == before


@pytest.mark.parametrize("kind", ["injected", "sd3"])
def test_gradients_reach_the_adapter_in_use_alone(kind):
    denoiser, output = student(kind)
    adapters.add_lora(denoiser, SETTINGS)
    adapters.add_adapter(denoiser, "fake", SETTINGS)
    with adapters.using(denoiser, "fake"):
        loss = output().square().mean()
    loss.backward()  # outside, as the trainer does
    reached = {n for n, p in adapters.base_network(denoiser).named_parameters() if p.grad is not None}
    assert reached and reached <= adapters.adapter_weights(denoiser, "fake").keys()


def test_an_adapter_on_a_network_that_trains_whole():
    denoiser, output = student("injected")
    denoiser.module.requires_grad_(True)
    with torch.no_grad():
        base = output()
        adapters.add_adapter(denoiser, "fake", SETTINGS)
        fill(denoiser, "fake", 0.1)
        assert torch.equal(output(), base)
        with adapters.using(denoiser, "fake"):
            assert not torch.equal(output(), base)
    assert all(flags(denoiser).values())


def test_refusals():
    denoiser, _ = student("sd3")
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no adapter; train with adapter.kind=lora"):
        with adapters.without_adapter(denoiser):
            pass
    adapters.add_lora(denoiser, SETTINGS)
    with pytest.raises(ValueError, match="name='fake': the network has the adapters \\['default'\\]"):
        with adapters.using(denoiser, "fake"):
            pass
    with pytest.raises(ValueError, match="name='default': the network has the adapters \\['default'\\] already"):
        adapters.add_adapter(denoiser, "default", SETTINGS)
    with pytest.raises(ValueError, match="target_modules='to_kk' matches no layer of SD3Transformer2DModel.*to_k,"):
        adapters.add_adapter(denoiser, "fake", Adapter(kind="lora", target_modules=["to_kk"]))
    denoiser.network.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="train with gradient_checkpointing=false, or switch adapters under no_grad"):
        with adapters.without_adapter(denoiser):
            pass
    with torch.no_grad(), adapters.without_adapter(denoiser):
        pass
