"""Training by masked autoregression: what is masked, the bound of the variance, the pipeline that comes of it."""

import json
import math

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from torch import nn
from torch.distributions import Normal, kl_divergence
from typer.testing import CliRunner

from genkit import cli
from genkit.denoisers.base import Condition
from genkit.gaussian_chain import GaussianChain
from genkit.masked_autoregressive import MaskedAutoregressive
from genkit.networks.mar import MAR
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.rng import ItemRNG, hash_seed
from genkit.step_annealing import StepAnnealer
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export
from genkit.training.objectives.base import Batch
from genkit.training.objectives.masked_autoregressive import MaskedAutoregression, MaskedAutoregressionConfig
from genkit.training.watch import Watch

SMALL = dict(hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2, dropout=0.0)
MODEL = dict(network="mar", **SMALL)


def objective(**settings) -> MaskedAutoregression:
    torch.manual_seed(0)
    network = MAR(**SMALL).double()
    for weight in (network.head.out.weight, network.head.modulation.weight):
        nn.init.normal_(weight, std=0.05)
    return MaskedAutoregression(MaskedAutoregressionConfig(**settings), MaskedAutoregressive(network))


def batch(n=6, step=0, start=0) -> Batch:
    items = torch.arange(start, start + n)
    labels = items % 10
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 10)})
    return Batch(ItemRNG(3, items).normal((1, 8, 8), dtype=torch.float64), condition, items, step=step)


def loss(objective, batch):
    (value,) = objective.losses(objective.phases(0)[0], batch, ItemRNG(1, batch.index))
    return value


def masked(objective, steps=400):
    return [objective._counts(ItemRNG(0, [k]))[0] for k in range(steps)]


def test_the_share_of_masked_tokens():
    """Quantiles of the cut normal, in tokens: ``P(ratio < x) = (F(x) - F(0.7)) / (F(1) - F(0.7))``."""
    counts = torch.tensor(masked(objective()), dtype=torch.float64)
    assert counts.min() == 12 and counts.max() == 16  # of 16; ceil(11.2) = 12
    law = Normal(1.0, 0.25)
    at = [law.cdf(torch.tensor(x)).item() for x in (0.7, 0.75, 1.0)]
    expected = (at[1] - at[0]) / (at[2] - at[0])
    share = (counts == 12).double().mean().item()
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(counts)))
    assert set(masked(objective(mask_min=0.01, mask_std=10.0))) == set(range(1, 17))


def test_one_ratio_for_the_whole_batch_on_every_process(monkeypatch):
    seen, model = [], objective(mask_min=0.05, mask_std=0.5)
    forward = model.student.network.forward
    monkeypatch.setattr(model.student.network, "forward", lambda *a: seen.append(a[1]) or forward(*a))
    for step in range(6):
        for start in (0, 6):  # shares of two processes
            loss(model, batch(step=step, start=start))
    sizes = [v.shape[1] for v in seen]
    assert sizes[::2] == sizes[1::2] and len(set(sizes)) > 2
    orders = seen[sizes.index(max(sizes))].tolist()
    assert len({tuple(row) for row in orders}) > 1  # the places are each sample's own


def test_the_loss_is_the_mean_of_its_parts():
    """A batch in two pieces, as over processes."""
    model, whole, halves = objective(), batch(6), [batch(3), batch(3, start=3)]
    parts = [loss(model, half) for half in halves]
    together = loss(model, whole)
    assert together.value.item() == pytest.approx(sum(p.value.item() for p in parts) / 2, rel=1e-12)
    assert together.value.item() == pytest.approx(sum(v.item() for v in together.logs.values()), rel=1e-12)


def test_the_bound_is_the_divergence_of_the_chains_steps():
    model, chain = objective(diffusion_batch_mul=3), GaussianChain()
    x0 = torch.randn(2, 5, 4, dtype=torch.float64)
    z = torch.randn(2, 5, 16, dtype=torch.float64)
    rng = ItemRNG(0, range(2))
    step = rng.integers(1000, (3, 5))
    step[0, 0, 0] = 0  # the step that has a density instead
    epsilon = rng.normal((3, 5, 4), dtype=torch.float64)

    def by_hand(step):
        j = step[..., None]
        before = torch.cat((torch.ones(1, dtype=torch.float64), chain.abar[:-1]))[j]
        abar, beta = chain.abar[j], chain.beta[j]
        noisy = abar.sqrt() * x0[:, None] + (1 - abar).sqrt() * epsilon
        predicted, logits = model.student.network.head(noisy, step, z[:, None])
        r = (logits + 1) / 2
        std = ((r * beta.log() + (1 - r) * chain.log_posterior[j]) / 2).exp()

        def mean(clean):
            return (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - abar)

        ours = Normal(mean((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()).detach(), std)
        true = Normal(mean(x0[:, None].expand_as(noisy)), (chain.log_posterior[j] / 2).exp())
        clean = x0[:, None].expand_as(noisy)
        terms = torch.where(j == 0, -ours.log_prob(clean), kl_divergence(true, ours)) / math.log(2)
        return (predicted - epsilon).square().mean().item(), terms.mean().item()

    class Fixed(ItemRNG):
        def integers(self, high, shape=()):
            super().integers(high, shape)
            return step

    mse, bound = model._head_loss(x0, z, Fixed(0, range(2)))
    assert (mse.item(), bound.item()) == pytest.approx(by_hand(step), rel=1e-9)


def test_the_bound_does_not_move_the_mean():
    model = objective()
    z = torch.randn(2, 5, 16, dtype=torch.float64)
    _, bound = model._head_loss(torch.randn(2, 5, 4, dtype=torch.float64), z, ItemRNG(0, range(2)))
    bound.backward()
    out = model.student.network.head.out
    assert not out.weight.grad[:4].any() and out.weight.grad[4:].any()
    assert not out.bias.grad[:4].any() and out.bias.grad[4:].all()


def test_labels_are_dropped():
    model, seen = objective(condition_dropout=0.5), []
    forward = model.student.network.forward
    model.student.network.forward = lambda *a: seen.append(a[2]) or forward(*a)
    loss(model, batch(400))
    assert 0.4 < (seen[0] == 10).double().mean() < 0.6


def test_what_was_trained_is_a_pipeline_that_draws(toys, tmp_path):
    changes = dict(model=MODEL, objective=dict(name="masked_autoregressive"), max_train_steps=2)
    changes |= dict(sampling=dict(every=2, num_samples=4, num_inference_steps=3), checkpointing_steps=2)
    trainer = toys.run(toys.digits(tmp_path, **changes))
    assert (tmp_path / "samples" / "step-2.png").is_file()
    pipe = MaskedAutoregressivePipeline.from_pretrained(export(trainer))
    out = pipe([3, 4], 2, num_ar_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert out.images.shape == (2, 1, 8, 8)
    with trainer.averaged():
        for name, weight in trainer.run.student.network.state_dict().items():
            assert torch.equal(weight, pipe.transformer.state_dict()[name])


def test_calls_of_the_head_are_counted_where_a_run_is_watched(toys, tmp_path):
    changes = dict(model=MODEL, objective=dict(name="masked_autoregressive"), max_train_steps=1, checkpointing_steps=1)
    toys.run(toys.digits(tmp_path, **changes))
    watch = Watch(tmp_path, "digits", n=20, steps=[3, StepAnnealer(4, 2, "two_stage")], metrics=["contrast"])
    found = [(row["num_inference_steps"], row["nfe"], row["head_calls"]) for row in watch.once()]
    assert found == [(3, 16, 16 * 3), ("two_stage:hi=4,lo=2", 16, 8 * 4 + 8 * 2)]  # a token a step
    command = f"eval watch {tmp_path} digits --once --steps 3,two_stage:hi=4,lo=2,linear:budget=48,lo=2 -n 20"
    done = CliRunner().invoke(cli.app, [*command.split(), "--metrics", "contrast", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    told = [
        json.loads(line)["num_inference_steps"] for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()
    ]
    assert told == [3, "two_stage:hi=4,lo=2", "linear:budget=48,lo=2"]  # the first two were there


def test_pictures_are_learned_as_latents(toys, tmp_path):
    torch.manual_seed(1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(
        **blocks, block_out_channels=(4, 4), latent_channels=2, norm_num_groups=2, sample_size=16, scaling_factor=0.2325
    )
    vae.save_pretrained(tmp_path / "vae")
    trainer = toys.run(
        toys.digits(
            tmp_path / "run",
            model=MODEL | dict(in_channels=2, components=dict(vae=str(tmp_path / "vae"))),
            objective=dict(name="masked_autoregressive"),
            data=dict(name="synthetic", shape=(3, 16, 16), num_classes=10),
            max_train_steps=2,
        )
    )
    assert trainer.x0.shape == (8, 2, 8, 8)
    pipe = MaskedAutoregressivePipeline.from_pretrained(export(trainer))
    assert pipe(3, 2, output_type="pt").images.shape == (1, 3, 16, 16)


def test_a_lora(toys, tmp_path):
    whole = toys.run(
        toys.digits(tmp_path / "a", model=MODEL, objective=dict(name="masked_autoregressive"), max_train_steps=2)
    )
    changes = dict(model=dict(pretrained=str(export(whole))), adapter=dict(kind="lora", rank=2, alpha=2))
    trainer = toys.run(
        toys.digits(tmp_path / "b", objective=dict(name="masked_autoregressive"), max_train_steps=3, **changes)
    )
    assert any("lora" in name for name in trainer.roles["student"].parameters)
    assert export(trainer).is_dir()


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(mask_min=1.0), "objective.mask_min=1.0"),
        (dict(mask_min=0.0), "objective.mask_min=0.0"),
        (dict(mask_std=0.0), "objective.mask_std=0.0"),
        (dict(mask_mean=5.0), "hardly anything of this normal is within"),
        (dict(diffusion_batch_mul=0), "objective.diffusion_batch_mul=0"),
        (dict(condition_dropout=1.5), "objective.condition_dropout=1.5"),
        (dict(mask_mena=1.0), "did you mean 'mask_mean'"),
    ],
)
def test_bad_settings(settings, text, toys, tmp_path):
    with pytest.raises(ValueError, match=text):
        TrainConfig(
            **toys.settings(tmp_path, model=MODEL, objective=dict(name="masked_autoregressive", **settings))
        ).check()


def test_steps_that_the_head_cannot_take_are_refused_before_training(toys, tmp_path):
    for section in (
        dict(sampling=dict(every=5, num_inference_steps=2000)),
        dict(evaluation=dict(every=5, num_inference_steps=2000, num_samples=10, extractor="digits")),
    ):
        (name,) = section
        text = f"{name}.num_inference_steps=2000: accepted are 1 to 1000 steps of the head"
        with pytest.raises(ValueError, match=text):
            toys.run(toys.digits(tmp_path, model=MODEL, objective=dict(name="masked_autoregressive"), **section))
        assert not list(tmp_path.glob("checkpoint-*"))


def test_steps_that_fall_in_a_recipe(toys, tmp_path):
    """As a command line writes them: in what a run draws, in its files, and where it is watched."""
    budget = "linear:budget=60,lo=2"
    hi, _ = StepAnnealer(budget=60, lo=2).ends(16)
    changes = dict(
        model=MODEL,
        objective=dict(name="masked_autoregressive"),
        max_train_steps=1,
        checkpointing_steps=1,
        sampling=dict(every=1, num_samples=4, num_inference_steps=budget),
        evaluation=dict(every=1, num_samples=10, num_inference_steps="3", extractor="digits", metrics=["contrast"]),
    )
    config = TrainConfig(**toys.settings(tmp_path, **changes))
    assert config.sampling.num_inference_steps == StepAnnealer(budget=60, lo=2)
    assert config.evaluation.num_inference_steps == 3
    assert TrainConfig(**config.model_dump(mode="json")) == config
    trainer = toys.run(toys.digits(tmp_path, **changes))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["sampling"]["num_inference_steps"] == budget
    with trainer.averaged():
        student, device = trainer.run.student, torch.device("cpu")
        before = student.head_calls
        drawn = trainer.sampler.draw((1, 8, 8), device)
        spent = student.head_calls - before
        rng = ItemRNG(hash_seed(trainer.config.seed, 0x73616D70), range(4))
        again = student.draw(rng, student.encode(None, class_labels=range(4)), StepAnnealer(hi, 2))
    assert torch.equal(drawn, again) and 44 < spent <= 60
    (row,) = Watch(tmp_path, "digits", n=20, metrics=["contrast"]).once()
    assert row["made_with"]["steps"] == budget and row["head_calls"] == spent


@pytest.mark.parametrize(
    "steps, text",
    [
        ("linear:hi=4,lo=5", "sampling.num_inference_steps='linear:hi=4,lo=5': lo=5, hi=4: accepted are 1 <= lo <= hi"),
        ("lineer", "sampling.num_inference_steps='lineer': .*did you mean 'linear'"),
        ("0", "sampling.num_inference_steps=0: expected a whole number of at least 1"),
        ("2.5", "sampling.num_inference_steps=2.5: expected a whole number"),
        ("true", "sampling.num_inference_steps=True: expected a whole number"),
        ("linear:budget=79", "sampling.budget=79: 16 steps of at least lo=5 take 80"),
    ],
)
def test_steps_that_a_recipe_cannot_mean(steps, text, tmp_path):
    from genkit.training.__main__ import train
    from tests.training.test_config import CONFIGS

    overrides = [f"sampling.num_inference_steps={steps}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=text):
        train(load_config(CONFIGS / "digits" / "mar.yaml", overrides))
    assert not (tmp_path / "run").exists()


def test_steps_that_fall_are_for_a_head(toys, tmp_path):
    sampling = dict(sampling=dict(every=5, num_inference_steps="linear:hi=4,lo=1"))
    dit = dict(network="dit", hidden_size=16, num_layers=1, num_heads=2, sample_size=8, in_channels=1, patch_size=2)
    text = "num_inference_steps=linear:hi=4,lo=1: steps that fall are those of a diffusion head, which DiT has not"
    with pytest.raises(ValueError, match=text):
        toys.run(toys.digits(tmp_path, model=dit | dict(num_classes=10), **sampling))


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(model=dict(network="mar", hidden_sizes=3)), "did you mean 'hidden_size'"),
        (dict(model=MODEL | dict(scheduler=dict(name="DDPMScheduler"))), "network='mar' is no denoiser and takes none"),
        (dict(teacher="somewhere"), "takes no teacher"),
    ],
)
def test_settings_that_do_not_fit(changes, text, toys, tmp_path):
    values = dict(model=MODEL, objective=dict(name="masked_autoregressive")) | changes
    with pytest.raises(ValueError, match=text):
        TrainConfig(**toys.settings(tmp_path, **values)).check()


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(model=dict(network="dit", hidden_size=16, num_layers=1, num_heads=2)), "MaskedAutoregressive, DiT is of"),
        (dict(model=MODEL | dict(sample_size=4)), r"shape \(1, 8, 8\), the model takes \(1, 4, 4\)"),
        (dict(model=MODEL | dict(num_classes=5)), "takes class labels 0 to 4"),
        (dict(model=MODEL | dict(patch_size=3)), "is not a multiple of patch_size=3"),
    ],
)
def test_parts_that_do_not_fit(changes, text, toys, tmp_path):
    with pytest.raises(ValueError, match=text):
        toys.digits(tmp_path, **dict(objective=dict(name="masked_autoregressive")) | changes)


def test_recipes_name_what_is_published():
    from tests.training.test_config import CONFIGS

    config = load_config(CONFIGS / "mar_base.yaml")
    assert config.objective_config() == MaskedAutoregressionConfig()
    with torch.device("meta"):
        network = MAR(**config.model.settings)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(208, abs=0.7)
