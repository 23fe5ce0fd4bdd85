"""Training of tokenizers: losses, schedules, who gets a gradient, what is exported."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from genkit.denoisers.base import Condition
from genkit.networks.dino_discriminator import DinoDiscriminator
from genkit.pipelines.tokenizer import TokenizerPipeline
from genkit.quantizers.usage import CodeUsage
from genkit.rng import ItemRNG
from genkit.training import logs
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.objectives.base import Batch
from genkit.training.trainer import Trainer
from tests.test_perceptual import vgg
from tests.training.ready import small_tokenizer

FVQ = dict(kind="fvq", codebook_size=64, dim=8, width=16)
PATCH = dict(kind="patch", num_filters=4, num_layers=1)


def config(folder, quantizer=FVQ, objective=None, **changes):
    values = dict(
        output_dir=str(folder),
        model=small_tokenizer(**quantizer),
        objective={"name": "tokenizer"} | (objective or {}),
        data=dict(name="digits"),
        optimizer=dict(name="Adam", lr=2e-3, betas=[0.9, 0.95]),
        global_batch_size=8,
        max_train_steps=4,
        checkpointing_steps=2,
        logging_steps=1,
        ema=dict(decays=[0.9]),
    )
    return TrainConfig(**(values | changes)).check()


def objective(folder, quantizer=FVQ, **settings):
    run = build(config(folder, quantizer, settings))
    for role in run.objective.roles.values():
        role.module.train(role.trains)
    return run.objective


def batch(step=0, n=4):
    from sklearn.datasets import load_digits

    x = torch.as_tensor(load_digits().images[:n], dtype=torch.float32)[:, None] / 8 - 1
    return Batch(x, Condition(), torch.arange(n), {"x0": x}, step=step, total_steps=10)


def losses(made, step=0):
    """The first loss of each phase of a step, and its logs."""
    b, found = batch(step), {}
    for phase in made.phases(step):
        found[phase.name] = next(made.losses(phase, b, ItemRNG(1, b.index)))
    return found


@pytest.mark.parametrize("pixel, power", [("l2", 2), ("l1", 1)])
def test_the_loss_is_the_sum_of_its_parts(pixel, power, tmp_path):
    made = objective(
        tmp_path, pixel_loss=pixel, pixel_weight=2.0, perceptual=dict(kind="laplacian", weight=0.3), adversarial=None
    )
    value, parts = losses(made)["generator"]
    out = made.student(batch().x0)
    error = (out.sample - batch().x0).abs().pow(power).mean()
    distance = made.perceptual((out.sample + 1) / 2, (batch().x0 + 1) / 2).mean()
    assert parts["reconstruction"].item() == pytest.approx(error.item(), rel=1e-5)
    assert parts["perceptual"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert {"commitment", "codebook", "usage", "perplexity"} <= parts.keys()
    expected = 2 * error + 0.3 * distance + sum(out.quantized.losses.values())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_discriminator_begins_at_its_step(tmp_path):
    made = objective(tmp_path, adversarial=dict(weight=0.5, start=3, discriminator=PATCH))
    assert [made.adversarial_weight(k) for k in (0, 2, 3, 4)] == [0, 0, 0.5, 0.5]
    calls = []
    made.discriminator.register_forward_hook(lambda *_: calls.append(1))
    before = losses(made, 2)
    assert list(before) == ["generator"] and not calls and "adversarial" not in before["generator"].logs
    after = losses(made, 3)
    assert list(after) == ["generator", "discriminator"] and len(calls) == 3  # of the generator's, real, generated
    first = before["generator"].value
    assert (after["generator"].value - 0.5 * after["generator"].logs["adversarial"]).item() == pytest.approx(
        first.item(), rel=1e-5
    )


def test_a_discriminator_that_begins_late_is_found_beforehand(tmp_path):
    settings = dict(adversarial=dict(start=25_000, discriminator=PATCH))
    trainer = Trainer(build(config(tmp_path, objective=settings, max_train_steps=400_000)), quiet=True)
    assert {p.name for p in trainer._phases()} == {"generator", "discriminator"} and trainer._toggle


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_each_phase_moves_its_own(loss, tmp_path):
    """In the trainer's steps, and by what is there of gradients."""
    settings = dict(adversarial=dict(loss=loss, start=2, discriminator=PATCH | dict(norm="batch")))
    trainer = Trainer(build(config(tmp_path, objective=settings)), quiet=True)
    made = trainer.objective
    seen = []
    for role in trainer.roles.values():
        update = role.update

        def watched(*args, update=update, name=role.name):
            grads = {r: any(p.grad is not None for p in t.parameters.values()) for r, t in trainer.roles.items()}
            seen.append((name, grads))
            return update(*args)

        role.update = watched
    before = {n: p.detach().clone() for n, p in made.discriminator.named_parameters()}
    for step in trainer.steps():
        same = all(torch.equal(p, before[n]) for n, p in made.discriminator.named_parameters())
        assert same == (step <= 2)
    one, other = dict(student=True, discriminator=False), dict(student=False, discriminator=True)
    assert seen == [("student", one)] * 3 + [("discriminator", other), ("student", one), ("discriminator", other)]
    keys = [set(line) for line in logs.read(tmp_path / logs.FILE)]
    assert "logits_fake/discriminator" not in keys[1] and "logits_fake/discriminator" in keys[2]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_goes_on_from_before_its_discriminator_begins_and_from_after(stop, tmp_path):
    """Bit for bit, with codes that are moving averages, batch norm and LeCam's averages in the discriminator."""
    quantizer = dict(kind="vq", codebook_size=16, dim=4, rule="ema", kmeans_init=True, restart_threshold=1)
    settings = dict(adversarial=dict(start=3, lecam_weight=0.05, adaptive=True, discriminator=PATCH))
    make = lambda name, **changes: Trainer(  # noqa: E731
        build(config(tmp_path / name, quantizer, settings, max_train_steps=5, **changes)), quiet=True
    )
    make("whole").train()
    for step in make("part").steps():
        if step == stop:
            break
    torch.manual_seed(9)
    make("part", resume="latest").train()
    assert (tmp_path / "whole" / logs.FILE).read_bytes() == (tmp_path / "part" / logs.FILE).read_bytes()
    folders = [tmp_path / name / "checkpoint-5" for name in ("whole", "part")]
    files = sorted(p.name for p in folders[0].glob("*.safetensors"))
    assert files == [
        "discriminator.safetensors",
        "objective.safetensors",
        "student.ema.safetensors",
        "student.safetensors",
    ]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    assert {"quantizer.embedding", "quantizer.counts", "quantizer.sums"} <= load_file(folders[0] / files[-1]).keys()


def test_a_lora(tmp_path):
    """What is exported has it fused, and the same tokens."""
    lora = dict(kind="lora", rank=2, alpha=2, target_modules=["to_q", "conv1"])
    trainer = Trainer(build(config(tmp_path, adapter=lora)), quiet=True)
    trainer.train()
    pipe = TokenizerPipeline.from_pretrained(export(trainer))
    with trainer.averaged(), torch.no_grad():
        made = trainer.run.student(batch().x0)
        torch.testing.assert_close(pipe.vqvae(batch().x0).sample, made.sample, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in pipe.vqvae.state_dict())
    with pytest.raises(ValueError, match="codes that move by themselves"):
        build(config(tmp_path, dict(kind="vq", codebook_size=16, dim=4, rule="ema"), adapter=lora))


def test_real_and_generated_pictures_are_judged_apart(tmp_path):
    made = objective(tmp_path, adversarial=dict(discriminator=PATCH))
    sizes = []
    made.discriminator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    losses(made)
    assert sizes == [4, 4, 4]


def test_the_codebook_moves_once_a_step(tmp_path):
    made = objective(
        tmp_path,
        dict(kind="vq", codebook_size=16, dim=4, rule="ema", init="normal"),
        adversarial=dict(discriminator=PATCH),
    )
    losses(made)
    assert made.student.network.quantizer.steps.item() == 1


def test_the_adaptive_weight_is_that_of_the_last_layer(tmp_path):
    made = objective(
        tmp_path,
        perceptual=dict(kind="laplacian"),
        adversarial=dict(weight=0.7, adaptive=True, discriminator=PATCH | dict(norm="none")),
    )
    value, parts = losses(made)["generator"]
    out = made.student(batch().x0)
    last = made.student.network.decoder.conv_out.weight
    x = batch().x0
    nll = (out.sample - x).square().mean() + made.perceptual((out.sample + 1) / 2, (x + 1) / 2).mean()
    opinion = -made.discriminator(out.sample).mean()
    a, b = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, opinion))
    expected = (a / (b + 1e-4)).clamp(0, 1e4)
    assert parts["adaptive_weight"].item() == pytest.approx(expected.item(), rel=1e-4)
    total = nll + 0.7 * expected * opinion + sum(out.quantized.losses.values())
    assert value.item() == pytest.approx(total.item(), rel=1e-4)


def test_progress_reaches_the_quantizer(tmp_path):
    made = objective(tmp_path, adversarial=None)
    losses(made, 5)
    assert made.student.network.quantizer.progress == 0.5


def test_lpips_and_dino_by_their_folders(tmp_path):
    save_file(vgg(), tmp_path / "vgg.safetensors")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, intermediate_size=32)
    Dinov2Model(Dinov2Config(patch_size=14, **sizes)).save_pretrained(tmp_path / "dino")
    settings = dict(
        name="tokenizer",
        perceptual=dict(kind="lpips", net="vgg", backbone=str(tmp_path / "vgg.safetensors")),
        adversarial=dict(
            discriminator=dict(kind="dino", model=str(tmp_path / "dino"), hidden_size=8, norm_num_groups=4),
            augment=["translation"],
        ),
    )
    model = small_tokenizer(**FVQ) | dict(in_channels=3, out_channels=3, sample_size=16)
    data = dict(name="synthetic", shape=[3, 16, 16])
    run = build(config(tmp_path / "run", model=model, objective=settings, data=data, max_train_steps=2))
    trainer = Trainer(run, quiet=True)
    assert isinstance(run.objective.discriminator, DinoDiscriminator)
    frozen = run.objective.discriminator.vit.layernorm.weight.clone()
    head = run.objective.discriminator.head.branches[0][-1].weight.clone()
    trainer.train()
    assert torch.equal(run.objective.discriminator.vit.layernorm.weight, frozen)
    assert not torch.equal(run.objective.discriminator.head.branches[0][-1].weight, head)
    line = logs.read(tmp_path / "run" / logs.FILE)[-1]
    assert line["perceptual/generator"] > 0


def test_it_learns_eight_digits_by_heart(tmp_path):
    """What is left of them is less than 1e-3, a thousandth of the range's square."""
    torch.manual_seed(0)
    made = objective(tmp_path, dict(FVQ, dim=8, codebook_size=128, width=32), adversarial=None)
    b = batch(n=8)
    optimizer = torch.optim.Adam(made.student_module.parameters(), lr=4e-3, betas=(0.9, 0.95))
    phase = made.phases(0)[0]
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 30) * (1 if step < 200 else max(0.02, (600 - step) / 400))
        loss = next(made.losses(phase, b, ItemRNG(step, b.index)))
        optimizer.zero_grad()
        loss.value.backward()
        nn.utils.clip_grad_norm_(made.student_module.parameters(), 1.0)
        optimizer.step()
        if loss.logs["reconstruction"] < 8e-4:
            break
    made.student_module.eval()
    with torch.no_grad():
        assert (made.student(b.x0).sample - b.x0).square().mean() < 1e-3


def test_what_is_shown_in_the_course_of_training(tmp_path):
    run = config(tmp_path, sampling=dict(every=2, num_samples=9))
    trainer = Trainer(build(run), quiet=True)
    trainer.train()
    (line, _) = [json.loads(text) for text in (tmp_path / "samples/metrics.jsonl").read_text().splitlines()]
    assert line["samples/expected_usage"] == pytest.approx(1 - (1 - 1 / 64) ** (9 * 16))
    assert 0 < line["samples/usage"] <= 1 and line["samples/mse"] > 0
    assert Image.open(tmp_path / "samples/step-2.png").size == (3 * 64, 3 * 64)


def test_the_exported_tokenizer_is_baked(tmp_path):
    trainer = Trainer(build(config(tmp_path)), quiet=True)
    trainer.train()
    folder = export(trainer)
    pipe = TokenizerPipeline.from_pretrained(folder)
    assert pipe.vqvae.config.quantizer["kind"] == "vq"
    with trainer.averaged(), torch.no_grad():
        indices = trainer.run.student(batch().x0).quantized.indices
    pixels = (batch().x0 + 1) / 2
    assert torch.equal(pipe.encode(pixels), indices)
    made = pipe(pixels, output_type="pt")
    assert torch.equal(made.images, pipe.decode(indices, output_type="pt")) and torch.equal(made.tokens, indices)
    assert CodeUsage(64).update(indices).usage > 0
    again = build(config(tmp_path / "again", model=dict(pretrained=str(folder))))
    assert torch.equal(again.student.network.encode(batch().x0).indices, indices)


EMA = dict(kind="vq", codebook_size=32, dim=4, rule="ema", decay=0.8, kmeans_init=True, restart_threshold=0.5)


@pytest.mark.parametrize("decays", [[0.9, 0.5], []])
@pytest.mark.parametrize("whole", [False, True])
def test_an_exported_moving_average_codebook_is_the_trained_one_bit_for_bit(whole, decays, tmp_path, monkeypatch):
    """Also of a run whose weights lie in shards, which is made anew of its checkpoint."""
    settings = dict(adversarial=dict(discriminator=PATCH), perceptual=dict(kind="laplacian"))
    trainer = Trainer(build(config(tmp_path, EMA, settings, ema=dict(decays=decays))), quiet=True)
    trainer.train()
    if whole:
        monkeypatch.setattr("genkit.training.export.is_sharded", lambda parameters: True)
    pipe = TokenizerPipeline.from_pretrained(export(trainer))
    with trainer.averaged():
        network = trainer.run.student.network.eval()
        codes = network.quantizer.codebook().clone()
        assert torch.equal(pipe.vqvae.quantizer.codebook(), codes)
        assert torch.equal(pipe.vqvae.encode(batch().x0).indices, network.encode(batch().x0).indices)
        for name, value in network.encoder.state_dict().items():
            assert torch.equal(value, pipe.vqvae.encoder.state_dict()[name]), name
    assert torch.equal(codes, network.quantizer.codebook()) == (not decays)  # else an average was exported


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(objective=dict(adversarial=dict(discriminator=dict(kind="patch")))), "24 pixels at least; fewer num_lay"),
        (dict(objective=dict(adversarial=dict(lecam_decay=0.9))), "lecam_decay has no effect with lecam_weight=0"),
        (dict(objective=dict(perceptual=dict(kind="lpips"))), "objective.perceptual.backbone is missing"),
        (
            dict(objective=dict(perceptual=dict(kind="vgg"))),
            "perceptual.kind='vgg' is not known. Acc.*laplacian, lpips",
        ),
        (
            dict(data=dict(name="synthetic", shape=[3, 8, 8])),
            r"data gives samples of shape \(3, 8, 8\), the model takes",
        ),
        (dict(data=dict(name="synthetic", shape=[1, 9, 8])), r"data gives samples of shape \(1, 9, 8\)"),
        (dict(quantizer=dict(kind="fvq", codebook_size=0, dim=8)), "codebook_size"),
        (dict(sampling=dict(every=1, num_inference_steps=4)), "sampling.num_inference_steps=4: ImageTokenizer takes"),
        (dict(objective=dict(name="flow_matching")), "is for networks of the kind Denoiser"),
    ],
)
def test_bad_settings(changes, text, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        Trainer(build(config(tmp_path, **changes)))


def test_a_tokenizer_draws_nothing(tmp_path):
    run = build(config(tmp_path))
    with pytest.raises(ValueError, match="a tokenizer draws no samples"):
        run.student.draw(ItemRNG(0, range(2)), Condition())
