"""One-step super-resolution: what the judge sees, what each phase moves, and what comes out."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from safetensors.torch import save_file

from genkit.adapters import fused
from genkit.data import make
from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.interpolants import Trigonometric
from genkit.networks.discriminator_head import looks_generated, looks_real
from genkit.networks.fixed_condition import FixedCondition
from genkit.pipelines.super_resolution import unprompted
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training.build import build
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export
from genkit.training.objectives.base import Batch
from genkit.training.objectives.d3sr import D3SR, D3SRConfig
from genkit.training.parts.diffusion_discriminator import DiffusionDiscriminator, Head, Lora, latent_adapter
from genkit.training.trainer import Trainer
from tests.test_perceptual import vgg

F64 = torch.float64
HEAD = dict(hidden_size=16, norm_num_groups=4)
PAIRS = dict(name="super_resolution", source=dict(name="synthetic", shape=(3, 32, 32)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models; SDXL's autoencoder is not SD 1.5's."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("sd15", "sdxl", "dit")):
        tiny.pipeline(name, seed).save_pretrained(root / name)
    save_file(vgg(), root / "vgg.safetensors")
    return root


def trainer(models, folder, generator="sd15", judge="sd15", adapter="lora", perceptual=True, **adversarial):
    objective = dict(name="d3sr", scale=4, adversarial=dict(head=HEAD, lora=dict(rank=2)) | adversarial)
    if judge is not None:
        objective["adversarial"]["judge"] = str(models / judge)
    if perceptual:
        objective["perceptual"] = dict(vgg=str(models / "vgg.safetensors"), padding="reflect")
    config = TrainConfig(
        output_dir=folder,
        model=dict(pretrained=str(models / generator)),
        adapter=dict(kind=adapter, **({"rank": 2} if adapter == "lora" else {})),
        objective=objective,
        data=PAIRS,
        optimizer=dict(name="AdamW", lr=1e-2),
        global_batch_size=2,
        max_train_steps=2,
        checkpointing_steps=2,
        logging_steps=1,
        ema=dict(decays=[0.5]),
    )
    return Trainer(build(config.check()), quiet=True)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.02, (1.3257, 0.7877, 0.2645)),
        (0.5, (1.3555, 0.7403, 0.1288)),
        (0.9, (1.3848, 0.6954, 0.0061)),
    ],
)
def test_losses_of_the_best_discriminator(t, expected):
    """Real N(0, 1), generated N(m, 1) at m = 0.5, noised on the cosine path: its logit is a log-ratio."""
    nodes, weights = (torch.from_numpy(v) for v in hermegauss(80))
    weights = weights / weights.sum()
    path, time = Trigonometric(), torch.tensor(t, dtype=F64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    spread = (alpha**2 + sigma**2).sqrt()

    def logit(x, m=0.5):
        return ((x - alpha * m) ** 2 - x**2) / (2 * spread**2)

    m = torch.tensor(0.5, dtype=F64, requires_grad=True)
    real, generated = spread * nodes, alpha * m + spread * nodes

    def expectation(loss, x):
        return weights @ loss(logit(x)[:, None])

    generator = expectation(looks_real, generated)
    discriminator = expectation(looks_generated, generated) + expectation(looks_real, real)
    (slope,) = torch.autograd.grad(generator, m)
    found = (discriminator.item(), generator.item(), slope.item())
    assert found == pytest.approx(expected, abs=6e-5)
    assert slope > 0  # descent moves the generated to the real


def test_losses_of_an_undecided_discriminator():
    flat = torch.zeros(3, 5, dtype=F64)
    assert (looks_generated(flat) + looks_real(flat)).mean().item() == pytest.approx(1.386294, abs=1e-6)
    assert looks_real(flat).mean().item() == pytest.approx(0.693147, abs=1e-6)


def objective_of(truth, path=None, **settings):
    """An objective of pixels whose student answers ``truth``."""
    path = path or Trigonometric()
    student = FunctionDenoiser(torch.nn.Identity(), path, "epsilon")
    student.forward = lambda z, t, timestep, condition: truth
    return D3SR(D3SRConfig(scale=2, **settings), student, condition=FixedCondition.of(Condition()))


def test_a_generator_that_knows_the_noise_has_no_error():
    """What is enlarged is taken as ``alpha x_H + sigma eps``: with the true ``eps`` the picture comes out."""
    path, low = Trigonometric(), torch.rand(2, 1, 4, 4, dtype=F64) - 0.5
    high = torch.rand(2, 1, 8, 8, dtype=F64) - 0.5
    enlarged = torch.nn.functional.interpolate(low, scale_factor=2, mode="bicubic").clamp(-1, 1)
    t = torch.tensor(0.25, dtype=F64)
    eps = (enlarged - path.alpha(t) * high) / path.sigma(t)
    objective = objective_of(eps, path)
    fields = {"x0": high, "low": low}
    torch.testing.assert_close(objective.restored(fields), high, rtol=0, atol=1e-6)
    (phase,) = objective.phases(0)
    batch = Batch(high, Condition(), torch.arange(2), fields)
    (loss,) = objective.losses(phase, batch, ItemRNG(0, range(2)))
    assert loss.value.item() < 1e-12 and loss.logs.keys() == {"mse"}


# -- the discriminator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "dit"])
def test_what_is_left_of_the_judge_computes_what_the_whole_does(name):
    pipe = tiny.pipeline(name)
    whole = from_pipeline(pipe)
    judge = DiffusionDiscriminator(
        whole.with_network(copy.deepcopy(whole.module)), unprompted(pipe), lora=Lora(rank=2), head=Head(**HEAD)
    )
    for branch in judge.head.branches:
        torch.nn.init.normal_(branch[-1].weight)
    channels = whole.module.config.in_channels // (4 if name == "flux" else 1)
    x, t = torch.randn(2, channels, 16, 16, requires_grad=True), torch.tensor([0.3, 0.8])
    logits = judge(x, t)
    _, features = whole.features(x, t, unprompted(pipe)(2), judge.head.config.at)
    torch.testing.assert_close(logits, judge.head(features), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    size = [sum(p.numel() for n, p in m.named_parameters() if "lora" not in n) for m in (judge.network, whole.module)]
    assert size[0] < 0.8 * size[1] or name == "flux"  # of whose two blocks one is left, with the embeddings
    trained = [n for n, p in judge.named_parameters() if p.requires_grad]
    assert all("lora" in n or n.startswith("head.") for n in trained) and any("lora" in n for n in trained)
    judge.train()
    assert judge.head.training and not any(m.training for m in judge.network.modules())
    loss = looks_real(judge(x, t)).mean()
    loss.backward()
    assert all(p.grad is not None for p in judge.parameters() if p.requires_grad)


def test_frozen_weights_in_half_precision_trained_ones_in_full():
    pipe = tiny.pipeline("sd15")
    judge = DiffusionDiscriminator(
        from_pipeline(pipe), unprompted(pipe), lora=Lora(rank=2), head=Head(**HEAD), dtype=torch.bfloat16
    )
    kinds = {(p.requires_grad, p.dtype) for n, p in judge.named_parameters() if not n.startswith("condition")}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    logits = judge(torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.9]))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_depth_of_a_transformer():
    pipe = tiny.pipeline("dit")
    settings = dict(lora=None, head=Head(**HEAD))
    for depth in (1, 2):
        denoiser = from_pipeline(tiny.pipeline("dit"))
        judge = DiffusionDiscriminator(denoiser, unprompted(pipe), depth=depth, **settings)
        assert len(judge.head.config.at) == depth
        assert (
            len([n for n, m in judge.network.named_modules() if n.count(".") == 1 and "transformer_blocks" in n])
            == depth
        )
    with pytest.raises(ValueError, match="depth=3: DiTTransformer2DModel has 2 blocks"):
        DiffusionDiscriminator(from_pipeline(pipe), unprompted(pipe), depth=3, **settings)
    pipe = tiny.pipeline("sd15")
    with pytest.raises(ValueError, match="depth=1: UNet2DConditionModel is cut behind its bottleneck"):
        DiffusionDiscriminator(from_pipeline(pipe), unprompted(pipe), depth=1, **settings)


def test_which_latents_the_judge_is_given():
    a, b = tiny.pipeline("sd15").vae, tiny.pipeline("sd15", 1).vae
    assert latent_adapter(None, a, copy.deepcopy(a)) == "shared" == latent_adapter(None, None, None)
    assert latent_adapter("shared", a, b) == "shared" and latent_adapter("reencode", a, a) == "reencode"
    rescaled = copy.deepcopy(a)
    rescaled.register_to_config(scaling_factor=0.13025)
    for own, judges in ((a, b), (a, None), (None, b), (a, rescaled)):
        with pytest.raises(ValueError, match="latent_adapter=None: the generator's autoencoder .* set latent_adapter"):
            latent_adapter(None, own, judges)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "judge", "adapter", "more"),
    [
        ("sd15", "sd15", "lora", {}),
        ("sd15", "sdxl", "lora", dict(latent_adapter="reencode", dtype="bfloat16")),
        ("sd15", None, "full", dict(lora=None)),
        ("dit", "sd15", "full", dict(latent_adapter="shared", depth=None)),
    ],
)
def test_a_phase_moves_its_network_alone(generator, judge, adapter, more, models, tmp_path):
    run = trainer(models, tmp_path, generator, judge, adapter, **more)
    objective = run.objective
    seen = [("start", state(objective.student_module), state(objective.discriminator))]
    record = lambda phase: seen.append((phase.name, state(objective.student_module), state(objective.discriminator)))  # noqa: E731
    objective.updated = record
    frozen = state(objective.vae)
    run.train()
    assert [name for name, *_ in seen] == ["start", *("generator", "discriminator") * 2]
    for (_, student, judging), (name, student_after, judging_after) in zip(seen, seen[1:], strict=False):
        moved = not same(student, student_after), not same(judging, judging_after)
        assert moved == (name == "generator", name == "discriminator")
    first, last = seen[0][2], seen[-1][2]
    changed = {k for k in first if not torch.equal(first[k], last[k])}
    assert changed and all(k.startswith("head.") or "lora" in k for k in changed)
    assert any("lora" in k for k in changed) or more.get("lora", 1) is None
    assert same(frozen, state(objective.vae))
    names = {p.name for p in (tmp_path / "checkpoint-2").glob("*.safetensors")}
    assert names == {"student.safetensors", "student.ema.safetensors", "discriminator.safetensors"}


def test_the_judge_sees_both_at_one_time_under_noise_of_their_own(models, tmp_path):
    run = trainer(models, tmp_path, perceptual=False, times=dict(law="uniform", low=0.4, high=0.6))
    objective, calls = run.objective, []
    noised, forward = objective.discriminator.noised, objective.discriminator.forward
    objective.discriminator.noised = lambda x, eps, t: calls.append((eps, t)) or noised(x, eps, t)
    objective.discriminator.forward = lambda x, t: calls.append(t) or forward(x, t)
    read = make(**PAIRS).__getitems__(range(3))
    batch = run.run.inputs({**read, "index": torch.arange(3)}, torch.device("cpu"))
    generator, discriminator = objective.phases(0)
    (loss,) = objective.losses(discriminator, batch, ItemRNG(0, range(3)))
    (eps_fake, t_fake), (eps_real, t_real), together = calls
    assert torch.equal(t_fake, t_real) and torch.equal(together, t_fake.repeat(2))
    assert (t_fake > 0.4).all() and (t_fake < 0.6).all() and len(t_fake.unique()) == 3
    assert not torch.equal(eps_fake, eps_real)
    assert loss.value.item() == pytest.approx(1.386294, abs=1e-5)  # its head is undecided
    (loss,) = objective.losses(generator, batch, ItemRNG(0, range(3)))
    assert loss.logs["adversarial"].item() == pytest.approx(0.693147, abs=1e-5)
    assert loss.value.item() == pytest.approx((loss.logs["mse"] + 0.01 * loss.logs["adversarial"]).item(), rel=1e-5)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(models, tmp_path):
    objective = (run := trainer(models, tmp_path)).objective
    for branch in objective.discriminator.head.branches:
        torch.nn.init.normal_(branch[-1].weight)
    source = make(**PAIRS)

    def loss(phase, rows):
        read = {**source.__getitems__(rows), "index": torch.tensor(rows)}
        batch = run.run.inputs(read, torch.device("cpu"))
        return next(objective.losses(phase, batch, ItemRNG(0, rows))).value.detach()

    for phase in objective.phases(0):
        parts = torch.stack([loss(phase, [0, 1]), loss(phase, [2, 3])])
        torch.testing.assert_close(parts.mean(), loss(phase, [0, 1, 2, 3]), rtol=1e-4, atol=1e-6)


RELOAD = """
import json, sys
import torch
from genkit.pipelines.super_resolution import SuperResolutionPipeline

torch.set_num_threads(1)
pipe = SuperResolutionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
low = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)
out = pipe(low, output_type="pt")
print(json.dumps([type(pipe).__name__, out.network_calls, out.images.flatten().tolist()]))
"""


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_was_trained_enlarges_pictures_in_a_fresh_process(adapter, models, tmp_path):
    run = trainer(models, tmp_path, judge=None, adapter=adapter, perceptual=False)
    run.train()
    folder = export(run)
    done = subprocess.run([sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name, calls, values = json.loads(done.stdout.splitlines()[-1])
    assert (name, calls, len(values)) == ("SuperResolutionPipeline", 1, 3 * 32 * 32)
    low = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    with run.averaged():
        pipe = run.objective.pipeline(run.run.pipe)
        expected = pipe(low, output_type="pt").images
    torch.testing.assert_close(torch.tensor(values).view_as(expected), expected, rtol=0, atol=1e-5)
    z = run.objective.restored({"x0": torch.zeros(1, 3, 32, 32), "low": 2 * low - 1})
    assert not torch.allclose(z, z.new_zeros(()))
    # The LoRA is in the weights of what was saved, and still beside those of what is trained.
    assert bool(getattr(run.objective.student_module, "peft_config", None)) == (adapter == "lora")
    assert not getattr(fused(run.objective.student_module), "peft_config", None)


def test_samples_in_the_course_of_a_run_are_enlarged_pictures(toys, tmp_path):
    data = dict(name="super_resolution", source=dict(name="digits"), degradation=dict(kind="resize", filter="area"))
    settings = toys.settings(tmp_path, objective=dict(name="d3sr"), data=data, max_train_steps=2)
    settings |= dict(sampling=dict(every=2, num_samples=16, evaluate="digits"))
    run = Trainer(build(TrainConfig(**settings).check()), quiet=True)
    toys.run(run)
    (line,) = map(json.loads, (tmp_path / "samples/metrics.jsonl").read_text().splitlines())
    assert 0 <= line["eval/class_accuracy"] <= 1 and (tmp_path / "samples/step-2.png").is_file()


# -- bad input ------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit(models, tmp_path):
    with pytest.raises(ValueError, match="mse_weight=0.*at least one loss"):
        D3SRConfig(mse_weight=0)
    with pytest.raises(ValueError, match="latent_adapter=None: the generator's autoencoder"):
        trainer(models, tmp_path, judge="sdxl", perceptual=False)
    with pytest.raises(ValueError, match="objective.adversarial.judge='.*nowhere' is neither a pipeline folder"):
        trainer(models, tmp_path, judge="nowhere", perceptual=False)
    with pytest.raises(FileNotFoundError, match="nowhere' is neither a file of weights"):
        build_only(dict(perceptual=dict(vgg="nowhere")), models, tmp_path)


def build_only(objective, models, folder):
    settings = dict(output_dir=folder, model=dict(pretrained=str(models / "sd15")), data=PAIRS, global_batch_size=2)
    return build(TrainConfig(**settings, objective=dict(name="d3sr", **objective), max_train_steps=1).check())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"data brings the fields \['x0'\], but not 'low'; see the source super_resolution"),
        ({"low": torch.zeros(2, 1, 2, 2)}, r"objective.scale=2: the data has pictures \(1, 8, 8\) and low \(1, 2, 2\)"),
        ({"low": torch.zeros(2, 3, 4, 4)}, r"objective.scale=2"),
    ],
)
def test_data_that_does_not_fit(fields, message):
    objective = objective_of(torch.zeros(2, 1, 8, 8))
    x0 = torch.zeros(2, 1, 8, 8)
    batch = Batch(x0, Condition(), torch.arange(2), {"x0": x0, **fields})
    (phase,) = objective.phases(0)
    with pytest.raises(ValueError, match=message):
        next(objective.losses(phase, batch, ItemRNG(0, range(2))))


def test_the_recipe_is_the_published_one():
    config = load_config("configs/d3sr_sd21.yaml")
    assert (config.optimizer.settings["lr"], config.global_batch_size, config.max_train_steps) == (5e-5, 8, 100_000)
    assert config.source_config().crop_size == 512
    times = config.objective_config().adversarial.times
    assert times.low * 1000 - 1 == pytest.approx(1) and times.high * 1000 - 1 == pytest.approx(999)
