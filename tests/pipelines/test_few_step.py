"""Few-step students in the pipelines of their teachers."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, inject_adapter_in_model

from genkit import hub
from genkit.denoisers import TwoTime, from_pipeline
from genkit.guidance import CFG
from genkit.networks.dit import DiT
from genkit.pipelines import FewStepPipeline
from genkit.rng import ItemRNG
from genkit.sampling import sample
from genkit.schedulers import FlowMapScheduler
from genkit.testing import tiny

NAMES = ("sd15", "sdxl", "sd3", "flux", "dit")
ALL = pytest.mark.parametrize("name", NAMES)


SCALARS = {"guidance_scale": 4.0, "t_low": 0.25}


def write_student(pipe, folder, lora=True, scalars=None):
    """A student off its teacher in every weight that is trained."""
    denoiser = from_pipeline(pipe)
    if lora:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
        add = getattr(denoiser.inner, "add_adapter", None)
        add(config) if add else inject_adapter_in_model(config, denoiser.inner)
    flow_map = TwoTime(denoiser)
    if scalars:
        flow_map.add_scalars(scalars)
    with torch.no_grad():
        for key, p in flow_map.module.named_parameters():
            if "lora_B" in key or ("gap_embedder" in key and "out" in key) or not lora:
                p.add_(torch.randn_like(p) * 0.05)
    hub.save_flow_map(folder, flow_map)
    return flow_map


def inputs(name):
    if name == "dit":
        return dict(class_labels=[3, 7])
    texts = dict(prompt=["a cat", "blue"], height=32, width=32)
    return texts | (dict(max_sequence_length=8) if name in ("sd3", "flux") else {})


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents():
    return ItemRNG(0, range(2)).normal((4, 16, 16))


def image(pipe, name, **changes):
    settings = dict(num_inference_steps=2, latents=latents(), output_type="pt") | inputs(name) | changes
    out = pipe(**settings)
    assert out.network_calls == 2
    return out.images


@ALL
@pytest.mark.parametrize("lora", [True, False])
def test_the_samples_of_the_flow_map(name, lora, tiny_pipeline, tmp_path):
    teacher = tiny_pipeline(name)
    flow_map = write_student(teacher, tmp_path, lora)
    scheduler = FlowMapScheduler.from_scheduler(teacher.scheduler)
    scheduler.set_timesteps(2, mu=calculate_shift(64) if name == "flux" else None)  # as FluxPipeline for 64 tokens
    told = {k: v for k, v in inputs(name).items() if name == "sdxl" or k not in ("height", "width")}
    condition = flow_map.encode(teacher, **told)
    expected = sample(flow_map, scheduler, latents(), condition)
    pipe = quiet(FewStepPipeline.from_pipe(tiny_pipeline(name)))
    pipe.load_flow_map(tmp_path)
    got = image(pipe, name, output_type="latent")
    assert (got - expected).abs().max() / expected.abs().max() < 1e-5
    assert not hasattr(pipe.network, "peft_config")


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, tmp_path, fresh_process):
    expected = {}
    for name in NAMES:
        write_student(tiny_pipeline(name), tmp_path / "student" / name, scalars=SCALARS)
        pipe = quiet(FewStepPipeline.from_pipe(tiny_pipeline(name)))
        pipe.load_flow_map(tmp_path / "student" / name)
        expected[name] = image(pipe, name, guidance_scale=[2.0, 7.0])
        pipe.save_pretrained(tmp_path / name)
    got = fresh_process(
        "from genkit.pipelines import FewStepPipeline\n"
        "from genkit.rng import ItemRNG\n"
        "latents, images = ItemRNG(0, range(2)).normal((4, 16, 16)), {}\n"
        f"for name, inputs in { ({name: inputs(name) for name in NAMES})!r}.items():\n"
        f"    pipe = FewStepPipeline.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        "    inputs |= dict(num_inference_steps=2, latents=latents, output_type='pt', guidance_scale=[2.0, 7.0])\n"
        "    images[name] = pipe(**inputs).images.tolist()\n"
        "print(json.dumps(images))"
    )
    for name in NAMES:
        assert (torch.tensor(got[name]) - expected[name]).abs().max() < 1e-5


def test_calls_can_be_repeated_and_leave_the_teacher_alone(tiny_pipeline, tmp_path):
    teacher = tiny_pipeline("sd3")
    write_student(tiny_pipeline("sd3"), tmp_path, lora=True)
    pipe = quiet(FewStepPipeline.from_pipe(teacher))
    pipe.load_flow_map(tmp_path)
    first = image(pipe, "sd3")
    hooks = [len(m._forward_hooks) for m in pipe.network.modules()]
    assert torch.equal(image(pipe, "sd3"), first)
    assert [len(m._forward_hooks) for m in pipe.network.modules()] == hooks
    again = quiet(FewStepPipeline.from_pipe(pipe))  # shares network and gap embedder
    assert torch.equal(image(again, "sd3"), first) and torch.equal(image(pipe, "sd3"), first)
    pipe.scheduler = FlowMapScheduler(stochastic=True)
    generators = lambda: ItemRNG(0, range(2)).generators()  # noqa: E731
    noisy = image(pipe, "sd3", generator=generators())
    assert not torch.equal(noisy, first) and torch.equal(image(pipe, "sd3", generator=generators()), noisy)
    plain = teacher(**tiny.call_arguments("sd3")).images  # as a network of one time it still works
    assert plain.shape == (1, 32, 32, 3)


def test_a_network_of_two_times_needs_no_embedder():
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pipe = quiet(FewStepPipeline(scheduler=FlowMapScheduler(), transformer=net.eval()))
    x = ItemRNG(0, range(2)).normal((1, 8, 8))
    got = pipe(class_labels=[1, 5], num_inference_steps=1, latents=x, output_type="latent").images
    with torch.no_grad():
        expected = x - net(x, torch.ones(2), torch.zeros(2), torch.tensor([1, 5]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@ALL
def test_the_scale_that_the_student_is_told(name, tiny_pipeline, tmp_path):
    flow_map = write_student(tiny_pipeline(name), tmp_path, scalars=SCALARS)
    pipe = quiet(FewStepPipeline.from_pipe(tiny_pipeline(name)))
    pipe.load_flow_map(tmp_path)
    assert pipe.scalars == flow_map.scalars == SCALARS
    plain = image(pipe, name, output_type="latent")
    assert torch.equal(image(pipe, name, output_type="latent", **SCALARS), plain)  # what it is told unless asked
    got = image(pipe, name, output_type="latent", guidance_scale=[4.0, 9.0])
    torch.testing.assert_close(got[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (got[1] - plain[1]).abs().max() > 1e-3
    several = image(pipe, name, output_type="latent", guidance_scale=9.0, latents=latents()[[0, 0, 1, 1]],
                    num_images_per_prompt=2)  # fmt: skip
    torch.testing.assert_close(several[3], got[1], rtol=1e-4, atol=1e-4)
    for value, message in (
        (0.0, "guidance_scale=0.0: accepted are positive"),
        ([1.0, -2.0], "accepted are positive"),
        ([1.0] * 3, "guidance_scale has 3 values for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            image(pipe, name, guidance_scale=value)
    with pytest.raises(ValueError, match="t_low=nan: accepted are finite"):
        image(pipe, name, t_low=float("nan"))


def test_a_network_of_two_times_is_told_a_scale(tmp_path):
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4, num_classes=0, scalars={"guidance_scale": 3.0})
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    FewStepPipeline(scheduler=FlowMapScheduler(), transformer=net.eval()).save_pretrained(tmp_path)
    pipe = quiet(FewStepPipeline.from_pretrained(tmp_path))
    x = ItemRNG(0, range(3)).normal((1, 8, 8))
    for w in (3.0, 6.0):
        told = {} if w == 3 else {"guidance_scale": w}
        got = pipe(batch_size=3, num_inference_steps=1, latents=x, output_type="latent", **told).images
        with torch.no_grad():
            expected = x - net(x, torch.ones(3), torch.zeros(3), None, {"guidance_scale": torch.full((3,), 1 - 1 / w)})
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_offload(tiny_pipeline, tmp_path):
    write_student(tiny_pipeline("sd3"), tmp_path)
    pipe = quiet(FewStepPipeline.from_pipe(tiny_pipeline("sd3")))
    pipe.load_flow_map(tmp_path)
    expected = image(pipe, "sd3")
    pipe.enable_model_cpu_offload(device="cpu")
    assert (image(pipe, "sd3") - expected).abs().max() < 1e-6


def test_bad_input(tiny_pipeline, tmp_path):
    write_student(tiny_pipeline("sd3"), tmp_path)
    pipe = quiet(FewStepPipeline.from_pipe(tiny_pipeline("sd3")))
    with pytest.raises(ValueError, match="gap_embedder=None: SD3Transformer2DModel knows one time"):
        image(pipe, "sd3")
    with pytest.raises(ValueError, match="network_class"):
        FewStepPipeline.from_pipe(tiny_pipeline("sd15")).load_flow_map(tmp_path)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match=r"carries the LoRAs \['style'\]"):
        pipe.load_flow_map(tmp_path)
    pipe.transformer.unload_lora()
    pipe.load_flow_map(tmp_path)
    pipe.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    for changes, message in (
        (dict(guidance_scale=2.0), "guidance_scale=2.0: the student is not told one"),
        (dict(class_labels=[1]), "takes a prompt"),
        (dict(num_inference_steps=0), "num_inference_steps=0"),
        (dict(guider=CFG()), "gives no clean-sample prediction to guide"),
        (dict(etta=1), "argument='etta'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**inputs("sd3") | changes)
    with pytest.raises(ValueError, match="has a student"):
        pipe.load_flow_map(tmp_path)
