"""Where a network's condition is shifted, whether it sees that, and what is left alone."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genkit.denoisers import FunctionFlowMap, TwoTime, from_pipeline, wrap
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.testing import tiny
from genkit.training import adapters
from genkit.training.parts import condition_shift
from genkit.training.parts.condition_shift import ConditionShiftConfig, TimeSignConfig
from genkit.training.sections import Adapter

ARGUMENTS = dict(sd15=dict(prompt=["a", "b"]), sd3=dict(prompt=["a", "b"]), flux=dict(prompt=["a", "b"]))
ARGUMENTS |= dict(sdxl=dict(prompt=["a", "b"]), dit=dict(class_labels=[3, 7]))
T = torch.tensor([0.9, 0.4])


def student(kind):
    """A flow map, and its condition for two items."""
    torch.manual_seed(0)
    if kind == "own":
        network = DiT(hidden_size=16, num_layers=2, num_heads=2)
        for layer in (network.out, network.gap_embed, *(b.modulation for b in network.blocks)):
            nn.init.normal_(layer.weight, std=0.3)
        denoiser = wrap(network, Linear(), "flow_prediction")
        return denoiser, denoiser.encode(None, class_labels=[3, 7]), torch.randn(2, 1, 8, 8)
    pipe = tiny.pipeline(kind)
    denoiser = from_pipeline(pipe)
    denoiser.module.requires_grad_(False)
    if kind == "dit":  # its modulations are born zero
        for block in denoiser.inner.transformer_blocks:
            nn.init.normal_(block.norm1.linear.weight, std=0.3)
    return TwoTime(denoiser), denoiser.encode(pipe, **ARGUMENTS[kind]), torch.randn(2, 4, 16, 16)


KINDS = ["sd15", "sdxl", "sd3", "flux", "dit", "own"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shift_is_seen_and_leaves_the_rest_alone(kind):
    denoiser, condition, x = student(kind)
    held = {k: v.clone() for k, v in condition.values.items()}
    branch = ConditionShiftConfig(a=-1, b=0.5).make(denoiser)
    with torch.no_grad():
        before = denoiser.average_velocity(x, T, T, condition)
        value, changed = branch.velocity(denoiser, x, T, condition)
        assert changed.all() and (value - before).abs().max() > 1e-4
        assert torch.equal(denoiser.average_velocity(x, T, T, condition), before)
        identity = ConditionShiftConfig(a=1, learned=True).make(denoiser)
        value, changed = identity.velocity(denoiser, x, T, condition)
        assert torch.equal(value, before) and not changed.any()
    assert all(torch.equal(condition[k], v) for k, v in held.items())
    assert condition_shift.visibility(branch, denoiser, x, T, condition) > 1e-6
    assert condition_shift.visibility(identity, denoiser, x, T, condition) == 0


@pytest.mark.parametrize("kind,module", [("sd3", "context_embedder"), ("own", "class_embed"), ("sd15", None)])
def test_what_is_shifted(kind, module):
    denoiser, condition, x = student(kind)
    network = adapters.base_network(denoiser)
    seen = []
    if module is None:
        network.register_forward_pre_hook(
            lambda m, args, kw: seen.append(kw["encoder_hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        branch = ConditionShiftConfig(a=-0.5, b=0.25).make(denoiser)
        if module is None:
            branch.velocity(denoiser, x, T, condition)
            plain = condition["prompt_embeds"]
        else:
            plain = getattr(network, module)(condition["prompt_embeds" if kind == "sd3" else "class_labels"])
            with branch._shifting([getattr(network, module)]):
                seen.append(getattr(network, module)(condition["prompt_embeds" if kind == "sd3" else "class_labels"]))
    torch.testing.assert_close(seen[0], -0.5 * plain + 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_sign(kind):
    denoiser, condition, x = student(kind)
    branch = TimeSignConfig().make(denoiser)
    seen = []
    network = adapters.base_network(denoiser)
    network.register_forward_pre_hook(lambda m, args, kw: seen.append(kw.get("timestep", *args[1:2])), with_kwargs=True)
    with torch.no_grad():
        before = denoiser.average_velocity(x, T, T, condition)
        value, changed = branch.velocity(denoiser, x, T, condition)
    plain, negated = seen
    assert torch.equal(plain, -negated) and (plain > 0).all()
    assert changed.all() and (value - before).abs().max() > 1e-6
    with torch.no_grad():
        _, changed = branch.velocity(denoiser, x, torch.tensor([0.0, 0.5]), condition)
    first = denoiser.interpolant.timestep(torch.zeros(())) != 0
    assert changed.tolist() == [bool(first), True]


@pytest.mark.parametrize("form,shapes", [("scalar", ((), ())), ("diag", ((32,), (32,))), ("full", ((32, 32), (32,)))])
def test_forms(form, shapes):
    denoiser, condition, x = student("sd3")
    branch = ConditionShiftConfig(form=form, a=-0.5, b=0.1, learned=True).make(denoiser)
    assert (branch.a.shape, branch.b.shape) == shapes
    c = torch.randn(2, 5, 32)
    torch.testing.assert_close(branch(c), -0.5 * c + 0.1)
    value, _ = branch.velocity(denoiser, x, T, condition)
    value.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in branch.parameters())


@pytest.mark.parametrize("form,shapes", [("scalar", ((), ())), ("diag", ((32,), ())), ("full", ((32, 32), (32,)))])
def test_weights_from_a_file(form, shapes, tmp_path):
    denoiser, _, _ = student("sd3")
    file = tmp_path / "shift.safetensors"
    a, b = (torch.randn(s) for s in shapes)
    save_file({"a": a, "b": b}, file)
    branch = ConditionShiftConfig(form=form, weights=file).make(denoiser)
    c = torch.randn(2, 5, 32)
    torch.testing.assert_close(branch(c), (c @ a.T if form == "full" else a * c) + b)
    assert not any(p.requires_grad for p in branch.parameters())
    wrong = "diag" if form == "full" else "full"
    with pytest.raises(ValueError, match="holds a of shape"):
        ConditionShiftConfig(form=wrong, weights=file).make(denoiser)
    save_file({"a": a}, file)
    with pytest.raises(ValueError, match="holds \\['a'\\], wanted a and b"):
        ConditionShiftConfig(form=form, weights=file).make(denoiser)


def test_weights_for_another_width(tmp_path):
    save_file({"a": torch.ones(16), "b": torch.ones(16)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="on 32 features"):
        ConditionShiftConfig(form="diag", weights=tmp_path / "w.safetensors").make(student("sd3")[0])


def test_only_conditions_of_zeros_are_left_as_they_are():
    denoiser, condition, x = student("sd15")
    embeds = condition["prompt_embeds"].clone()
    embeds[0] = 0
    condition = Condition({"prompt_embeds": embeds})
    with torch.no_grad():
        _, changed = ConditionShiftConfig(a=-1).make(denoiser).velocity(denoiser, x, T, condition)
        assert changed.tolist() == [False, True]
        _, changed = ConditionShiftConfig(a=-1, b=0.1).make(denoiser).velocity(denoiser, x, T, condition)
        assert changed.tolist() == [True, True]


def test_the_label_table_is_not_moved_by_a_low_rank_update():
    denoiser, condition, x = student("dit")
    adapters.add_lora(denoiser, Adapter(kind="lora", rank=2))
    value, changed = ConditionShiftConfig().make(denoiser).velocity(denoiser, x, T, condition)
    assert changed.all() and value.requires_grad


def test_refusals():
    denoiser, condition, x = student("dit")
    branch = ConditionShiftConfig().make(denoiser)
    denoiser.network.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient_checkpointing=True: .*without the shift"):
        branch.velocity(denoiser, x, T, condition)
    with torch.no_grad():
        branch.velocity(denoiser, x, T, condition)
    own = wrap(DiT(hidden_size=16, num_layers=1, num_heads=2), Linear(), "epsilon")
    with pytest.raises(ValueError, match="time_sign.*prediction_type='epsilon'.*accepted is flow_prediction"):
        TimeSignConfig().make(own)
    plain = FunctionFlowMap(nn.Identity(), Linear())
    with pytest.raises(ValueError, match="form='full': the width of the condition is not known"):
        ConditionShiftConfig(form="full", learned=True).make(plain)
    with pytest.raises(ValueError, match="conditioned on \\['class_labels'\\]"):
        ConditionShiftConfig().make(plain).velocity(plain, x, T, Condition({"class_labels": torch.tensor([1, 2])}))


def test_the_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="genkit.training"):
        condition_shift.warn_if_invisible(2e-3)
        assert not caplog.text
        condition_shift.warn_if_invisible(5e-4)
    assert "the shift moves the velocity by 0.0005 of its mean square, less than 0.001" in caplog.text
