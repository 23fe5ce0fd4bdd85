"""Readout guidance: the three ways to use it, and what it leaves behind."""

import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.guidance import APG, CFG, guided
from genkit.guidance.readout import Readout
from tests.guidance.test_readout import made, network_of
from tests.guidance.ways import compiled, offloaded, own_latents


@pytest.mark.parametrize("update", ["adam_sign", "normalised"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_three_ways_make_the_same_latents(name, update, tiny_pipeline, run_modular, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    guider = made(pipe, update=update)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    stats = run.stats()
    acted = stats["loss_map"].isfinite()[:, 0]
    assert acted.sum() >= 2 and not acted.all()
    assert stats["network_calls"].tolist() == [8.0 if a else 2.0 for a in acted]
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-2
    assert relative(own_latents(pipe, name, guider), hooked) < 1e-5
    if name != "sd15":  # which has no modular pipeline
        assert relative(run_modular(name, guider), hooked) < 1e-5


@pytest.mark.parametrize("update", ["normalised", "gradient"])
def test_flux_packed_and_not(update, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("flux")
    guider = made(pipe, update=update, step_size=0.1)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, "flux", output_type="latent")
    assert (run.stats()["loss_move"].isfinite().sum()) >= 2
    assert relative(own_latents(pipe, "flux", guider), hooked) < 1e-5
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, "flux", output_type="latent"), hooked) > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_an_empty_window_is_plain_sampling(name, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    with guided(pipe, CFG(guidance_scale=3.0)):
        plain = run_pipeline(pipe, name)
    with guided(pipe, made(pipe, readout_start=0.3, readout_stop=0.3)):
        assert torch.equal(run_pipeline(pipe, name), plain)
    with guided(pipe, made(pipe, readout_stop=0.0)):
        assert torch.equal(run_pipeline(pipe, name), plain)
    with guided(pipe, APG(guidance_scale=6.0)):
        plain = run_pipeline(pipe, name)
    with guided(pipe, made(pipe, readout_stop=0.0, rule={"name": "apg", "guidance_scale": 6.0})):
        assert torch.equal(run_pipeline(pipe, name), plain)


def test_the_window_begins_and_ends_where_it_says():
    guider = Readout(readout_start=0.25, readout_stop=0.5)
    times = [1.0, 0.76, 0.75, 0.6, 0.5, 0.4]
    assert [guider._reads(torch.tensor(t)) for t in times] == [False, False, True, True, False, False]
    assert Readout()._reads(torch.tensor(1.0 + 1e-7))


@pytest.mark.parametrize("name", ["sd3", "sd15_controlnet"])
def test_nothing_is_left_behind(name, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    network = network_of(pipe)
    flags = [p.requires_grad for p in network.parameters()]
    assert all(flags)
    guider = made(pipe)

    class Stop(KeyboardInterrupt):
        pass

    calls = []

    def interrupt(module, args, output):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 4:  # within the backward's forward
            raise Stop

    handle = network.register_forward_hook(interrupt)
    with pytest.raises(Stop), guided(pipe, guider):
        run_pipeline(pipe, name)
    handle.remove()
    assert calls[0] is False and True in calls
    assert [p.requires_grad for p in network.parameters()] == flags
    assert not network.is_gradient_checkpointing and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with guided(pipe, guider):
        assert run_pipeline(pipe, name).isfinite().all()
    heads = [target.head for target in guider.given("targets").values()]
    assert all(p.grad is None and p.requires_grad for m in (network, *heads) for p in m.parameters())


def test_checkpoints_change_memory_only(tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("sd15")
    latents = []
    for on in (True, False):
        seen = []
        handle = pipe.unet.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_, s=seen: s.append(1))
        with guided(pipe, made(pipe, gradient_checkpointing=on)):
            latents.append(run_pipeline(pipe, "sd15"))
        handle.remove()
        latents.append(len(seen))
    assert relative(latents[0], latents[2]) < 1e-5
    assert latents[1] > latents[3]  # computed again on the way back


@pytest.mark.parametrize("wrap", [compiled, offloaded])
def test_wrapped_networks(wrap, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("sd3")
    guider = made(pipe, update="normalised")
    with guided(pipe, guider):
        expected = run_pipeline(pipe, "sd3")
    pipe.transformer = wrap(pipe.transformer)
    with guided(pipe, guider):
        assert relative(run_pipeline(pipe, "sd3"), expected) < 1e-5


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, run_pipeline, tmp_path):
    pipe = tiny_pipeline("sd15")
    guider = made(pipe, kinds=("map",), update="normalised")
    target = guider.given("targets")["map"]
    with guided(pipe, guider):
        expected = run_pipeline(pipe, "sd15")
    guider.save_pretrained(tmp_path / "guider")
    target.head.save_pretrained(tmp_path / "head")
    save_file({"control": target.control}, tmp_path / "control.safetensors")
    code = f"""
    import sys, torch, genkit
    torch.set_num_threads(1)
    from safetensors.torch import load_file, save_file
    from genkit.guidance.readout import SpatialTarget
    from genkit.networks.readout_head import ReadoutHead
    from genkit.testing import tiny
    pipe = tiny.pipeline("sd15")
    head = ReadoutHead.from_pretrained({str(tmp_path / "head")!r})
    target = SpatialTarget(head=head, control=load_file({str(tmp_path / "control.safetensors")!r})["control"])
    guider = genkit.load_guider({str(tmp_path / "guider")!r}).using(targets={{"map": target}})
    with genkit.guided(pipe, guider):
        settings = tiny.call_arguments("sd15", 3) | dict(output_type="latent", negative_prompt="two dogs")
        images = pipe(**settings, guidance_scale=2.0).images
    save_file({{"images": images}}, {str(tmp_path / "out.safetensors")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["images"], expected, rtol=1e-5, atol=1e-5)
