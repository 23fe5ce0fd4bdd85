"""Generators trained by score distillation: what they converge to, who is updated when, what they are trained on."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from genkit.data.base import Source
from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.interpolants import PREDICTION_TYPES, Linear, Trigonometric
from genkit.pipelines import ClassConditionalPipeline
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.objectives.base import Batch, DivergedError, Phase
from genkit.training.objectives.score_distillation import ScoreDistillation, ScoreDistillationConfig
from genkit.training.trainer import Trainer
from tests.training import planar

SMALL_GAN = dict(at=["blocks.0"], hidden_size=16, num_layers=1, norm_num_groups=4)
STUDENT, FAKE = Phase("student", trains=("student",)), Phase("fake", trains=("fake",))


class Affine(nn.Module):
    """The generator ``x = m + S z``, as a prediction of the clean sample."""

    def __init__(self):
        super().__init__()
        self.m, self.s = (nn.Parameter(torch.tensor(v)) for v in (-1.0, 2.0))

    def forward(self, z, t):
        return self.m + self.s * z


class Law(nn.Module):
    """The exact noise prediction of ``N(mean, std^2)`` on the linear path; mean and std can be learned."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, x, t):
        alpha, sigma = 1 - t[:, None], t[:, None]
        return sigma * (x - alpha * self.mean) / (alpha**2 * (2 * self.log_std).exp() + sigma**2)


class Empty(Source):
    """Items without anything to learn from."""

    shape = (1,)

    def read(self, records, items):
        return {"x0": torch.zeros(len(items), 1)}


def generator(**settings):
    student = FunctionDenoiser(Affine(), Linear(), "sample")
    teacher = FunctionDenoiser(Law(1.0, 0.7), Linear(), "epsilon")
    return ScoreDistillation(ScoreDistillationConfig(reduction="sum", **settings), student, teacher)


class Following(nn.Module):
    """Not a network but the exact prediction for what the generator makes at present."""

    def __init__(self, affine):
        super().__init__()
        self.law = Law(0.0, 1.0)
        self.generator = (affine,)

    def forward(self, x, t):
        self.law.mean.data.copy_(self.generator[0].m)
        self.law.log_std.data.copy_(self.generator[0].s.abs().log())
        return self.law(x, t)


CASES = {
    # mean and spread that the generator ends at, from (-1, 2); data N(1, 0.7^2).
    "sds": (dict(method="sds"), (0.999, 0.0)),
    "vsd, exact fake": (dict(method="vsd"), (1.0, 0.7)),
    "dmd, exact fake": (dict(method="dmd"), (1.0, 0.7)),
    "vsd, learned fake": (dict(method="vsd", fake=dict(kind="full", repeats=5)), (0.998, 0.697)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_generator_finds_the_law_or_its_mode(name, tmp_path, capsys):
    settings, (mean, spread) = CASES[name]
    objective = generator(**settings)
    affine = objective.student.network
    if "exact" in name:
        objective.fake.denoiser = FunctionDenoiser(Following(affine), Linear(), "epsilon")
        objective.phases = lambda step: (STUDENT,)
    changes = dict(global_batch_size=512, max_grad_norm=None, ema=dict(decays=[]), optimizer=dict(name="Adam", lr=0.05))
    changes |= dict(lr_scheduler="linear", lr_warmup_steps=0, lr_final_ratio=0.0, data=dict(name="prompts"))
    _, seconds = planar.train(tmp_path, objective, 1500, source=Empty(), **changes)
    planar.show(capsys, name, [affine.m.item(), affine.s.abs().item()], seconds)
    assert affine.m.item() == pytest.approx(mean, abs=0.02)
    assert affine.s.abs().item() == pytest.approx(spread, abs=0.02)


def batch_of(n, shape=(1,), **changes):
    return Batch(torch.zeros(n, *shape), Condition(), torch.arange(n), **changes)


def one(objective, phase, batch, seed=0):
    (loss,) = objective.losses(phase, batch, ItemRNG(seed, batch.index))
    return loss


def test_a_short_run_moves_the_generator_towards_the_data():
    objective = generator(method="vsd", fake=dict(kind="full", repeats=1))
    affine = objective.student.network
    groups = {STUDENT: affine.parameters(), FAKE: objective.fake_module.parameters()}
    optimizers = {phase: torch.optim.Adam(weights, lr=0.1) for phase, weights in groups.items()}
    for step in range(80):
        for k, phase in enumerate((FAKE, FAKE, FAKE, STUDENT)):
            optimizers[phase].zero_grad()
            one(objective, phase, batch_of(256), seed=4 * step + k).value.backward()
            optimizers[phase].step()
    assert affine.m.item() == pytest.approx(1.0, abs=0.3) and abs(affine.s.item()) == pytest.approx(0.7, abs=0.3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_fake_that_is_the_teacher_leaves_the_generator_alone(kind, toys, tmp_path):
    fake = dict(kind=kind) | (dict(rank=2) if kind == "lora" else {})
    for method in ("vsd", "dmd"):
        objective = digits(toys, tmp_path, method=method, fake=fake).objective
        x0, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
        loss = one(objective, STUDENT, Batch(x0, Condition({"class_labels": labels}), labels))
        loss.value.backward()
        assert loss.value == 0 and loss.logs["gradient"] == 0
        gradients = [p.grad for p in objective.student_module.parameters() if p.grad is not None]
        assert gradients and all((g == 0).all() for g in gradients)


def teacher_folder(toys, folder):
    path = folder / "teacher"
    if not path.exists():
        run = build(TrainConfig(**toys.settings(folder / "run")).check())
        # Else the last layers are zero and the network gives nothing to follow.
        with torch.no_grad():
            for parameter in run.pipe.transformer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        run.pipe.save_pretrained(path)
    return str(path)


def digits(toys, folder, out="out", run=None, **objective):
    path = teacher_folder(toys, folder)
    settings = dict(model=dict(pretrained=path), teacher=path, ema=dict(decays=[0.9]))
    settings |= dict(objective=dict(name="score_distillation", **objective), max_train_steps=2) | (run or {})
    return toys.digits(folder / out, **settings)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_update_moves_its_own_networks_and_no_other(kind, toys, tmp_path):
    constant = dict(lr_scheduler="constant", lr_warmup_steps=0)
    trainer = digits(toys, tmp_path, fake=dict(kind=kind, repeats=3), gan=SMALL_GAN, run=constant)
    roles = {name: role.module for name, role in trainer.objective.roles.items()}
    assert set(roles) == {"student", "fake", "head"} | ({"teacher"} if kind == "full" else set())
    own = {name: role.parameters for name, role in trainer.roles.items()}
    frozen = {n: p for n, p in trainer.objective.teacher_module.named_parameters() if "lora" not in n}
    own["frozen"] = frozen

    def weights():
        return {name: torch.cat([p.detach().flatten().clone() for p in ps.values()]) for name, ps in own.items()}

    order, update = [], trainer._update

    def watched(phase, repeat, micro):
        before = weights()
        logs = update(phase, repeat, micro)
        after = weights()
        moved = {name for name in own if not torch.equal(before[name], after[name])}
        order.append((phase.name, repeat))
        assert moved == set(phase.trains)
        return logs

    trainer._update = watched
    toys.run(trainer)
    assert order == [("fake", 0), ("fake", 1), ("fake", 2), ("student", 0)] * 2


def test_two_time_scales(toys, tmp_path):
    gan = SMALL_GAN | dict(optimizer=dict(lr=3e-4))
    trainer = digits(toys, tmp_path, fake=dict(kind="full", optimizer=dict(lr=1e-3, betas=[0.0, 0.9])), gan=gan)
    rates = {name: role.optimizer.param_groups[0]["lr"] for name, role in trainer.roles.items()}
    assert rates == {"student": 2e-3, "fake": 1e-3, "head": 3e-4}
    assert trainer.roles["fake"].optimizer.param_groups[0]["betas"] == (0.0, 0.9)
    assert trainer.roles["student"].ema is not None and trainer.roles["fake"].ema is None


class Coded(nn.Module):
    """A generator whose every sample is the time at which it was asked; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, z, t):
        self.seen.append((z.detach(), t, torch.is_grad_enabled(), self.training))
        return t[:, None].expand_as(z) + self.weight * z


def test_backward_simulation_trains_on_the_generators_own_steps():
    """Later inputs are ``alpha(t_k) D(z_{k-1}, t_{k-1}) + sigma(t_k) noise``; every step gets its share of items."""
    path = Trigonometric()
    timesteps = path.timestep(torch.tensor([1.0, 0.7, 0.2])).tolist()
    net = Coded()
    student = FunctionDenoiser(net, path, "sample")
    teacher = Gaussian([1.0, 1.0], 0.5, interpolant=path).denoiser("epsilon")
    teacher.network = Constant0()
    objective = ScoreDistillation(ScoreDistillationConfig(method="sds", timesteps=timesteps), student, teacher)
    objective.train()
    one(objective, STUDENT, batch_of(6000, (2,)))
    *earlier, (z, t, with_grad, training) = net.seen
    assert with_grad and training and len(earlier) == 2
    assert not any(grad or train for _, _, grad, train in earlier)
    times = objective.steps[0]
    for k, (mean, std) in enumerate([(0.0, 1.0), (path.alpha(times[1]) * 1.0, path.sigma(times[1]))]):
        mine = z[(t - times[k]).abs() < 1e-6]
        assert abs(len(mine) - 2000) < 200
        assert mine.mean().item() == pytest.approx(float(mean), abs=0.06)
        assert mine.std().item() == pytest.approx(float(std), rel=0.04)
    last = z[(t - times[2]).abs() < 1e-6]
    assert last.mean().item() == pytest.approx(float(path.alpha(times[2]) * times[1]), abs=0.03)
    assert last.std().item() == pytest.approx(float(path.sigma(times[2])), rel=0.04)


class Constant0(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def test_an_item_does_not_depend_on_its_neighbours():
    net = Coded()
    net.weight.data.fill_(0.3)
    student = FunctionDenoiser(net, Linear(), "sample")
    teacher = FunctionDenoiser(Law(1.0, 0.7), Linear(), "epsilon")
    objective = ScoreDistillation(ScoreDistillationConfig(timesteps=[1000, 600, 300]), student, teacher)
    whole = objective._generate(batch_of(9), ItemRNG(5, range(9)))
    parts = [objective._generate(batch_of(3), ItemRNG(5, range(i, i + 3))) for i in (0, 3, 6)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


def test_the_forms_agree_and_times_are_annealed():
    gradients = []
    for form in ("gradient", "recon"):
        objective = generator(method="sds", form=form)
        one(objective, STUDENT, batch_of(64)).value.backward()
        gradients.append(torch.stack([p.grad for p in objective.student.network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    objective = generator(method="sds", times=dict(schedule="linear", end=0.1))
    asked = []
    objective.teacher.network.register_forward_hook(lambda module, inputs, output: asked.append(inputs[1].max().item()))
    for step in (0, 9):
        one(objective, STUDENT, batch_of(64, step=step, total_steps=10))
    assert asked[0] > 0.9 and asked[1] < 0.98 - 0.9 * 0.88 + 1e-6


def test_pairs_pull_the_generator_to_the_teachers_own_samples():
    objective = generator(method="dmd", regression_weight=0.25)
    assert objective.needs_samples
    eps = torch.randn(32, 1)
    x0 = 1 + 0.7 * eps
    batch = Batch(x0, Condition(), torch.arange(32), {"eps": eps, "x0": x0})
    loss = one(objective, STUDENT, batch)
    expected = (-1 + 2 * eps - x0).square().mean()
    torch.testing.assert_close(loss.logs["regression"], expected)
    torch.testing.assert_close(loss.value, 0.25 * expected)  # the fake is the teacher: nothing else is left
    with pytest.raises(ValueError, match="needs pairs, fields eps and x0; the data gives"):
        one(objective, STUDENT, batch_of(4))


@pytest.mark.parametrize("weighting", [dict(), dict(weighting="velocity"), dict(weighting="edm", sigma_data=0.7)])
def test_the_fake_fits_the_generator_under_every_weighting(weighting):
    times = dict(law="uniform", low=0.05, high=0.95)
    objective = generator(method="vsd", fake=dict(kind="full", times=times, **weighting))
    law = objective.fake_module
    optimizer = torch.optim.Adam(law.parameters(), lr=0.1)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 150)
        optimizer.zero_grad()
        one(objective, FAKE, batch_of(256), seed=step).value.backward()
        optimizer.step()
    assert law.mean.item() == pytest.approx(-1.0, abs=0.15) and law.log_std.exp().item() == pytest.approx(2.0, abs=0.2)
    assert objective.student.network.m.grad is None


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
@pytest.mark.parametrize("weighting", [dict(), dict(weighting="velocity"), dict(weighting="edm", sigma_data=0.7)])
def test_a_fake_of_any_prediction_type_has_the_same_loss_and_pull(path, weighting):
    """Networks that predict the same thing in other words, and are not the teacher: to 1e-10 in float64."""
    times = dict(law="uniform", low=0.02, high=0.98)
    items, x0 = torch.arange(32), torch.zeros(32, 2, dtype=torch.float64)
    values = {}
    for kind in PREDICTION_TYPES:
        teacher = Gaussian([1.0, -2.0], 0.5, interpolant=path).denoiser(kind)
        follower = Gaussian([0.0, 0.3], 0.9, interpolant=path).denoiser(kind)
        teacher.network = Wrapped(teacher.network)
        student = FunctionDenoiser(Affine().double(), path, "sample")
        settings = ScoreDistillationConfig(fake=dict(kind="full", times=times, **weighting))
        objective = ScoreDistillation(settings, student, teacher)
        objective.fake.denoiser = follower
        batch = Batch(x0, Condition(), items)
        values[kind] = [one(objective, phase, batch).value.item() for phase in (FAKE, STUDENT)]
    for got in values.values():
        assert got == pytest.approx(values["epsilon"], rel=1e-10, abs=1e-10) and min(got) > 1e-3


class Wrapped(nn.Module):
    """A function as a module with a weight, so that it can be copied and trained."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.scale = fn, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t):
        return self.scale * self.fn(x, t)


def test_guidance_of_the_teacher_and_of_the_fake(toys, tmp_path):
    """A guided teacher and a fake that is guided alike cancel, and either alone does not."""
    labels = torch.arange(4)
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full((4,), 10)})
    batch = Batch(torch.zeros(4, 1, 8, 8), condition, labels)
    values = {}
    for scales in ((3.0, 3.0), (3.0, 1.0), (1.0, 3.0)):
        fake = dict(kind="full", guidance_scale=scales[1])
        objective = digits(toys, tmp_path, out=f"out{scales}", guidance_scale=scales[0], fake=fake).objective
        values[scales] = one(objective, STUDENT, batch).logs["gradient"].item()
    assert values[3.0, 3.0] == 0 and values[3.0, 1.0] > 1e-4 and values[1.0, 3.0] > 1e-4


def test_items_without_a_finite_gradient_are_left_out_until_none_is_left():
    objective = generator(method="sds")
    teacher = objective.teacher.network

    def poison(n):
        def hook(module, inputs, output):
            return output.index_fill(0, torch.arange(n), float("nan"))

        return teacher.register_forward_hook(hook)

    handle = poison(3)
    loss = one(objective, STUDENT, batch_of(8))
    loss.value.backward()
    assert loss.logs["dropped"] == 3 / 8 and loss.value.isfinite()
    assert all(p.grad.isfinite() for p in objective.student.network.parameters())
    handle.remove()
    poison(8)
    with pytest.raises(DivergedError, match="no item of 8 has a finite gradient"):
        one(objective, STUDENT, batch_of(8))


def test_a_one_step_generator_is_exported_with_its_scheduler(toys, tmp_path):
    trainer = toys.run(digits(toys, tmp_path, timesteps=[1000, 500], gan=SMALL_GAN))
    pipe = ClassConditionalPipeline.from_pretrained(export(trainer))
    assert type(pipe.scheduler).__name__ == "RenoiseScheduler"
    for n, timesteps in ((1, [1000]), (2, [1000, 500])):
        images = pipe([1, 2], n, generator=torch.Generator().manual_seed(0), output_type="latent").images
        assert images.isfinite().all() and pipe.scheduler.timesteps.tolist() == timesteps


ARCHITECTURES = {
    "sd15": dict(timesteps=[961], fake=dict(kind="lora", rank=2, repeats=2)),
    "sdxl": dict(timesteps=[399], fake=dict(kind="lora", rank=2, repeats=1), guidance_scale=8.0),
    "dit": dict(timesteps=[961, 499], fake=dict(kind="lora", rank=2, repeats=2)),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dmd2_on_the_networks_of_diffusers(architecture, toys, tmp_path, tiny_pipeline):
    folder = str(tmp_path / "teacher")
    tiny_pipeline(architecture).save_pretrained(folder)
    gan = dict(hidden_size=16, num_layers=1, norm_num_groups=4, generator_weight=5e-3)
    settings = toys.settings(
        tmp_path / "out",
        model=dict(pretrained=folder),
        teacher=folder,
        adapter=dict(kind="lora", rank=2),
        objective=dict(name="score_distillation", gan=gan, **ARCHITECTURES[architecture]),
        data=dict(name="synthetic"),
        global_batch_size=2,
        max_train_steps=2,
        checkpointing_steps=2,
    )
    trainer = toys.run(Trainer(build(TrainConfig(**settings).check()), quiet=True))
    assert export(trainer).name == "lora"
    files = {p.name for p in (tmp_path / "out/checkpoint-2").glob("*.safetensors")}
    assert files == {"student.safetensors", "student.ema.safetensors", "fake.safetensors", "head.safetensors"}
    scheduler = trainer.objective.scheduler(DiffusionPipeline.from_pretrained(folder).scheduler)
    steps = ARCHITECTURES[architecture]["timesteps"]
    scheduler.set_timesteps(len(steps))
    assert scheduler.timesteps.tolist() == steps


def test_pictures_are_compared_where_asked(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    student, teacher = from_pipeline(pipe), from_pipeline(tiny_pipeline("sd15"))
    condition = student.encode(pipe, prompt=["a", "b"], negative_prompt="")
    batch = Batch(torch.zeros(2, 4, 16, 16), condition, torch.arange(2))
    settings = dict(method="sds", form="recon", timesteps=[961], times=dict(schedule="constant", high=0.6))
    pictures = []
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: pictures.append(output))
    pipe.vae.requires_grad_(False)
    objective = ScoreDistillation.make(ScoreDistillationConfig(space="image", **settings), student, teacher, pipe)
    loss = one(objective, STUDENT, batch)
    loss.value.backward()
    made, target = pictures[::-1]
    assert made.shape == (2, 3, 32, 32) and made.requires_grad and not target.requires_grad
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.module.parameters())
    with pytest.raises(ValueError, match="space='image' decodes by the pipeline's VAE, and the pipeline has none"):
        ScoreDistillation(ScoreDistillationConfig(space="image", **settings), student, teacher)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            dict(method="sds", fake=dict(kind="full")),
            "fake and gan go with vsd and dmd",
        ),
        (dict(method="csd", gan={}), "method='csd' has no fake network"),
        (dict(method="csd", guidance_scale=2), "method='csd' is the guidance alone"),
        (dict(space="image"), "space='image' needs form='recon', got form='gradient'"),
        (dict(timesteps=[1, 2]), "must decrease"),
        (dict(timesteps=[2, 1], regression_weight=1), "needs one timestep"),
        (dict(fake=dict(kind="full", rank=3)), "rank"),
        (dict(fake=dict(kind="full", sigma_data=1)), "edm needs a number, the others none"),
        (dict(fake=dict(kind="full", weighting="edm")), "edm needs a number"),
        (dict(gan=dict(at=[])), "at"),
        (dict(times=dict(schedule="linear", end=0.01)), "times end at 0.01"),
    ],
)
def test_settings_that_contradict(settings, text):
    with pytest.raises(ValueError, match=text):
        ScoreDistillationConfig(**settings)


def test_what_cannot_be_trained(toys, tmp_path):
    with pytest.raises(ValueError, match=r"timesteps=\[1200.0\]: accepted are those above 0 up to 1000"):
        generator(timesteps=[1200])
    with pytest.raises(ValueError, match="epsilon model says nothing of the clean sample"):
        law = FunctionDenoiser(Law(1.0, 0.7), Linear(), "epsilon")
        ScoreDistillation(ScoreDistillationConfig(), law, law)
    with pytest.raises(ValueError, match="gives no samples"):
        digits(toys, tmp_path, gan=SMALL_GAN, run=dict(data=dict(name="prompts", num_classes=10)))
    trainer = toys.run(digits(toys, tmp_path, run=dict(data=dict(name="prompts", num_classes=10))))
    assert trainer.step == 2
    with pytest.raises(ValueError, match="no such sub-module|has no sub-module 'mid_block'"):
        digits(toys, tmp_path, out="other", gan=SMALL_GAN | dict(at=["mid_block"]))
