"""Guiders in modular pipelines: against the native ones, against `guided`, and after a reload in a fresh process."""

import subprocess
import sys
import textwrap

import accelerate
import diffusers
import pytest
import torch
from diffusers.modular_pipelines import BlockState

from genkit import interpolants
from genkit.denoisers.base import Condition
from genkit.denoisers.function import FunctionDenoiser
from genkit.guidance import APG, CFG, Point, attach, detach, guided
from tests.guidance.test_hooks import Moves

BOTH = pytest.mark.parametrize("name", ["sd3", "sdxl"])
NATIVE = {"sd3": 7.0, "sdxl": 7.5}


@BOTH
def test_cfg_is_the_native_one_bit_for_bit(name, modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline(name)
    native = run_pipeline(pipe, name)
    attached = attach(pipe, CFG(guidance_scale=NATIVE[name]))
    assert pipe.guider is attached
    assert torch.equal(run_pipeline(pipe, name), native)
    attach(pipe, APG())
    assert not torch.equal(run_pipeline(pipe, name), native)
    detach(pipe)
    assert type(pipe.guider) is diffusers.ClassifierFreeGuidance and "guider" not in pipe.config
    assert torch.equal(run_pipeline(pipe, name), native)


@BOTH
def test_modular_and_classic_agree(name, modular_pipeline, run_pipeline, relative):
    classic, pipe = modular_pipeline(name)
    guider = APG(guidance_scale=9.0, norm_threshold=2.0)
    attach(pipe, guider)
    first = run_pipeline(pipe, name)
    assert torch.equal(run_pipeline(pipe, name), first)
    with guided(classic, guider):
        assert relative(first, run_pipeline(classic, name)) < 1e-5


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
        ("sdxl", "HeunDiscreteScheduler"),
        ("sdxl", "KDPM2DiscreteScheduler"),
    ],
)
def test_guidance_stays_on_under_second_order_solvers(name, scheduler, modular_pipeline, run_pipeline, relative):
    classic, pipe = modular_pipeline(name)
    classic.scheduler = getattr(diffusers, scheduler).from_config(classic.scheduler.config)
    pipe.update_components(scheduler=classic.scheduler)
    attach(pipe, CFG(guidance_scale=5.0))
    assert relative(run_pipeline(pipe, name), run_pipeline(classic, name, guidance_scale=5.0)) < 1e-5
    guider = APG(guidance_scale=5.0, norm_threshold=2.0)
    attach(pipe, guider)
    latents = run_pipeline(pipe, name)
    with guided(classic, guider):
        assert relative(latents, run_pipeline(classic, name)) < 1e-5


@BOTH
def test_disabled_neutral_and_windowed(name, modular_pipeline, run_pipeline, relative):
    classic, pipe = modular_pipeline(name)
    plain = run_pipeline(classic, name, guidance_scale=1.0)
    for guider in (CFG(enabled=False), CFG(guidance_scale=1.0), CFG(start=0.999, stop=0.999)):
        attach(pipe, guider)
        for _ in range(2):  # a second run must not crash on what the first left behind
            assert relative(run_pipeline(pipe, name), plain) < 1e-5
    window = CFG(guidance_scale=5.0, stop=0.45)
    attach(pipe, window)
    first = run_pipeline(pipe, name)
    assert torch.equal(run_pipeline(pipe, name), first)
    with guided(classic, window):
        assert relative(first, run_pipeline(classic, name)) < 1e-5


def test_window_equals_the_stock_one_on_the_same_steps(modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline("sdxl")
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5))
    stock = run_pipeline(pipe, "sdxl", num_inference_steps=4)
    assert (1 - (pipe.scheduler.timesteps + 1) / 1000 <= 0.6).tolist() == [True, True, False, False]
    attach(pipe, CFG(guidance_scale=5.0, stop=0.6))
    assert torch.equal(run_pipeline(pipe, "sdxl", num_inference_steps=4), stock)


def test_switched_off_by_hand_does_not_crash(modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline("sdxl")
    attach(pipe, CFG()).disable()
    assert run_pipeline(pipe, "sdxl").isfinite().all()


class Additive(torch.nn.Module):
    """A network of the kind that pipelines call with everything by name."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return (torch.tanh(hidden_states + encoder_hidden_states + timestep[:, None] / 1000),)


@pytest.mark.parametrize("second_form", [False, True])
@pytest.mark.parametrize("guider", [CFG(guidance_scale=3.0), APG(), CFG(stop=0.3)])
def test_both_forms_of_preparing_inputs(guider, second_form):
    guider = guider.bind(diffusers.FlowMatchEulerDiscreteScheduler())
    network, x = Additive(), torch.randn(2, 8)
    cond, uncond = torch.randn(2, 2, 8)
    state = None
    for step, t in enumerate((900.0, 500.0)):
        t = torch.tensor(t)
        guider.set_state(step=step, num_inference_steps=2, timestep=t)
        if second_form:
            block_state = BlockState(x=x, pos=cond, neg=uncond)
            batches = guider.prepare_inputs_from_block_state(
                block_state, {"hidden_states": "x", "encoder_hidden_states": ("pos", "neg")}
            )
        else:
            batches = guider.prepare_inputs({"hidden_states": x, "encoder_hidden_states": (cond, uncond)})
        assert len(batches) == (2 if guider.active(t / 1000) else 1)
        for i, batch in enumerate(batches):
            guider.prepare_models(network)
            assert guider.is_conditional == (i == 0)
            batch.noise_pred = network(
                hidden_states=batch.hidden_states,
                timestep=t.expand(2),
                encoder_hidden_states=batch.encoder_hidden_states,
            )[0]
            guider.cleanup_models(network)
        pred = guider(batches).pred
        denoiser = FunctionDenoiser(
            lambda z, time, c, t=t: network(z, t.expand(len(z)), c)[0], interpolants.Linear(), "flow_prediction"
        )
        point = Point(denoiser, x, t.double() / 1000, None, t, Condition({"c": cond}, {"c": uncond}))
        expected, state = guider.guide(point, state)
        torch.testing.assert_close(pred, expected.prediction.raw)
        x = x - 0.4 * pred
    assert not network._forward_pre_hooks


def compiled(network):
    return torch.compile(network, backend="eager")


def offloaded(network):
    accelerate.cpu_offload(network, execution_device="cpu")
    return network


@pytest.mark.parametrize("wrap", [compiled, offloaded])
def test_wrapped_networks(wrap, modular_pipeline, run_pipeline, relative):
    _, pipe = modular_pipeline("sd3")
    guider = attach(pipe, APG(norm_threshold=2.0))
    expected = run_pipeline(pipe, "sd3")
    pipe.transformer = wrap(pipe.transformer)
    assert relative(run_pipeline(pipe, "sd3"), expected) < 1e-5
    assert guider is pipe.guider and not pipe.transformer._forward_pre_hooks


@BOTH
def test_one_guider_in_two_pipelines(name, modular_pipeline, run_pipeline):
    (_, one), (_, two) = modular_pipeline(name), modular_pipeline(name)
    guider = APG(norm_threshold=2.0)
    attach(one, guider)
    expected = run_pipeline(one, name)
    attach(two, guider)
    assert guider.scheduler_config is None and one.guider is not two.guider
    assert torch.equal(run_pipeline(two, name), expected) and torch.equal(run_pipeline(one, name), expected)


@BOTH
def test_unattached(name, modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline(name)
    pipe.update_components(guider=CFG())
    with pytest.raises(ValueError, match=r"use genkit.attach\(pipe, guider\)"):
        run_pipeline(pipe, name)


def test_what_attach_refuses(modular_pipeline):
    classic, pipe = modular_pipeline("sd3")
    with pytest.raises(ValueError, match="use genkit.guided"):
        attach(classic, CFG())
    with pytest.raises(ValueError, match="name='guidr' is not known; did you mean 'guider'"):
        attach(pipe, CFG(), name="guidr")
    with pytest.raises(ValueError, match="guider=ClassifierFreeGuidance"):
        attach(pipe, diffusers.ClassifierFreeGuidance())
    pipe.update_components(scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="does not fit SD3Transformer2DModel"):
        attach(pipe, CFG())
    empty = diffusers.StableDiffusion3AutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match="no scheduler yet"):
        attach(empty, CFG())


@pytest.mark.parametrize("way", ["detach", "attach", "run"])
def test_a_run_that_was_broken_off_leaves_no_hook(way, modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline("sd3")

    def breaks(*_):
        raise KeyboardInterrupt

    attach(pipe, CFG(guidance_scale=3.0))
    handle = pipe.transformer.register_forward_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipe, "sd3")
    handle.remove()
    assert pipe.transformer._forward_pre_hooks
    if way == "run":
        run_pipeline(pipe, "sd3")
    elif way == "attach":
        attach(pipe, CFG(guidance_scale=2.0))
    else:
        detach(pipe)
    assert not pipe.transformer._forward_pre_hooks


def test_sd3_without_negative_prompt_warns(modular_pipeline, run_pipeline, warnings_of_genkit):
    _, pipe = modular_pipeline("sd3")
    attach(pipe, CFG())
    run_pipeline(pipe, "sd3", negative_prompt=None)
    messages = [r.message for r in warnings_of_genkit.records if "bit for bit" in r.message]
    assert len(messages) == 1 and "negative_prompt=''" in messages[0]


CHILD = """
    import sys, torch
    torch.set_num_threads(1)
    import genkit
    assert "torch" in sys.modules and "diffusers" not in sys.modules  # genkit itself has loaded neither
    from diffusers import DiffusionPipeline, ModularPipeline

    folder = sys.argv[1]
    for name in ("sd3", "sdxl"):
        from genkit.testing import tiny
        arguments = tiny.call_arguments(name, 3) | dict(output_type="latent", negative_prompt="two dogs")
        pipe = ModularPipeline.from_pretrained(f"{folder}/{name}/modular")
        pipe.load_components()
        assert type(pipe.guider).__name__ == "APG", pipe.guider
        results = {"modular": pipe(**arguments, output="images" if name == "sd3" else "latents")}
        pipe = DiffusionPipeline.from_pretrained(f"{folder}/{name}/classic")
        arguments["generator"].manual_seed(0)
        with genkit.guided(pipe, genkit.load_guider(f"{folder}/{name}/modular/guider")):
            results["classic"] = pipe(**arguments, guidance_scale=2.0).images
        torch.save(results, f"{folder}/{name}/results.pt")
"""


def test_saved_and_reloaded_in_a_fresh_process(modular_pipeline, run_pipeline, relative, tmp_path):
    expected = {}
    for name in NATIVE:
        classic, pipe = modular_pipeline(name)
        attach(pipe, APG(guidance_scale=9.0, norm_threshold=2.0, eta=0.25))
        expected[name] = run_pipeline(pipe, name)
        pipe.save_pretrained(str(tmp_path / "elsewhere" / name / "modular"), overwrite_modular_index=name == "sd3")
        classic.save_pretrained(tmp_path / "elsewhere" / name / "classic")
    folder = (tmp_path / "elsewhere").rename(tmp_path / "moved")
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    for name in NATIVE:
        for kind, latents in torch.load(folder / name / "results.pt", weights_only=True).items():
            assert relative(latents, expected[name]) < 1e-5, (name, kind)


def test_detached_pipelines_save_no_guider(modular_pipeline, run_pipeline, tmp_path):
    _, pipe = modular_pipeline("sdxl")
    native = run_pipeline(pipe, "sdxl")
    attach(pipe, APG())
    detach(pipe)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    loaded = diffusers.ModularPipeline.from_pretrained(str(tmp_path))
    loaded.load_components()
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guider) is diffusers.ClassifierFreeGuidance
    latents = run_pipeline(loaded, "sdxl")
    assert (latents - native).abs().max() < 1e-5 * native.abs().max()


@BOTH
def test_a_guider_that_moves_the_sample(name, modular_pipeline, run_pipeline, relative):
    classic, pipe = modular_pipeline(name)
    attached = attach(pipe, Moves(guidance_scale=3.0))
    first = run_pipeline(pipe, name)
    with guided(classic, Moves(guidance_scale=3.0)):
        assert relative(first, run_pipeline(classic, name)) < 1e-5
    assert attached.stats()["network_calls"].tolist() == [4, 4, 4]
    heun = dict(sd3="FlowMatchHeunDiscreteScheduler", sdxl="HeunDiscreteScheduler")[name]
    pipe.update_components(scheduler=getattr(diffusers, heun).from_config(classic.scheduler.config))
    with pytest.raises(ValueError, match="scheduler=.*Heun.*moves the sample, which modular pipelines do not hand out"):
        attach(pipe, Moves())
